"""Fragments that wait for the rest of their packet. PURE.

Nothing may overlap (RFC 8200 4.5 and RFC 5722 4, kept for IPv4 as well): a packet of which two fragments claim the same bytes is given
up with all its fragments, those still to come included, since what policy sees and what the receiver would see could differ.
So the holes of RFC 815 need no list: they are closed when the lengths add up. One exception: a fragment that is in all its data
like one that is there is a duplicate, which networks make; it is absorbed, as RFC 8200 4.5 allows.

What waits costs memory that a sender needs nothing for, so it is limited (RFC 8900 3.2, 5):

- a tunnel: by bytes, and by packets. At either limit it loses its own oldest packet, never another tunnel's;
- the worker: a tunnel may hold at most a quarter of what is left, so that many greedy tunnels leave room for one more;
- a packet: by fragments; 128 are enough for 65,535 bytes at the smallest MTU that everybody must take (RFC 791, 576);
- time: 15 seconds, the least that RFC 791 3.2 thinks of. RFC 8200 4.5 gives up after 60 and RFC 1122 3.3.2 speaks of 60 to 120, for paths
  through a whole internet; a device's fragments come in one burst through its own tunnel, and with IPv4 the sixteen bits
  of identification come round again: what waits longer may meet another packet's fragments (RFC 4963 2, RFC 6864 4.3).

Bytes are counted with what the objects cost, so that tiny fragments aren't cheaper than they are.

Events in, commands out: `take` says what has become of the fragment and of those that waited for it; each fragment ends as part of
a whole packet, or dropped with a reason, or expired, exactly once.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from typing import Final, NamedTuple

from falkirk.wire.fragments import Piece, assemble
from falkirk.wire.malformed import MalformedPacket

FRAGMENTS: Final = 128
"""Of one packet."""
PIECE_COST: Final = 256
"""Bytes of memory that a fragment takes besides its own."""
PACKET_COST: Final = 1024
"""Bytes of memory that a packet takes besides its fragments, or its name alone where it was given up."""
SHARE: Final = 4
"""A tunnel may hold the free bytes divided by this."""

REASONS: Final = (
    "fragment_overlap",
    "fragment_past_end",
    "fragment_duplicate",
    "fragment_too_many",
    "fragment_memory",
    "fragment_packets",
    "fragment_timeout",
)
"""Why fragments that are right by themselves are dropped."""


@dataclass(frozen=True)
class Limits:
    """Bytes of a worker and of a tunnel, packets that wait of a tunnel, seconds that one waits."""

    worker_bytes: int
    tunnel_bytes: int
    tunnel_packets: int
    seconds: int


class Whole(NamedTuple):
    """A packet that was put together."""

    packet: bytes
    fragments: int
    """How many there were."""
    largest: int
    """Bytes of the largest of them: what the sender thought that the path takes."""


class Taken(NamedTuple):
    """What `take` came to. A fragment that is neither part of a whole packet nor refused waits."""

    whole: Whole | None
    refused: str
    """Why this fragment is dropped; empty where it isn't."""
    dropped: tuple[tuple[str, int], ...]
    """(reason, fragments) of those that waited and no longer do."""


class Expired(NamedTuple):
    """A packet whose time was up."""

    tunnel: int
    first: bytes | None
    """Its first fragment, where that had come: RFC 792 and RFC 4443 3.3 answer only then."""
    fragments: int


class _Packet:
    """One that isn't whole yet, or that was given up (`refused`)."""

    __slots__ = ("bytes", "cost", "deadline", "pieces", "refused", "starts", "total")

    def __init__(self, deadline: int) -> None:
        self.deadline = deadline
        self.pieces: dict[int, Piece] = {}
        self.starts: list[int] = []
        self.total: int | None = None
        """Where the last fragment ends, once that is known."""
        self.bytes = 0
        """Of data."""
        self.cost = PACKET_COST
        """Of memory."""
        self.refused = ""


class _Tunnel:
    """What waits of one tunnel, oldest first."""

    __slots__ = ("bytes", "packets")

    def __init__(self) -> None:
        self.bytes = 0
        self.packets: dict[bytes, _Packet] = {}


class Reassembly:
    """What waits in one worker. Time is an argument, in whole monotonic seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tunnels: dict[int, _Tunnel] = {}
        # In the order of their deadlines, since all wait equally long.
        self._order: dict[tuple[int, bytes], _Packet] = {}
        self.bytes = 0
        """Of memory that is held."""
        self.waiting = 0
        """Fragments."""

    def take(self, number: int, piece: Piece, now: int) -> Taken:
        """A fragment from a tunnel."""
        tunnel = self._tunnels.get(number) or _Tunnel()
        dropped: list[tuple[str, int]] = []
        packet = tunnel.packets.get(piece.key)
        if packet is None:
            if len(tunnel.packets) >= self._limits.tunnel_packets:
                self._give_up_oldest(number, tunnel, "fragment_packets", dropped)
            if not self._room(number, tunnel, PACKET_COST, None, dropped):
                return Taken(None, "fragment_memory", tuple(dropped))
            self._tunnels[number] = tunnel
            packet = tunnel.packets[piece.key] = _Packet(now + self._limits.seconds)
            self._order[number, piece.key] = packet
            self._charge(tunnel, PACKET_COST)
        refusal = packet.refused or self._refusal(packet, piece)
        if refusal == "fragment_duplicate" or packet.refused:
            return Taken(None, refusal, tuple(dropped))
        cost = len(piece.packet) + PIECE_COST
        if not refusal and not self._room(number, tunnel, cost, packet, dropped):
            refusal = "fragment_memory"
        if refusal:
            if packet.pieces:
                dropped.append((refusal, len(packet.pieces)))
            self._refuse(tunnel, packet, refusal)
            return Taken(None, refusal, tuple(dropped))
        at = bisect(packet.starts, piece.offset)
        packet.starts.insert(at, piece.offset)
        packet.pieces[piece.offset] = piece
        packet.bytes += piece.end - piece.offset
        if not piece.more:
            packet.total = piece.end
        packet.cost += cost
        self._charge(tunnel, cost)
        self.waiting += 1
        if packet.bytes != packet.total:
            return Taken(None, "", tuple(dropped))
        self._forget(number, tunnel, piece.key)
        pieces = [packet.pieces[start] for start in packet.starts]
        try:
            whole = assemble(pieces)
        except MalformedPacket as error:
            if len(pieces) > 1:
                dropped.append((error.reason, len(pieces) - 1))
            return Taken(None, error.reason, tuple(dropped))
        return Taken(Whole(whole, len(pieces), max(len(each.packet) for each in pieces)), "", tuple(dropped))

    def expire(self, now: int) -> list[Expired]:
        """Give up what has waited too long."""
        due = []
        for at, packet in self._order.items():
            if packet.deadline > now:
                break
            due.append((at, packet))
        expired = []
        for (number, key), packet in due:
            first = packet.pieces.get(0)
            if packet.pieces:
                expired.append(Expired(number, first.packet if first is not None else None, len(packet.pieces)))
            self._forget(number, self._tunnels[number], key)
        return expired

    def close(self, number: int) -> int:
        """Forget a tunnel; how many of its fragments waited."""
        tunnel = self._tunnels.get(number)
        if tunnel is None:
            return 0
        before = self.waiting
        for key in list(tunnel.packets):
            self._forget(number, tunnel, key)
        return before - self.waiting

    @staticmethod
    def _refusal(packet: _Packet, piece: Piece) -> str:
        """Why the packet can't be put together with this piece; empty where it can."""
        same = packet.pieces.get(piece.offset)
        if same is not None:
            alike = same.end == piece.end and same.more == piece.more and same.data == piece.data
            return "fragment_duplicate" if alike else "fragment_overlap"
        starts = packet.starts
        at = bisect(starts, piece.offset)
        if at and packet.pieces[starts[at - 1]].end > piece.offset:
            return "fragment_overlap"
        if at < len(starts) and piece.end > starts[at]:
            return "fragment_overlap"
        if packet.total is not None:
            # Only what isn't the last may still come, and it ends before the last begins.
            if not piece.more or piece.end > packet.total:
                return "fragment_past_end"
        elif not piece.more and at < len(starts):
            return "fragment_past_end"
        return "fragment_too_many" if len(starts) >= FRAGMENTS else ""

    def _room(
        self, number: int, tunnel: _Tunnel, cost: int, keep: _Packet | None, dropped: list[tuple[str, int]]
    ) -> bool:
        """Make room in the tunnel's share, at the cost of its oldest packets but `keep`."""
        limits = self._limits
        while tunnel.bytes + cost > min(limits.tunnel_bytes, (limits.worker_bytes - self.bytes) // SHARE):
            if not any(packet is not keep for packet in tunnel.packets.values()):
                return False
            self._give_up_oldest(number, tunnel, "fragment_memory", dropped, keep)
        return True

    def _give_up_oldest(
        self,
        number: int,
        tunnel: _Tunnel,
        reason: str,
        dropped: list[tuple[str, int]],
        keep: _Packet | None = None,
    ) -> None:
        key, packet = next(item for item in tunnel.packets.items() if item[1] is not keep)
        if packet.pieces:
            dropped.append((reason, len(packet.pieces)))
        self._forget(number, tunnel, key)

    def _refuse(self, tunnel: _Tunnel, packet: _Packet, reason: str) -> None:
        """Let its pieces go but remember its name, so that those still to come are dropped as well."""
        self._charge(tunnel, PACKET_COST - packet.cost)
        self.waiting -= len(packet.pieces)
        packet.cost = PACKET_COST
        packet.pieces.clear()
        packet.starts.clear()
        packet.refused = reason

    def _forget(self, number: int, tunnel: _Tunnel, key: bytes) -> None:
        packet = tunnel.packets.pop(key)
        del self._order[number, key]
        self._charge(tunnel, -packet.cost)
        self.waiting -= len(packet.pieces)
        if not tunnel.packets:
            self._tunnels.pop(number, None)

    def _charge(self, tunnel: _Tunnel, cost: int) -> None:
        tunnel.bytes += cost
        self.bytes += cost
