"""A device's word to the registry: made with its private key, checked with its public one. PURE.

A WireGuard key can't sign (X25519 agrees on secrets), so a device proves who it is by a secret that only it and the registry have: the
Diffie-Hellman of its key with a key of the registry's own, which it was told when it enrolled. Nothing more has to be kept on the device,
and a proof by a key that was replaced is worth nothing. The same secret never meets another use: it is hashed under a label of ours.

    secret = BLAKE2s-256("falkirk device v1" | X25519)      mac = BLAKE2s-128(secret, label | purpose | time | what is said)

Parts are put together with their lengths, so that no two lists of parts read the same. Against replays, the receiver takes each time of a device
only where it is later than the one before (`LATE_NS` bounds how far clocks may differ).
Limit: whoever has the registry's key can make proofs of any device; it is the registry's own word then anyway.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from struct import Struct
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from falkirk.wireguard import primitives

LATE_NS: Final = 300 * 1_000_000_000
"""How far a proof's time may be from the receiver's clock."""
DESCRIBE: Final = "describe"
POSTURE: Final = "posture"
ROTATE: Final = "rotate"
_LABEL: Final = b"falkirk device v1"
_LENGTH: Final = Struct("<I")
_TIME: Final = Struct("<Q")


def make(private_key: bytes, other_public_key: bytes, purpose: str, time_ns: int, said: bytes = b"") -> bytes:
    """The 16 bytes of a proof; the registry makes the same ones from its private and the device's public key.

    Raises ValueError for keys that aren't 32 bytes, or a public key of low order (RFC 7748 section 6.1).
    """
    shared = X25519PrivateKey.from_private_bytes(private_key).exchange(
        X25519PublicKey.from_public_bytes(other_public_key)
    )
    secret = primitives.digest(_LABEL, shared)
    return primitives.mac(secret, _joined(_LABEL, purpose.encode(), _TIME.pack(time_ns), said))


def check(
    mac: bytes, private_key: bytes, other_public_key: bytes, purpose: str, time_ns: int, said: bytes = b""
) -> bool:
    """Whether a proof is of the device with this public key, for this purpose, and says this."""
    if len(mac) != 16 or not 0 <= time_ns < 1 << 64:
        return False
    try:
        expected = make(private_key, other_public_key, purpose, time_ns, said)
    except ValueError:
        return False
    return primitives.same(mac, expected)


def posture(facts: Mapping[str, str]) -> bytes:
    """What a report of posture says."""
    return _joined(*(part.encode() for key in sorted(facts) for part in (key, facts[key])))


def key_of(text: str) -> bytes:
    """The 32 bytes of a key in base64. Raises ValueError."""
    key = base64.b64decode(text, validate=True)
    if len(key) != 32:
        raise ValueError("a key has 32 bytes")
    return key


def text_of(key: bytes) -> str:
    """A key in base64 (RFC 4648 section 4)."""
    return base64.b64encode(key).decode()


def public_of(private_key: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def _joined(*parts: bytes) -> bytes:
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)
