"""What comes of a batch of datagrams or of time passing: packets, datagrams and events, for the owner of the sockets."""

from __future__ import annotations

from typing import Literal, NamedTuple

from falkirk.wireguard.handshake import Claim
from falkirk.wireguard.peer import Endpoint, Peer

EventKind = Literal["handshake", "moved", "silent", "expired", "unknown_key", "other_worker", "unknown_index"]


class Event(NamedTuple):
    """Something that its owner may want to act on or tell of.

    handshake       a session with `peer` is agreed and in use
    moved           `peer` was heard from a new `endpoint`
    silent          `peer` didn't answer for 90 s; what was kept for it is dropped
    expired         the last session with `peer` is too old to carry anything; its keys are gone
    unknown_key     `public_key` asked for a session from `endpoint` and is nobody's
    other_worker    `datagram` from `endpoint` is for the node's worker of number `worker`: an initiation, whose sender is in `claim`, or what says an index of its.
                    It isn't counted here
    unknown_index   `endpoint` sent data of a session that isn't here: of a predecessor of this process, for instance. Not authenticated
    """

    kind: EventKind
    peer: Peer | None = None
    endpoint: Endpoint | None = None
    public_key: bytes = b""
    datagram: bytes = b""
    worker: int = 0
    claim: Claim | None = None


class Arrivals:
    """Filled by any number of `Node.receive` and `Node.poll`, then delivered and cleared by the owner."""

    __slots__ = ("datagrams", "events", "packets")

    def __init__(self) -> None:
        self.packets: dict[Peer, list[bytes]] = {}
        """Whole IP packets without padding, in the order of their arrival; their source is one that the peer may use."""
        self.datagrams: list[tuple[Endpoint, bytes]] = []
        """To be sent."""
        self.events: list[Event] = []

    def clear(self) -> None:
        """Empty it for the next batch."""
        self.packets.clear()
        self.datagrams.clear()
        self.events.clear()
