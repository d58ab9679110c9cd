"""Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s (Noise 34, 7.5 and 9; 5.4.2 and 5.4.3): two messages, then two keys.

    <- s
    ...
    -> e, es, s, ss, payload        payload: the initiator's timestamp
    <- e, ee, se, psk, payload      payload: nothing

What goes wrong is told apart by exceptions of `primitives`: NotAuthentic and LowOrderPoint. Ephemeral keys are arguments.
The initiator's message is read in two steps, since the first tells who it claims to be, for one Diffie-Hellman, and the second needs
what is kept for that peer.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from falkirk.wireguard import primitives
from falkirk.wireguard.primitives import digest, exchange, kdf1, kdf2, kdf3, seal, unseal

CONSTRUCTION: Final = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER: Final = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
"""The prologue of every handshake."""
_KEY: Final = 32
_SEALED_KEY: Final = 48


class Identity:
    """A static key, with what every handshake begins with."""

    __slots__ = ("_chaining", "_hashed", "_own", "public", "secret")

    def __init__(self, secret: bytes, prologue: bytes = IDENTIFIER) -> None:
        """`secret` is the private key, 32 bytes. Raises ValueError."""
        self.secret = primitives.private_key(secret)
        self.public = primitives.public_bytes(self.secret)
        # Noise 5.2: the protocol's name is longer than a hash, so it is hashed; then the prologue is mixed in.
        self._chaining = digest(CONSTRUCTION)
        self._hashed = digest(self._chaining, prologue)
        self._own = digest(self._hashed, self.public)

    def calling(self, responder: bytes) -> tuple[bytes, bytes]:
        """Chaining key and hash before the first message to `responder`'s key."""
        return self._chaining, digest(self._hashed, responder)

    def called(self) -> tuple[bytes, bytes]:
        """The same before the first message to us."""
        return self._chaining, self._own


class State(NamedTuple):
    """Between two messages."""

    chaining: bytes
    hashed: bytes
    ephemeral: X25519PrivateKey | bytes
    """The initiator's own, or in the responder the initiator's public one."""


class Keys(NamedTuple):
    """What a handshake comes to, 32 bytes each."""

    of_initiator: bytes
    """What the initiator sends with."""
    of_responder: bytes


class Claim(NamedTuple):
    """An initiation, read as far as its static key."""

    public: bytes
    """Whom it claims to come from: it is authentic only once `proved`."""
    chaining: bytes
    hashed: bytes
    ephemeral: bytes


def initiate(
    identity: Identity, responder: bytes, static_secret: bytes, ephemeral: X25519PrivateKey, payload: bytes
) -> tuple[bytes, State]:
    """The first message (ephemeral, static, payload) to `responder`; `static_secret` is the secret of both static keys.

    Raises LowOrderPoint.
    """
    chaining, hashed = identity.calling(responder)
    public = primitives.public_bytes(ephemeral)
    hashed = digest(hashed, public)
    chaining, key = kdf2(kdf1(chaining, public), exchange(ephemeral, responder))
    static = seal(key, identity.public, hashed)
    hashed = digest(hashed, static)
    chaining, key = kdf2(chaining, static_secret)
    sealed = seal(key, payload, hashed)
    return public + static + sealed, State(chaining, digest(hashed, sealed), ephemeral)


def claim(identity: Identity, message: bytes) -> Claim:
    """Who the first message claims to come from: one Diffie-Hellman. Raises NotAuthentic, LowOrderPoint."""
    chaining, hashed = identity.called()
    public = message[:_KEY]
    hashed = digest(hashed, public)
    chaining, key = kdf2(kdf1(chaining, public), exchange(identity.secret, public))
    static = message[_KEY : _KEY + _SEALED_KEY]
    return Claim(unseal(key, static, hashed), chaining, digest(hashed, static), public)


def prove(claimed: Claim, static_secret: bytes, message: bytes) -> tuple[bytes, State]:
    """The payload of the first message, and so that its sender holds the claimed key. Raises NotAuthentic."""
    chaining, key = kdf2(claimed.chaining, static_secret)
    sealed = message[_KEY + _SEALED_KEY :]
    payload = unseal(key, sealed, claimed.hashed)
    return payload, State(chaining, digest(claimed.hashed, sealed), claimed.ephemeral)


def respond(
    state: State, initiator: bytes, preshared: bytes, ephemeral: X25519PrivateKey, payload: bytes = b""
) -> tuple[bytes, Keys, bytes]:
    """The second message (ephemeral, payload), the keys, and the hash of all that was said. Raises LowOrderPoint."""
    assert isinstance(state.ephemeral, bytes)
    public = primitives.public_bytes(ephemeral)
    hashed = digest(state.hashed, public)
    chaining = kdf1(state.chaining, public)
    chaining = kdf1(chaining, exchange(ephemeral, state.ephemeral))
    chaining = kdf1(chaining, exchange(ephemeral, initiator))
    chaining, tau, key = kdf3(chaining, preshared)
    hashed = digest(hashed, tau)
    sealed = seal(key, payload, hashed)
    return public + sealed, Keys(*kdf2(chaining, b"")), digest(hashed, sealed)


def finish(identity: Identity, state: State, preshared: bytes, message: bytes) -> tuple[bytes, Keys, bytes]:
    """The second message's payload, the keys, and the hash of all that was said. Raises NotAuthentic, LowOrderPoint."""
    assert isinstance(state.ephemeral, X25519PrivateKey)
    public = message[:_KEY]
    hashed = digest(state.hashed, public)
    chaining = kdf1(state.chaining, public)
    chaining = kdf1(chaining, exchange(state.ephemeral, public))
    chaining = kdf1(chaining, exchange(identity.secret, public))
    chaining, tau, key = kdf3(chaining, preshared)
    hashed = digest(hashed, tau)
    sealed = message[_KEY:]
    payload = unseal(key, sealed, hashed)
    return payload, Keys(*kdf2(chaining, b"")), digest(hashed, sealed)
