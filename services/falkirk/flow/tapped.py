"""Lanes as they are while somebody captures: each way in shows the packet to the worker's taps, before and after it has gone its way.

They have no state of their own, so a lane becomes one, and turns back, by its class alone. Packets of tunnels that nobody watches pass as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.flow import captured
from falkirk.flow.coalesce import Run
from falkirk.flow.lane import HEADER, ZERO_HEADER, Lane
from falkirk.flow.raw import RawLane
from falkirk.flow.table import IPV6, TcpLift, Tunnel
from falkirk.wire.protocol import TCP

if TYPE_CHECKING:
    from falkirk.flow.taps import Packet, Taps


class TappedLane(Lane):
    """Packets in the lane's own buffer."""

    @property
    def taps(self) -> Taps:
        """Those of the worker."""
        return self.worker.taps

    def up(self, tunnel: Tunnel, end: int) -> None:
        """A packet from a tunnel."""
        taps = self.taps
        if taps.passing is not None or not taps.watched(tunnel):
            # The slow path gives packets back to the fast one: it is the same packet.
            return super().up(tunnel, end)
        came = (self.view[:HEADER].tobytes(), self.view[HEADER:end].tobytes())
        self.taps.follow(
            captured.TUNNEL, tunnel, None, [came], lambda: super(TappedLane, self).up(tunnel, end), self.ready
        )
        return None

    def _down(self, end: int) -> None:
        """A packet from the private namespace's kernel."""
        packet = self.view[HEADER:end].tobytes()
        flow = self.flow_below(packet)
        tunnel = flow.tunnel if flow is not None else None
        if self.taps.passing is not None or not self.taps.watched(tunnel):
            return super()._down(end)
        came = (self.view[:HEADER].tobytes(), packet)
        self.taps.follow(captured.NAMESPACE, tunnel, flow, [came], lambda: super(TappedLane, self)._down(end))
        return None

    def put(self, packet: bytes) -> None:
        """A packet that somebody else than the lane has made."""
        super().put(packet)
        self.taps.put(packet)

    def flow_below(self, packet: bytes) -> TcpLift | None:
        """The flow of a packet from the private namespace, by its slot's address and its port."""
        if len(packet) >= 40 and packet[0] == 0x45 and packet[9] == TCP:
            at, port_at, family = 17, 22, 0
        elif len(packet) >= 60 and packet[0] >> 4 == 6 and packet[6] == TCP:
            at, port_at, family = 37, 42, IPV6
        else:
            return None
        index = int.from_bytes(packet[at : at + 3], "big") - self.slot_base
        flow = self.flows[index] if 0 <= index < len(self.flows) else None
        port = int.from_bytes(packet[port_at : port_at + 2], "little") | family
        return flow if flow is not None and flow.port == port else None


class TappedRawLane(TappedLane, RawLane):
    """Packets in the arenas: what is joined, or leaves as one datagram, was several packets when it came."""

    def plain(self, flow: TcpLift, at: int, size: int, ip_checksum: int, checksum: int) -> None:
        """A segment that goes on by itself."""
        if not self.taps.watched(flow.tunnel):
            return super().plain(flow, at, size, ip_checksum, checksum)

        def go() -> None:
            super(TappedRawLane, self).plain(flow, at, size, ip_checksum, checksum)
            self.settle()

        came = self._arena_packet(at, size)
        self.taps.follow(captured.TUNNEL, flow.tunnel, flow, [came], go, lambda: self._arena_packet(at, size))
        return None

    def joined(self, run: Run) -> None:
        """Several that go on as one."""
        flow = run.flow
        if not self.taps.watched(flow.tunnel):
            return super().joined(run)
        *places, last = run.places
        came = [*(self._arena_packet(at, run.size) for at in places), self._arena_packet(last, run.last)]

        def below() -> Packet:
            head = run.headers(self._arena, flow.forward)
            return head[:HEADER], head[HEADER:] + b"".join(packet[run.header :] for _, packet in came)

        def go() -> None:
            super(TappedRawLane, self).joined(run)
            self.settle()

        self.taps.follow(captured.TUNNEL, flow.tunnel, flow, came, go, below)
        return None

    def datagrams(self, at: int, end: int) -> tuple[int, int]:
        """UDP packets, each to be looked at by itself."""
        return (at, 0) if self.taps.watched(self._tunnel) else super().datagrams(at, end)

    def bad(self, at: int, size: int) -> None:
        """One whose payload isn't what was sent."""
        tunnel = self._tunnel
        if not self.taps.watched(tunnel):
            return super().bad(at, size)
        came = self._arena_packet(at, size)
        self.taps.follow(captured.TUNNEL, tunnel, None, [came], lambda: super(TappedRawLane, self).bad(at, size))
        return None

    def _down_at(self, at: int, size: int) -> None:
        """A packet from the private namespace's kernel, in its place."""
        packet = self._down_view[at : at + size].tobytes()
        flow = self.flow_below(packet)
        if flow is None or not self.taps.watched(flow.tunnel):
            # A flow's or nobody's: the latter comes by `_down`.
            return super()._down_at(at, size)
        came = (ZERO_HEADER, packet)
        self.taps.follow(
            captured.NAMESPACE, flow.tunnel, flow, [came], lambda: super(TappedRawLane, self)._down_at(at, size)
        )
        return None

    def _arena_packet(self, at: int, size: int) -> Packet:
        return ZERO_HEADER, self._arena_view[at : at + size].tobytes()


TAPPED: Final[dict[type[Lane], type[Lane]]] = {Lane: TappedLane, RawLane: TappedRawLane}
