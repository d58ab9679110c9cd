"""ICMP and ICMPv6 echo (RFC 792, RFC 4443 4) through sockets of this node: see `falkirk.flow.session`.

A session is a client's identifier and a destination. Requests go to the destination itself, so what answers is what is there, and what isn't there doesn't
answer; the identifier outside is another one, and is mapped back (RFC 5508 3.1), while sequence numbers and data stay as they are.

Sockets are ping sockets, or raw ones where net.ipv4.ping_group_range doesn't let the upgrader have those; where it may have neither
(no CAP_NET_RAW) sessions end as `echo_not_permitted`, and the client is told that echo is prohibited. `falkirk doctor` says which it is.

Identifiers of raw sockets are chosen here, and belong to one session each: one worker's are those that its number is the remainder of, so that two
never meet.

Limits: an identifier is mapped for each destination by itself (RFC 5508 REQ-1 a says that it should not be). Other queries (timestamp,
information, ICMPv6 node information, neighbour discovery) aren't carried.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING, Final

from falkirk.flow.counters import FORWARDED, RECEIVED
from falkirk.flow.keys import key_of
from falkirk.flow.lane import HEADER
from falkirk.flow.session import Opening, Session, Sessions
from falkirk.flow.table import Tunnel
from falkirk.flow.text import address_text
from falkirk.linux import datagrams
from falkirk.wire import icmp
from falkirk.wire.build import icmp_packet
from falkirk.wire.checksum import checksum, valid
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet, verify

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

REQUEST: Final = {4: icmp.ECHO4, 6: icmp.ECHO6}
REPLY: Final = {4: icmp.ECHO_REPLY4, 6: icmp.ECHO_REPLY6}
IDENTIFIERS: Final = 1 << 16
_HEAD: Final = Struct(">BBHHH")


class Echoes(Sessions[Session]):
    """Echo of one worker."""

    def __init__(self, worker: Worker, opening: Opening) -> None:
        super().__init__(worker, opening)
        self._buffer = bytearray(65536 + 60)
        self._used: set[int] = set()
        """Identifiers that sessions have asked for."""
        self._next = 0

    # from a tunnel

    def packet(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int) -> None:
        """An ICMP message that isn't an error, in the lane's buffer."""
        worker = self._worker
        if packet.icmp_type != REQUEST[packet.version] or packet.icmp_code:
            worker.drop("icmp_not_carried")
            return
        try:
            verify(lane.buffer, packet)
        except MalformedPacket as error:
            worker.drop(error.reason)
            return
        ports = packet.identifier, 0
        flow = tunnel.flows.get(key_of(packet.protocol, packet.source, packet.destination, *ports))
        if flow is None:
            self.begin(lane, tunnel, packet, end, ports)
        elif not isinstance(flow, Session):
            worker.drop("protocol_not_built")
        elif flow.held is not None:
            self.hold(lane, flow, end)
        else:
            self._up(flow, lane, packet, end)

    def _up(self, session: Session, lane: Lane, packet: Packet, end: int) -> None:
        upper = HEADER + packet.header_length
        message = bytearray(lane.view[upper:end])
        _HEAD.pack_into(message, 0, packet.icmp_type, 0, 0, session.local, packet.sequence)
        if session.raw:
            # Of ICMPv6 the kernel makes it, for ping sockets always.
            message[2:4] = checksum(message).to_bytes(2, "big")
        dont_fragment = packet.dont_fragment and packet.total_length <= session.tunnel.mtu
        self._header(session, packet.ttl - 1, packet.traffic_class, dont_fragment)
        self._count_up(session, packet.total_length, 1)
        code = self.write(session, [message])
        if not code:
            self._worker.counts[FORWARDED] += 1
        else:
            self.unsent(session, lane.view[:end].tobytes(), code)

    # from the world

    def receive(self, session: Session) -> bool:
        """One reply from the socket to the tunnel. True: there may be more. Raises OSError where there is none."""
        sock, worker = session.sock, self._worker
        assert sock is not None
        size, ancillary, _, address = sock.recvmsg_into([self._buffer], datagrams.ANCILLARY)
        # A ping socket takes replies of its identifier from anyone.
        if address[0] != address_text(session.destination):
            return True
        version = session.family
        start = (self._buffer[0] & 15) << 2 if session.raw and version == 4 else 0
        message = self._buffer[start:size]
        if len(message) < icmp.HEADER or (session.raw and version == 4 and not valid(message)):
            return True
        kind, code, _, identifier, sequence = _HEAD.unpack_from(message)
        if (kind, code, identifier) != (REPLY[version], 0, session.local):
            return True
        ttl, traffic_class = 64, 0
        for _, what, data in ancillary:
            if what in datagrams.TTLS:
                ttl = data[0]
            else:
                traffic_class = data[0]
        _HEAD.pack_into(message, 0, kind, code, 0, session.source_port, sequence)
        packet = icmp_packet(
            message, session.destination, session.source, ttl=ttl - 1 or 1, traffic_class=traffic_class
        )
        worker.counts[RECEIVED] += 1
        self.delivered(session, len(packet))
        mtu = session.path_mtu(worker.second)
        worker.counts[FORWARDED] += worker.fragments.say(session.tunnel, packet, mtu)
        return True

    def quote(self, session: Session, quoted: bytes) -> bytes | None:
        """The client's request as far as an error quotes it; None where the error is about another's."""
        version = session.family
        if version == 6 and session.raw and len(quoted) > 40 and quoted[0] >> 4 == 6:
            quoted = quoted[40:]
        message = bytearray(quoted) if quoted else bytearray(_HEAD.pack(REQUEST[version], 0, 0, session.local, 0))
        if len(message) < icmp.HEADER:
            return None
        kind, code, _, identifier, sequence = _HEAD.unpack_from(message)
        if (kind, code, identifier) != (REQUEST[version], 0, session.local):
            return None
        _HEAD.pack_into(message, 0, kind, code, 0, session.source_port, sequence)
        return icmp_packet(message, session.source, session.destination, ttl=1)

    # begun and ended

    def make(self, tunnel: Tunnel, key: bytes) -> Session:
        """A session."""
        return Session(self, tunnel, key)

    def idle_s(self, session: Session) -> int:
        """RFC 5508 REQ-2: at least a minute."""
        return self._worker.settings.echo_idle_s

    def wish(self, session: Session) -> None:
        """With an identifier of its own, should the socket be a raw one."""
        worker = self._worker
        workers, number = worker.start.workers, worker.start.worker
        mine = range(number, IDENTIFIERS, workers)
        for _ in mine:
            identifier = mine[self._next % len(mine)]
            self._next += 1
            if identifier not in self._used:
                break
        else:
            worker.lifecycle.finish(session, "identifiers_exhausted")
            return
        self._used.add(identifier)
        session.local = identifier
        self._opening.ask(session, 0, identifier)

    def opened(self, session: Session, fd: int, local: int, raw: bool) -> None:
        """The socket is there; a ping socket has another identifier, and the one chosen here is free."""
        if not raw:
            self._used.discard(session.local)
        super().opened(session, fd, local, raw)

    def refused(self, session: Session, code: int) -> str:
        """Why a session ends whose socket couldn't be opened."""
        return "echo_not_permitted" if code in (errno.EPERM, errno.EACCES) else super().refused(session, code)

    def release(self, flow: Session, reason: str) -> None:
        """Its identifier is free."""
        if flow.raw or flow.held is not None:
            self._used.discard(flow.local)
        super().release(flow, reason)
