"""The last steps of a forwarded packet: a hop less, and into the other tunnel as that one takes it.

What goes in lies at byte 10 of a buffer, behind a virtio-net header that is true and normal. A `vnet` tunnel gets it as it is, super-packets too;
a `raw` one gets plain packets with complete checksums (`falkirk.wire.segment`). What is too large is cut into fragments where that is
allowed: IPv4 without DF, or what came in fragments itself (`falkirk.flow.fragments`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.flow.counters import FORWARDED
from falkirk.flow.passages import ForwardFlow, Remote, may_be_cut, size_on_the_wire
from falkirk.flow.siblings import PACKET, Carrier
from falkirk.flow.table import Tunnel
from falkirk.wire import vnet
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads, rebuild
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse
from falkirk.wire.segment import segments
from falkirk.wire.tcp import clamp_segment_size

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER: Final = 10


class Carriage:
    """Of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def hop(self, to: Tunnel | Remote, lane: Lane | Carrier, end: int) -> None:
        """Take a hop and send."""
        buffer = lane.buffer
        if buffer[10] >> 4 == 4:
            buffer[18] -= 1
            # RFC 1624: the checksum is the complement of a sum that has one less in its TTL, the low byte of a native word.
            lane.words[10] = (lane.words[10] + 1) % 0xFFFF
        else:
            buffer[17] -= 1
        if self.send(to, lane.view, end):
            self._worker.counts[FORWARDED] += 1

    def send(self, to: Tunnel | Remote, view: memoryview, end: int) -> bool:
        """Send the packet at [10, end) as its tunnel takes it; where not all of it went, False, and counted once."""
        worker = self._worker
        if isinstance(to, Remote):
            return bool(to.link.packet(PACKET, to.number, worker.fragments.largest, view[:end]))
        deliver = worker.tunnels.deliver
        plain = not view[0] and not view[1]
        largest = worker.fragments.largest
        if plain and end - HEADER > (min(to.mtu, largest) if largest else to.mtu):
            return worker.fragments.say(to, view[HEADER:end].tobytes(), largest)
        if to.framing is Framing.VNET and size_on_the_wire(view, end) <= to.mtu:
            return deliver(to, view[:end])
        if plain:
            return deliver(to, view[HEADER:end])
        parts = segments(vnet.unpack(view, 0, end), view, HEADER, end - HEADER)
        if to.framing is Framing.RAW and len(parts[0]) <= to.mtu:
            return all(deliver(to, part) for part in parts)
        return all(worker.fragments.say(to, part) for part in parts)

    def rebuild(self, heads: Heads, lane: Lane | Carrier, l4: int, end: int) -> int:
        """Lift a datagram to its payload and lower that again, in place; its new end, or 0 where it was dropped, and counted."""
        try:
            return rebuild(lane.buffer, HEADER, l4, end, heads)
        except MalformedPacket as error:
            self._worker.drop(error.reason)
            return 0

    def fits(self, tunnel: Tunnel, lane: Lane | Carrier, end: int, mtu: int) -> bool:
        """Whether the packet may go on to a tunnel of this MTU; its sender is told where not."""
        if end - HEADER <= mtu or size_on_the_wire(lane.view, end) <= mtu or may_be_cut(lane.view):
            return True
        if self._worker.fragments.largest:
            return True  # Whoever sent it in fragments gets them sent on, IPv6 too.
        data = bytes(lane.view[:end])
        self._worker.answers.too_big(tunnel, data, parse(data, HEADER, end - HEADER), mtu)
        return False

    @staticmethod
    def clamp(flow: ForwardFlow, buffer: bytearray, l4: int, end: int) -> None:
        """Let a SYN offer no larger segments than both tunnels take, so that a connection needs no path MTU discovery between them."""
        to = flow.to
        mtu = min(flow.tunnel.mtu, to.mtu) if to is not None else flow.tunnel.mtu
        headers = 40 if flow.family == 4 else 60
        clamp_segment_size(buffer, l4, end, mtu - headers, partial=bool(buffer[0] & 1))
