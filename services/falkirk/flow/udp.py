"""UDP sessions: headers off on the way out, headers on on the way back. See `falkirk.flow.session` for what they share with echo.

Mapping: all sessions of one client's address and port leave by one external port, whomever they are with (RFC 4787 REQ-1: endpoint-independent),
and each takes datagrams of its own peer only (REQ-8: address and port-dependent filtering). The first session of a client's port has the
kernel choose the external one; sessions that begin meanwhile wait for that. The external address is the route's (REQ-2: paired, where
all routes of a device name the same).

Offloads: a USO super-packet of a `vnet` tunnel leaves with one call (UDP_SEGMENT), and a train that the kernel joined (UDP_GRO) comes back as one
super-packet; to a `raw` tunnel it goes as plain packets, in one datagram where its producer asked for that (`packed`). What plain packets leave with one
call is `falkirk.flow.udp_trains`'s business; datagrams that wait in a session's socket and the kernel hasn't joined are joined here.

A checksum is verified before the headers that carry it are taken off, so that what was damaged before stays known as damaged; a partial one
(virtio NEEDS_CSUM) can't be. IPv4 may do without one (RFC 768), IPv6 may not (RFC 8200 8.1).

Timers: RFC 4787 REQ-5 (5 minutes, at least 2), shorter towards port 53, where a question has one answer. A reply that is larger than its tunnel's
MTU is fragmented: the session's headers are made here, so this is where it leaves from (RFC 8200 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.flow.counters import FORWARDED, RECEIVED
from falkirk.flow.keys import key_of
from falkirk.flow.lane import HEADER
from falkirk.flow.resolving import ResolverSession
from falkirk.flow.table import State, Tunnel
from falkirk.flow.udp_trains import CHUNK, MAX_PAYLOAD, UdpSession, UdpTrains
from falkirk.linux import datagrams
from falkirk.wire import vnet
from falkirk.wire.checksum import residue
from falkirk.wire.context import Framing
from falkirk.wire.datagram import quoted_packet
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, verify
from falkirk.wire.protocol import UDP

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.session import Opening
    from falkirk.flow.worker import Worker

DNS: Final = 53
_PROTOCOL: Final = bytes([UDP])
_ROOM: Final = HEADER + 48
_BUFFER: Final = 2 * 65536 + _ROOM


class Mapping:
    """An external port and the sessions that leave by it."""

    __slots__ = ("asking", "key", "port", "sessions", "waiting")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.port = 0
        self.sessions = 0
        self.asking: UdpSession | None = None
        """The session whose socket will have the port chosen."""
        self.waiting: list[UdpSession] = []


class UdpSessions(UdpTrains):
    """UDP of one worker."""

    def __init__(self, worker: Worker, opening: Opening) -> None:
        super().__init__(worker, opening)
        self.trains = False
        """Whether super-packets may go to `vnet` tunnels: older kernels' TUN devices take none."""
        self._mappings: dict[bytes, Mapping] = {}
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._ancillary: object = None
        """What came beside the last datagram, and what it says: most say the same."""
        self._header_was = 64, 0, 0

    # from a tunnel

    def up4(self, lane: Lane, tunnel: Tunnel, end: int) -> None:
        """An IPv4 packet without options, of at least 28 bytes, at [10, end) of the lane's buffer."""
        buffer, view = lane.buffer, lane.view
        session = tunnel.flows.get(view[22:34].tobytes() + _PROTOCOL)
        if (
            not isinstance(session, UdpSession)
            or session.state is not State.ESTABLISHED
            or end - 10 != buffer[12] << 8 | buffer[13]
            or end - 30 != buffer[34] << 8 | buffer[35]
            or buffer[16] & 0x3F
            or buffer[17]
            or buffer[18] < 2
            or int.from_bytes(view[10:30], "little") % 0xFFFF
            or view[:10] != session.vnet_ok
        ):
            self._worker.ingress.packet(lane, tunnel, end)
        elif (
            not buffer[0] & 1
            and (buffer[36] or buffer[37])
            and (residue(view[30:end]) + session.pseudo + end - 30) % 0xFFFF
        ):
            self._worker.drop("bad_l4_checksum")
        elif buffer[1] or end == 38:
            self._up(session, lane, 38, end, buffer[18], buffer[11], buffer[16] & 0x40 != 0)
        else:
            self.put_aside(session, lane, end, 28, buffer[18], buffer[11], buffer[16] & 0x40 != 0)

    def up6(self, lane: Lane, tunnel: Tunnel, end: int) -> None:
        """The same for IPv6 without extension headers, of at least 48 bytes."""
        buffer, view = lane.buffer, lane.view
        session = tunnel.flows.get(view[18:54].tobytes() + _PROTOCOL)
        if (
            not isinstance(session, UdpSession)
            or session.state is not State.ESTABLISHED
            or end - 50 != buffer[14] << 8 | buffer[15]
            or end - 50 != buffer[54] << 8 | buffer[55]
            or buffer[17] < 2
            or not (buffer[56] or buffer[57])
            or view[:10] != session.vnet_ok
        ):
            self._worker.ingress.packet(lane, tunnel, end)
        elif not buffer[0] & 1 and (residue(view[50:end]) + session.pseudo + end - 50) % 0xFFFF:
            self._worker.drop("bad_l4_checksum")
        else:
            traffic_class = (buffer[10] & 15) << 4 | buffer[11] >> 4
            if buffer[1] or end == 58 or end - 10 > tunnel.mtu:
                # As in `packet`.
                dont_fragment = buffer[1] != 0 or end - 10 <= tunnel.mtu
                self._up(session, lane, 58, end, buffer[17], traffic_class, dont_fragment)
            else:
                self.put_aside(session, lane, end, 48, buffer[17], traffic_class, True)

    def packet(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> None:
        """Any UDP packet; its virtio-net header is true."""
        worker = self._worker
        buffer = lane.buffer
        upper = HEADER + packet.header_length
        stop = upper + (buffer[upper + 4] << 8 | buffer[upper + 5])
        try:
            if buffer[1] and stop != end:
                raise MalformedPacket("bad_udp_length")
            if not buffer[0] & 1:
                verify(buffer, packet)
        except MalformedPacket as error:
            worker.drop(error.reason)
            return
        ports = packet.source_port, packet.destination_port
        flow = tunnel.flows.get(key_of(UDP, packet.source, packet.destination, *ports))
        if flow is None:
            self.begin(lane, tunnel, packet, end, ports)
        elif isinstance(flow, ResolverSession):
            worker.resolving.packet(flow, lane, end, upper + 8, stop)
        elif not isinstance(flow, UdpSession):
            worker.drop("protocol_not_built")
        elif flow.held is not None:
            self.hold(lane, flow, end)
        else:
            if packet.header_length == (20 if packet.version == 4 else 40):
                flow.vnet_ok = lane.view[:HEADER].tobytes()
            # What is longer than its tunnel's MTU came in fragments: that its sender wants none can't be meant.
            dont_fragment = packet.dont_fragment and (buffer[1] != 0 or packet.total_length <= tunnel.mtu)
            self._up(flow, lane, upper + 8, stop, packet.ttl, packet.traffic_class, dont_fragment)

    def _up(
        self, session: UdpSession, lane: Lane, start: int, stop: int, ttl: int, traffic_class: int, dont_fragment: bool
    ) -> None:
        """The payload at [start, stop) of the lane's buffer, behind what waits; with a virtio-net header that says so it is a train."""
        buffer = lane.buffer
        size = stop - start
        gso_size = int.from_bytes(buffer[4:6], "little") if buffer[1] else 0
        if size > vnet.MAXIMUM_DATAGRAMS * gso_size > 0:
            self._worker.drop("vnet_gso_size")
            return
        if session.run is not None:
            self._ship(session)
        self._header(session, ttl - 1, traffic_class, dont_fragment)
        self._count_up(session, stop - HEADER, 1)
        code = self._datagrams(session, lane.view[start:stop], gso_size or size)
        if code:
            self.unsent(session, lane.view[:stop].tobytes(), code)
        else:
            self._worker.counts[FORWARDED] += 1

    # from the world

    def receive(self, session: UdpSession) -> bool:
        """From the socket to the tunnel what makes one packet (or one datagram of packets) there: a datagram, a train, or several datagrams of one length,
        which the kernel hasn't joined where the way they came by doesn't. False where the socket is empty. Raises OSError where there was nothing."""
        tunnel, heads = session.tunnel, session.heads
        start = HEADER + heads.size if heads.four else _ROOM
        size, header = self._read(session, start)
        step, apiece = header[2] or size, 0
        joins = tunnel.context.packed
        if joins:
            apiece = heads.size
        elif tunnel.framing is Framing.VNET:
            joins = self.trains
        alive = True
        while joins and size and size % step == 0 and start + size + MAX_PAYLOAD < _BUFFER:
            count = size // step + 1
            if count > CHUNK or count * (step + apiece) > MAX_PAYLOAD:
                break
            try:
                more, other = self._read(session, start + size)
            except OSError:
                # An error is in its queue as well.
                alive = False
                break
            like = other[2] == step if other[2] else more <= step
            if like and other[:2] == header[:2] and 0 < more <= MAX_PAYLOAD - size:
                size += more
                continue
            self._give(session, start, size, step, header)
            start, size, header, step = start + size, more, other, other[2] or more
        self._give(session, start, size, step, header)
        return alive

    def _read(self, session: UdpSession, at: int) -> tuple[int, tuple[int, int, int]]:
        """A datagram or a train into the buffer; its size, and TTL, traffic class, and size of a train's datagrams."""
        assert session.sock is not None
        size, ancillary, _, _ = session.sock.recvmsg_into((self._view[at:],), datagrams.ANCILLARY)
        if ancillary != self._ancillary:
            ttl, traffic_class, segment = 64, 0, 0
            for level, kind, data in ancillary:
                # Nothing else is asked for.
                if level == datagrams.SOL_UDP:
                    segment = int.from_bytes(data[:4], "little")
                elif kind in datagrams.TTLS:
                    ttl = data[0]
                else:
                    traffic_class = data[0]
            self._ancillary, self._header_was = ancillary, (ttl - 1 or 1, traffic_class, segment)
        return size, self._header_was

    def _give(self, session: UdpSession, start: int, size: int, step: int, header: tuple[int, int, int]) -> None:
        """The datagrams of `step` bytes (the last may be shorter) at `start` of the buffer to the tunnel."""
        worker, heads, tunnel = self._worker, session.heads, session.tunnel
        ttl, traffic_class, _ = header
        at = start - heads.size
        segment = step if step < size else 0
        longest = heads.size + (segment or size)
        large = longest > session.mtu and longest > session.path_mtu(worker.second)
        if tunnel.framing is Framing.VNET and not large and (self.trains or not segment):
            heads.put(self._buffer, at, size, ttl, traffic_class, partial=True)
            heads.put_vnet(self._buffer, at - HEADER, segment)
            worker.counts[RECEIVED] += 1
            self.delivered(session, heads.size + size)
            if worker.tunnels.deliver(tunnel, self._view[at - HEADER : start + size]):
                worker.counts[FORWARDED] += 1
            return
        if segment and tunnel.context.packed and not large:
            train = heads.packed(self._view[start : start + size], segment, ttl, traffic_class)
            count = -(-size // segment)
            worker.counts[RECEIVED] += count
            self.delivered(session, len(train), count)
            if worker.tunnels.deliver(tunnel, memoryview(train), packets=count):
                worker.counts[FORWARDED] += count
            return
        self._apart(session, start, size, segment, ttl, traffic_class, large)

    def _apart(
        self, session: UdpSession, start: int, size: int, segment: int, ttl: int, traffic_class: int, large: bool
    ) -> None:
        """The datagrams whose payload of `size` bytes is at `start` of the buffer as plain packets, in fragments where they are `large`."""
        worker, heads, tunnel = self._worker, session.heads, session.tunnel
        end = start + size
        for begin in range(start, end, segment or size) if size else (start,):
            # The headers overwrite the end of the datagram before, which has left.
            length = min(segment or size, end - begin)
            at = begin - heads.size
            heads.put(self._buffer, at, length, ttl, traffic_class)
            packet = self._view[at : begin + length]
            worker.counts[RECEIVED] += 1
            self.delivered(session, len(packet))
            if large:
                sent = worker.fragments.say(tunnel, bytes(packet), session.mtu)
            elif tunnel.framing is Framing.RAW:
                sent = worker.tunnels.deliver(tunnel, packet)
            else:
                sent = worker.tunnels.say(tunnel, bytes(packet))
            worker.counts[FORWARDED] += sent

    def quote(self, session: UdpSession, quoted: bytes) -> bytes | None:
        """The client's datagram as far as an error quotes it."""
        ends = session.source, session.destination, session.source_port, session.destination_port
        return quoted_packet(*ends, quoted)

    # begun and ended

    def make(self, tunnel: Tunnel, key: bytes) -> UdpSession:
        """A session."""
        return UdpSession(self, tunnel, key)

    def idle_s(self, session: UdpSession) -> int:
        """By the destination's port."""
        settings = self._worker.settings
        return settings.udp_dns_idle_s if session.destination_port == DNS else settings.udp_idle_s

    def wish(self, session: UdpSession) -> None:
        """By the external port of the client's address and port; the first one of these has it chosen, and others wait for that."""
        decision = session.decision
        assert decision is not None
        route = decision.route
        assert route is not None
        egress = route.egress4 if session.family == 4 else route.egress6
        key = b"%d/%b%d/%b" % (session.tunnel.id, session.source, session.source_port, egress)
        mapping = self._mappings.get(key)
        if mapping is None:
            mapping = self._mappings[key] = Mapping(key)
        session.mapping = mapping
        mapping.sessions += 1
        if mapping.port or mapping.asking is None:
            self._ask(session, mapping)
        else:
            mapping.waiting.append(session)

    def _ask(self, session: UdpSession, mapping: Mapping) -> None:
        if not mapping.port:
            mapping.asking = session
        self._opening.ask(session, session.destination_port, mapping.port)

    def opened(self, session: UdpSession, fd: int, local: int, raw: bool) -> None:
        """The socket is there, and with it the external port, where others wait for that."""
        mapping = session.mapping
        assert mapping is not None
        if mapping.asking is session:
            mapping.asking = None
            mapping.port = local
            waiting, mapping.waiting = mapping.waiting, []
            for other in waiting:
                self._ask(other, mapping)
        super().opened(session, fd, local, raw)

    def release(self, flow: UdpSession, reason: str) -> None:
        """What waits leaves; the external port is free with its last session."""
        if flow.run is not None:
            self._ship(flow)
        super().release(flow, reason)
        mapping = flow.mapping
        if mapping is None:
            return
        mapping.sessions -= 1
        if flow in mapping.waiting:
            mapping.waiting.remove(flow)
        if mapping.asking is flow:
            mapping.asking = None
            if mapping.waiting:
                self._ask(mapping.waiting.pop(0), mapping)
        if not mapping.sessions:
            del self._mappings[mapping.key]
