"""mac1, mac2 and cookies (5.4.4, 5.4.7): who doesn't know our key gets no answer, and under load who can't receive at its address neither.

A cookie is the MAC of the sender's address under a secret that changes every two minutes; the one before is still taken, so that a
cookie is good for two minutes at least, as its receiver believes.

XChaCha20's nonce must not repeat under a key; it needn't be random. Here its first 16 bytes are random once a secret's life and the other 8
count, so that a reply under a flood costs an AEAD and not a HChaCha20 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from falkirk.wireguard.messages import (
    COOKIE,
    COOKIE_SIZE,
    HEADER,
    MAC_OFFSETS,
    MAC_SIZE,
    NO_MAC,
    NONCE_SIZE,
)
from falkirk.wireguard.primitives import NotAuthentic, digest, hchacha20, mac, same, xunseal

COOKIE_SECONDS: Final = 120.0
"""How long a secret makes cookies, and how long a received cookie is used."""
_MAC1_LABEL: Final = b"mac1----"
_COOKIE_LABEL: Final = b"cookie--"
_BODY: Final = 8


def mac1_key(public: bytes) -> bytes:
    """The key of mac1 for messages to whoever has this public key."""
    return digest(_MAC1_LABEL, public)


def cookie_key(public: bytes) -> bytes:
    """The key of cookie replies from whoever has this public key."""
    return digest(_COOKIE_LABEL, public)


def sign(message: bytes, key: bytes, cookie: bytes) -> bytes:
    """A handshake message without macs -> with both; mac2 is zero where there is no cookie."""
    signed = message + mac(key, message)
    return signed + (mac(cookie, signed) if cookie else NO_MAC)


def source_of(endpoint: tuple[Any, ...]) -> bytes:
    """An endpoint as what a cookie is bound to: address and port, in no form that leaves here."""
    return f"{endpoint[0]} {endpoint[1]}".encode()


class Checker:
    """The macs of messages to one static key, and its cookie replies."""

    def __init__(self, public: bytes, rng: Callable[[int], bytes]) -> None:
        self._rng = rng
        self._mac1_key = mac1_key(public)
        self._cookie_key = cookie_key(public)
        self._secret = self._before = b""
        self._made = -COOKIE_SECONDS
        self._prefix = b""
        self._cipher: ChaCha20Poly1305 | None = None
        self._count = 0

    def mac1_holds(self, message: bytes, kind: int) -> bool:
        """Whether the sender of an initiation or response knows our public key."""
        at = MAC_OFFSETS[kind]
        return same(mac(self._mac1_key, message[:at]), message[at : at + MAC_SIZE])

    def mac2_holds(self, message: bytes, endpoint: tuple[Any, ...], now: float) -> bool:
        """Whether the sender had a cookie for this endpoint from us within the last two to four minutes."""
        self._turn(now)
        at = MAC_OFFSETS[message[0]] + MAC_SIZE
        source = source_of(endpoint)
        return any(
            secret and same(mac(mac(secret, source), message[:at]), message[at : at + MAC_SIZE])
            for secret in (self._secret, self._before)
        )

    def reply(self, message: bytes, endpoint: tuple[Any, ...], now: float) -> bytes:
        """The cookie reply to an initiation or response whose mac1 holds."""
        self._turn(now)
        cipher = self._cipher
        assert cipher is not None
        at = MAC_OFFSETS[message[0]]
        suffix = self._count.to_bytes(8, "little")
        self._count += 1
        cookie = mac(self._secret, source_of(endpoint))
        sealed = cipher.encrypt(bytes(4) + suffix, cookie, message[at : at + MAC_SIZE])
        # The receiver is whoever sent the message, in its own words.
        return HEADER.pack(COOKIE, int.from_bytes(message[4:8], "little")) + self._prefix + suffix + sealed

    def _turn(self, now: float) -> None:
        """A new secret, where the last has made cookies long enough."""
        age = now - self._made
        if age >= COOKIE_SECONDS:
            # A secret that nobody has used for so long has no cookies left that its receivers would still use.
            self._before = self._secret if age < 2 * COOKIE_SECONDS else b""
            self._secret = self._rng(32)
            self._prefix = self._rng(16)
            self._cipher = ChaCha20Poly1305(hchacha20(self._cookie_key, self._prefix))
            self._count = 0
            self._made = now


def open_reply(message: bytes, key: bytes, mac1: bytes) -> bytes:
    """The cookie in a cookie reply to our message with that mac1, `key` being its sender's. Raises NotAuthentic."""
    if len(message) != COOKIE_SIZE or not mac1:
        raise NotAuthentic
    nonce = message[_BODY : _BODY + NONCE_SIZE]
    return xunseal(key, nonce, message[_BODY + NONCE_SIZE :], mac1)
