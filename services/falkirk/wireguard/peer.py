"""What is known of a peer, and when something is due for it (section 6).

Its timers are times in slots, INF where nothing is due; `due` is the earliest. They are set by what happens and looked at by
`Node.poll`, so that a packet costs no timer:

    retry           a data packet was sent and nothing came back for 15 s       -> a new handshake                 (6.2 to 6.5)
    keepalive       a data packet came and nothing was sent for 10 s            -> an empty packet                 (6.5)
    persistent      nothing at all passed for `keepalive_seconds`               -> an empty packet
    pending.due     an initiation wasn't answered for 5 s                       -> another, for 90 s               (6.4)
    forget          the replaced session isn't needed for stragglers any more   -> its keys are dropped
    erase           180 s since the last handshake: no session can carry more   -> all keys are dropped            (6.3 allows 540 s)
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from falkirk.wireguard.allowed import Allowed
from falkirk.wireguard.handshake import State
from falkirk.wireguard.session import Session

INF: Final = float("inf")
_NEVER: Final = -INF
REKEY_TIMEOUT: Final = 5.0
REKEY_ATTEMPT_SECONDS: Final = 90.0
KEEPALIVE_TIMEOUT: Final = 10.0
STRAGGLER_SECONDS: Final = 10.0
"""How long the session before stays once its peer uses the new one; networks reorder by less."""
COOKIE_SECONDS: Final = 120.0

Endpoint = tuple[Any, ...]
"""A socket address as the socket gives it: address, port, and what else the family has."""


class Pending(NamedTuple):
    """An initiation of ours that waits for its response."""

    local: int
    """Our index."""
    state: State
    since: float
    """When the first of its attempts was sent."""
    due: float
    """When the next one is."""


class Peer:
    """One public key. Its owner may set `owner`, and reads the rest."""

    __slots__ = (
        "allowed",
        "armed",
        "consumed_at",
        "cookie",
        "cookie_at",
        "current",
        "endpoint",
        "erase",
        "forget",
        "handshake_at",
        "handshake_wall_ns",
        "initiated_at",
        "keepalive",
        "keepalive_again",
        "keepalive_seconds",
        "last_mac1",
        "next",
        "owner",
        "passed_at",
        "pending",
        "preshared",
        "previous",
        "public_key",
        "queue",
        "received_at",
        "retry",
        "rx_bytes",
        "rx_packets",
        "static_secret",
        "timestamp",
        "tx_bytes",
        "tx_packets",
    )

    def __init__(
        self, public_key: bytes, preshared: bytes, allowed: Allowed, keepalive_seconds: float, endpoint: Endpoint | None
    ) -> None:
        self.public_key: Final = public_key
        self.preshared = preshared
        self.allowed = allowed
        """The inner addresses that it may send from; may be replaced at any time."""
        self.keepalive_seconds = keepalive_seconds
        """The longest silence to it, to keep a NAT on the way open; 0: any."""
        self.endpoint = endpoint
        """Where it was last heard from, by an authenticated packet."""
        self.owner: Any = None
        """Whatever the engine's owner keeps for this peer."""

        self.static_secret = b""
        """DH of both static keys; made at its first handshake."""
        self.timestamp = b""
        """The greatest of its initiations'; a replay has one that isn't greater."""
        self.pending: Pending | None = None
        self.current: Session | None = None
        self.previous: Session | None = None
        self.next: Session | None = None
        """Answered by us, not used by the peer yet."""
        self.queue: list[bytes] | None = None
        """Packets that wait for a session."""
        self.last_mac1 = b""
        """Of our last handshake message; a cookie reply is bound to it."""
        self.cookie = b""
        self.cookie_at = _NEVER

        self.initiated_at = _NEVER
        """Our last initiation or response."""
        self.consumed_at = _NEVER
        """Its last initiation."""
        self.passed_at = _NEVER
        """The last message either way, keepalives and handshakes included."""
        self.received_at = _NEVER
        """The last authenticated message from it."""
        self.retry = INF
        self.keepalive = INF
        self.keepalive_again = False
        """More came since the keepalive that is due was set."""
        self.forget = INF
        self.erase = INF
        self.armed = INF
        """The time of its entry in the node's heap."""

        self.handshake_at = _NEVER
        """When a session with it was last agreed and used."""
        self.handshake_wall_ns = 0
        """The same in wall time, nanoseconds since 1970; 0: never."""
        self.rx_bytes = 0
        """Of inner packets that were delivered."""
        self.rx_packets = 0
        self.tx_bytes = 0
        """Of inner packets that were sent, without padding."""
        self.tx_packets = 0

    @property
    def due(self) -> float:
        """When a timer is due, INF for never."""
        earliest = min(self.retry, self.keepalive, self.forget, self.erase)
        if self.pending is not None and self.pending.due < earliest:
            earliest = self.pending.due
        if self.keepalive_seconds:
            persistent = self.passed_at + self.keepalive_seconds
            if persistent < earliest:
                earliest = persistent
        return earliest

    def sessions(self) -> list[Session]:
        """Those there are, the oldest first."""
        return [session for session in (self.previous, self.current, self.next) if session is not None]

    def usable(self, now: float) -> bool:
        """Whether a packet could leave for it at once."""
        return self.current is not None and not self.current.expired(now)
