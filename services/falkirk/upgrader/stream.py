"""A lifted stream: two ends, what each has sent that the other hasn't taken, and what follows from each event. PURE.

A stream lives in one slot and goes through three phases::

    DIALLING --connected--> HELD --opened--> OPEN --(both FINs passed | RST | idle | aborted)--> over
        \\--refused, timed out--> over   \\--never_opened, RST--> over

Each direction is independent (RFC 9293 3.6, half-closed connections): an end's FIN is passed once all that came before
it has been written to the other end. Nothing is read from an end while bytes of it wait for the other, so a stalled
peer parks its own stream only, and at most one read's worth of bytes lies here. Where they lie is the relay's business.

What an end is waited for, `interest`, is computed here and nowhere else. Two traps that it avoids: epoll reports
HUP and ERR even for an empty mask, level-triggered, and an end may well be HUP while it is parked (its FIN has come
and ours is sent, but its last bytes wait for the other end): so an empty mask is edge-triggered, which still tells of
a RST when it comes. And an end that is parked must not be read for HUP's sake: its bytes would overtake others.

Limit: urgent data (RFC 9293 3.8.5) passes as ordinary bytes, out of its urgency.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Generic, TypeVar

import msgspec

READ: Final = 0x1
"""EPOLLIN."""
WRITE: Final = 0x4
"""EPOLLOUT."""
EDGE: Final = 1 << 31
"""EPOLLET."""
PARKED: Final = EDGE
"""Tell of errors only, each once."""
DIALLED: Final = WRITE | EDGE
"""For a socket that connects; needs no change when it is connected: until it is opened, it is as good as parked."""

FIN_READ: Final = 1
"""Nothing more comes from an end, but what it sent before isn't all with the other one yet."""
FIN_PASSED: Final = 2

Handle = TypeVar("Handle")


class Phase(Enum):
    """How far a stream has come."""

    DIALLING = "dialling"
    """The upstream's handshake is under way."""
    HELD = "held"
    """The upstream is connected; the client's handshake is awaited."""
    OPEN = "open"
    """Both are connected."""


class Reason:
    """Why a stream is over, as `handover.Closed.reason` says it."""

    FINISHED: Final = "finished"
    CLIENT_RESET: Final = "client_reset"
    UPSTREAM_RESET: Final = "upstream_reset"
    IDLE: Final = "idle"
    ABORTED: Final = "aborted"
    NEVER_OPENED: Final = "never_opened"
    RELAY_ERROR: Final = "relay_error"


class Command(Enum):
    """What the relay must do after an event."""

    PASS_FIN = "pass_fin"
    """Shut the other end's sending side down."""
    FINISH = "finish"
    """Both FINs have passed with this one: close both ends in order."""


class End(msgspec.Struct, Generic[Handle], gc=False, eq=False):
    """One peer of a stream, and what it has sent. `handle` is the relay's own and isn't looked at here."""

    handle: Handle
    mask: int
    """What the handle is waited for at present."""
    waiting: int = 0
    """Bytes of this peer that were read and that the other end hasn't taken."""
    relayed: int = 0
    """Bytes of this peer that the other end took."""
    bulk: bool = False
    """The last read brought as much as it could: the next one is worth a pipe."""
    ended: int = 0
    """This peer's FIN: 0 awaited, `FIN_READ`, or `FIN_PASSED` to the other end."""


class Trace(msgspec.Struct, gc=False):
    """What spans of a sampled flow say."""

    flow_id: bytes
    span_id: bytes
    """Its root's."""
    since_ns: int
    """When the present phase began, wall clock."""


class Stream(msgspec.Struct, Generic[Handle], gc=False, eq=False):
    """A slot's stream, whose upstream is being dialled since `active`, for at most `timeout_s`. Times are monotonic seconds.

    There are very many, most of them idle: they have no header for the garbage collector, which finds no cycle in them.
    """

    slot: int
    upstream: End[Handle]
    active: float
    """When the present phase began, or bytes or a FIN last moved."""
    timeout_s: float
    """Seconds without activity after which the present phase is given up."""
    idle_s: int
    """The same, once it is open."""
    trace: Trace | None = None
    """Set where the flow is sampled."""
    phase: Phase = Phase.DIALLING
    client: End[Handle] | None = None
    due: int = -1
    """Where `deadlines` keeps it."""

    def connected(self, now: float, open_timeout_s: float) -> None:
        """The upstream's handshake is done: wait for the client's."""
        self.phase = Phase.HELD
        self.active = now
        self.timeout_s = open_timeout_s

    def opened(self, client: Handle, mask: int, now: float) -> None:
        """The client's handshake is done: bytes may move."""
        self.client = End(client, mask)
        self.phase = Phase.OPEN
        self.active = now
        self.timeout_s = self.idle_s

    def expires(self) -> float:
        """When the stream is over unless something moves before."""
        return self.active + self.timeout_s

    def expired(self) -> str:
        """The reason of a stream whose time is up (not for DIALLING, which ends as a failed dial)."""
        return Reason.IDLE if self.phase is Phase.OPEN else Reason.NEVER_OPENED

    def reset_by(self, end: End[Handle]) -> str:
        """The reason of a stream that this end's peer has reset."""
        return Reason.UPSTREAM_RESET if end is self.upstream else Reason.CLIENT_RESET

    def relayed(self) -> tuple[int, int]:
        """Payload bytes (up, down) that were passed on."""
        return (self.client.relayed if self.client is not None else 0), self.upstream.relayed


def interest(end: End[Handle], other: End[Handle]) -> int:
    """The epoll mask that `end`'s handle needs."""
    mask = 0
    if not end.ended and not end.waiting:
        mask = READ
    if other.waiting:
        mask |= WRITE
    return mask or PARKED


def took(end: End[Handle], other: End[Handle], offered: int, count: int) -> Command | None:
    """`other` took `count` of the `offered` bytes that `end` had sent; the rest waits."""
    end.relayed += count
    end.waiting = offered - count
    return _pass_fin(end, other)


def fin(end: End[Handle], other: End[Handle]) -> Command | None:
    """`end`'s FIN was read: nothing more comes from it."""
    end.ended = end.ended or FIN_READ
    return _pass_fin(end, other)


def _pass_fin(end: End[Handle], other: End[Handle]) -> Command | None:
    if end.ended != FIN_READ or end.waiting:
        return None
    end.ended = FIN_PASSED
    return Command.FINISH if other.ended == FIN_PASSED else Command.PASS_FIN
