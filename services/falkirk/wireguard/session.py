"""A pair of keys that a handshake came to, its counters and its window (5.4.5, 5.4.6).

A session may send for `REJECT_AFTER_SECONDS` and `REJECT_AFTER_MESSAGES`, whichever is first, and its initiator makes a new one
before that. Its ciphers are made when they are needed, kept once it carries packets, and dropped when it rests: they are 4.5 kB, the session itself is 0.4. So
sessions that carry nothing but keepalives never have any, and ten thousand devices that come back at once don't have them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from falkirk.wireguard.handshake import Keys
from falkirk.wireguard.replay import Window

if TYPE_CHECKING:
    from falkirk.wireguard.peer import Peer

REKEY_AFTER_MESSAGES: Final = 1 << 60
REJECT_AFTER_MESSAGES: Final = (1 << 64) - (1 << 13) - 1
REKEY_AFTER_SECONDS: Final = 120.0
REJECT_AFTER_SECONDS: Final = 180.0

Cipher = Callable[..., bytes]
"""encrypt or decrypt of an AEAD: (nonce, data, associated data)."""


class Session:
    """One direction each way. `local` is our index, which the peer's messages carry; `remote` is the peer's."""

    __slots__ = (
        "counter",
        "created",
        "initiator",
        "last_minute",
        "local",
        "open",
        "peer",
        "receive_key",
        "remote",
        "seal",
        "send_key",
        "used",
        "window",
    )

    def __init__(self, peer: Peer, local: int, remote: int, keys: Keys, *, initiator: bool, created: float) -> None:
        self.peer = peer
        self.local = local
        self.remote = remote
        self.initiator = initiator
        self.created = created
        """Monotonic seconds."""
        self.send_key, self.receive_key = keys if initiator else keys[::-1]
        self.counter = 0
        """Of the next message that we send; a counter is never used twice."""
        self.window = Window()
        self.seal: Cipher | None = None
        self.open: Cipher | None = None
        self.used = created
        """When it last carried something, roughly: a session that isn't used drops its ciphers."""
        self.last_minute = False
        """A new handshake was asked for because this session ends soon while it only receives."""

    def sealer(self) -> Cipher:
        """A sending cipher."""
        return ChaCha20Poly1305(self.send_key).encrypt

    def opener(self) -> Cipher:
        """A receiving cipher."""
        return ChaCha20Poly1305(self.receive_key).decrypt

    def rest(self) -> None:
        """Drop the ciphers until they are needed again."""
        self.seal = self.open = None

    def expired(self, now: float) -> bool:
        """Whether it may carry nothing any more."""
        return now - self.created >= REJECT_AFTER_SECONDS
