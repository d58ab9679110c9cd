"""Hashes and ciphers as the protocol names them (5.4), on hashlib and `cryptography`.

HChaCha20 isn't in `cryptography`, but a ChaCha20 block is its result plus the initial state (draft-irtf-cfrg-xchacha-03 2.2): the
keystream less that state is HChaCha20, so no round of the cipher is ours.

Cost: a Diffie-Hellman 35 us, an AEAD of a full packet 2 us, a keyed BLAKE2s 1.5 us.
"""

from __future__ import annotations

import hmac
from hashlib import blake2s
from struct import Struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

Buffer = bytes | bytearray | memoryview

_WORDS: Final = Struct("<8I")
_CONSTANTS: Final = Struct("<4I").unpack(b"expand 32-byte k")
_FOUR: Final = Struct("<4I").unpack
_BLOCK: Final = Struct("<16I").unpack
_BLOCK_SIZE: Final = 64
_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))
_ZERO_BLOCK: Final = bytes(64)
_ZERO_NONCE: Final = bytes(12)
_TAI64_EPOCH: Final = 0x400000000000000A
"""TAI64 of 1970, TAI then being ten seconds ahead. Leap seconds since don't matter: labels are only compared with each other."""
_WHITEN: Final = ~0xFFFFFF


class NotAuthentic(Exception):
    """A ciphertext that its key didn't make."""


class LowOrderPoint(Exception):
    """A public key that gives the all-zero secret with every private key (RFC 7748 6.1)."""


def digest(*parts: Buffer) -> bytes:
    """HASH: BLAKE2s with 32 bytes of output, of the parts put together."""
    return blake2s(b"".join(parts)).digest()


def mac(key: bytes, data: Buffer) -> bytes:
    """MAC: keyed BLAKE2s with 16 bytes of output."""
    return blake2s(data, digest_size=16, key=key).digest()


def hmac_digest(key: bytes, data: bytes) -> bytes:
    """HMAC-BLAKE2s, 32 bytes (RFC 2104), with a key of at most 64. By hashlib's own BLAKE2s: OpenSSL's, which `hmac` takes, costs three times as much."""
    block = key.ljust(_BLOCK_SIZE, b"\0")
    return blake2s(block.translate(_OUTER) + blake2s(block.translate(_INNER) + data).digest()).digest()


def same(one: Buffer, other: Buffer) -> bool:
    """Whether two secrets are equal, in a time that doesn't say where they differ."""
    return hmac.compare_digest(one, other)


def kdf1(key: bytes, data: bytes) -> bytes:
    """KDF_1: HKDF's first output (RFC 5869)."""
    return hmac_digest(hmac_digest(key, data), b"\1")


def kdf2(key: bytes, data: bytes) -> tuple[bytes, bytes]:
    """KDF_2: HKDF's first two outputs."""
    secret = hmac_digest(key, data)
    first = hmac_digest(secret, b"\1")
    return first, hmac_digest(secret, first + b"\2")


def kdf3(key: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    """KDF_3: HKDF's first three outputs."""
    secret = hmac_digest(key, data)
    first = hmac_digest(secret, b"\1")
    second = hmac_digest(secret, first + b"\2")
    return first, second, hmac_digest(secret, second + b"\3")


def seal(key: bytes, plain: Buffer, associated: Buffer) -> bytes:
    """AEAD with counter 0: ChaCha20-Poly1305 (RFC 8439), for a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plain, associated)


def unseal(key: bytes, sealed: Buffer, associated: Buffer) -> bytes:
    """What `seal` sealed. Raises NotAuthentic."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, associated)
    except InvalidTag:
        raise NotAuthentic from None


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """The subkey of 32 bytes for a key of 32 and a nonce of 16."""
    block = _BLOCK(Cipher(ChaCha20(key, nonce), None).encryptor().update(_ZERO_BLOCK))
    initial = (*_CONSTANTS, *_FOUR(nonce))
    made = (*block[:4], *block[12:])
    return _WORDS.pack(*((word - start) & 0xFFFFFFFF for word, start in zip(made, initial, strict=True)))


def xseal(key: bytes, nonce: bytes, plain: bytes, associated: bytes) -> bytes:
    """XAEAD: XChaCha20-Poly1305 with a nonce of 24 bytes."""
    return ChaCha20Poly1305(hchacha20(key, nonce[:16])).encrypt(bytes(4) + nonce[16:], plain, associated)


def xunseal(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What `xseal` sealed. Raises NotAuthentic."""
    try:
        return ChaCha20Poly1305(hchacha20(key, nonce[:16])).decrypt(bytes(4) + nonce[16:], sealed, associated)
    except InvalidTag:
        raise NotAuthentic from None


def private_key(secret: bytes) -> X25519PrivateKey:
    """A private key of 32 bytes, as the cipher wants it. Raises ValueError where they aren't 32."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_bytes(private: X25519PrivateKey) -> bytes:
    """The 32 bytes of its public key."""
    return private.public_key().public_bytes_raw()


def public_key(secret: bytes) -> bytes:
    """The public key of a private key, both 32 bytes. Raises ValueError."""
    return public_bytes(private_key(secret))


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """DH: X25519 (RFC 7748), 32 bytes. Raises LowOrderPoint."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise LowOrderPoint from None


def tai64n(wall_ns: int) -> bytes:
    """TIMESTAMP: a TAI64N label of 12 bytes, in steps of 2^24 ns (17 ms), so that it doesn't tell a precise clock (5.1)."""
    seconds, nanoseconds = divmod(wall_ns, 1_000_000_000)
    return (_TAI64_EPOCH + seconds).to_bytes(8, "big") + (nanoseconds & _WHITEN).to_bytes(4, "big")
