"""The slow path in: packets that don't belong to an established flow, or that need a closer look.

Order of a packet's tests: is it well formed; does it come from an address of its device; is its TTL left; is it whole; is it
TCP; is its virtio-net header true; does a flow know it; and, for a SYN, route, rule, limits. What fails is answered as a router
or a host would, or dropped, and counted either way. A fragment waits for its packet (`falkirk.flow.fragments`), which comes this
way anew.

IP options and IPv6 extension headers are checked by the parser and then taken off: a lifted packet ends here as an IP
packet, and nothing of them may reach the private namespace's kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.flow.decision import Decision, Outcome, authorise, resolve
from falkirk.flow.segments import ACK, FIN, RST, SYN
from falkirk.flow.table import TcpLift, Tunnel
from falkirk.wire import ipv4, vnet
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.protocol import TCP, UDP

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER: Final = 10
HEADERS: Final = 1024
"""Virtio-net headers that are shared by flows."""
MEMO: Final = 65536
"""Decisions that a tunnel remembers; beyond, it starts over."""


class Ingress:
    """Slow path of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._headers: dict[bytes, bytes] = {}
        """Virtio-net headers that flows refer to."""

    def packet(self, lane: Lane, tunnel: Tunnel, end: int) -> None:
        """A packet at [10, end) of the lane's buffer."""
        worker = self._worker
        if tunnel.passages and worker.forward.known(lane, tunnel, end):
            return
        if end <= HEADER:
            worker.drop("vnet_too_short")
            return
        try:
            packet = parse(lane.buffer, HEADER, end - HEADER, fragments=True)
            if packet.total_length != end - HEADER:
                raise MalformedPacket("bad_total_length")
        except MalformedPacket as error:
            # No IP version and no virtio-net header begins like JSON.
            second = lane.buffer[HEADER if lane.raw else 0] == ord("{")
            worker.drop("second_context" if second else error.reason)
            return
        if packet.source not in tunnel.context.addresses and not (
            worker.forward.expects(tunnel, lane, packet) or worker.lowering.expects(tunnel, lane, packet)
        ):
            worker.drop("spoofed_source")
        elif packet.ttl < 2:
            worker.answers.time_exceeded(tunnel, lane, packet)
        elif packet.is_fragment:
            if self._other_vnet(lane, tunnel, packet):
                worker.fragments.take(lane, tunnel, packet)
        elif worker.forward.packet(lane, tunnel, packet, end):
            return
        elif packet.protocol == TCP:
            self._tcp(lane, tunnel, packet, end)
        elif not self._other_vnet(lane, tunnel, packet):
            return
        elif packet.protocol == UDP:
            worker.udp.packet(lane, tunnel, packet, end)
        elif packet.is_icmp_error:
            worker.errors.from_tunnel(lane, tunnel, packet)
        elif packet.icmp_type >= 0:
            worker.echo.packet(lane, tunnel, packet, end)
        else:
            worker.answers.not_built(tunnel, lane, packet, "protocol_not_built")

    def vnet(self, lane: Lane, flow: TcpLift, l4: int, end: int) -> bool:
        """Whether the virtio-net header tells the truth about the segment; counted where not. The tunnel's word is not trusted."""
        header = lane.view[:HEADER].tobytes()
        if self._vnet(lane, flow.tunnel, l4, end, 4 if l4 == 30 else 6):
            if not lane.buffer[1]:
                # Not a super-packet: no header length, as the kernel writes it itself. A later segment with the same virtio-net header
                # may have a shorter TCP header, and the device refuses a length beyond the packet.
                lane.buffer[2:4] = b"\0\0"
            # Most flows have the same two: one copy of each is kept.
            put = lane.view[:HEADER].tobytes()
            if len(self._headers) >= HEADERS:
                self._headers.clear()
            flow.vnet_ok = self._headers.setdefault(header, header)
            flow.vnet_put = self._headers.setdefault(put, put)
            return True
        return False

    def _vnet(self, lane: Lane, tunnel: Tunnel, l4: int, end: int, version: int) -> bool:
        if lane.raw:
            return True
        try:
            admit = vnet.admit_tcp4 if version == 4 else vnet.admit_tcp6
            admit(lane.buffer, 0, end, l4 - HEADER, tunnel.mtu)
        except MalformedPacket as error:
            self._worker.drop(error.reason)
            return False
        return True

    def _other_vnet(self, lane: Lane, tunnel: Tunnel, packet: Packet) -> bool:
        """The same for what isn't TCP, or a fragment of anything."""
        if lane.raw:
            return True
        try:
            vnet.validate(vnet.unpack(lane.buffer, 0, HEADER), packet, tunnel.mtu)
        except MalformedPacket as error:
            self._worker.drop(error.reason)
            return False
        return True

    def normal(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> bool:
        """Whether the virtio-net header is true of a packet that goes on as it is; it is in its normal form then. Counted where not."""
        if lane.raw:
            return True
        try:
            header = vnet.validate(vnet.unpack(lane.buffer, 0, end), packet, tunnel.mtu)
        except MalformedPacket as error:
            self._worker.drop(error.reason)
            return False
        # As in `vnet`: a header length where nothing is to be cut may be beyond a later packet's end.
        lane.view[:HEADER] = (header if header.gso_type else header._replace(hdr_len=0)).pack()
        return True

    def _tcp(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> None:
        worker = self._worker
        plain = ipv4.MINIMUM if packet.version == 4 else 40
        if not self._vnet(lane, tunnel, HEADER + packet.header_length, end, packet.version):
            return
        if packet.header_length != plain:
            end = self._strip(lane, packet, end, plain)
        view = lane.view
        key = view[22:34].tobytes() if plain == 20 else view[18:54].tobytes()
        if key in tunnel.flows:
            lane.up(tunnel, end)
            return
        flags = packet.flags
        if flags & SYN and flags & (FIN | RST):
            worker.drop("bad_tcp_flags")
            return
        if not lane.buffer[0] & 1:
            try:
                verify(
                    lane.buffer, packet if packet.header_length == plain else parse(lane.buffer, HEADER, end - HEADER)
                )
            except MalformedPacket as error:
                worker.drop(error.reason)
                return
        if flags & RST:
            worker.drop("reset_of_nothing")
        elif flags & SYN and not flags & ACK:
            self._begin(lane, tunnel, key, packet, end)
        else:
            # RFC 9293 3.10.7.1: a segment that isn't for a connection is answered with a reset.
            worker.answers.reset(tunnel, view[:end].tobytes())

    def _begin(self, lane: Lane, tunnel: Tunnel, key: bytes, packet: Packet, end: int) -> None:
        worker = self._worker
        if end - HEADER > tunnel.mtu:
            # It would be kept while the upstream is dialled; no TCP sends so much before it is connected.
            worker.drop("syn_too_large")
            return
        if not worker.pair.ready:
            # The client tries again within a second.
            worker.drop("not_ready")
            return
        decision, timing = self.decide(tunnel, packet.destination, packet.destination_port, TCP)
        data = lane.view[:end].tobytes()
        if decision.outcome is Outcome.LIFT:
            worker.tracker.begin(lane, tunnel, key, decision, data, timing)
            return
        if decision.outcome is Outcome.DENY:
            worker.answers.reset(tunnel, data)
        else:
            worker.answers.no_route(tunnel, data)
        worker.lifecycle.refused(tunnel, key, decision, decision.reason, decision.why)

    def decide(self, tunnel: Tunnel, destination: bytes, port: int, protocol: int) -> tuple[Decision, tuple[int, int]]:
        """The decision on a new flow, remembered a tunnel; and how long route and rule took, zeros where it was remembered."""
        at = (destination, port, protocol)
        known = tunnel.memo.get(at)
        if known is not None:
            return known, (0, 0)
        worker = self._worker
        begun = worker.clock()
        route = resolve(worker.routes, tunnel.context, destination, protocol)
        resolved = decided = worker.clock()
        if isinstance(route, Decision):
            decision = route
        else:
            decision = authorise(worker.rules, route, tunnel.context, destination, port, protocol)
            decided = worker.clock()
        if len(tunnel.memo) >= MEMO:
            tunnel.memo.clear()
        tunnel.remember(at, decision)
        return decision, (resolved - begun, decided - resolved)

    @staticmethod
    def _strip(lane: Lane, packet: Packet, end: int, plain: int) -> int:
        """Take options or extension headers off; returns the new end."""
        buffer = lane.buffer
        extra = packet.header_length - plain
        buffer[HEADER + plain : end - extra] = buffer[HEADER + packet.header_length : end]
        # The buffer keeps its size: assignment of equal lengths only.
        end -= extra
        length = end - HEADER
        if packet.version == 4:
            buffer[10] = 0x45
            buffer[12:14] = length.to_bytes(2, "big")
            buffer[20:22] = b"\0\0"
            total = int.from_bytes(buffer[10:30], "little") % 0xFFFF
            buffer[20:22] = (0xFFFF - total).to_bytes(2, "little")
        else:
            buffer[14:16] = (length - 40).to_bytes(2, "big")
            buffer[16] = TCP
        if buffer[0] & 1:
            head = vnet.unpack(buffer, 0, end)
            moved = head._replace(hdr_len=head.hdr_len - extra, csum_start=head.csum_start - extra)
            buffer[:HEADER] = moved.pack()
        return end
