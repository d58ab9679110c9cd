"""Sessions over sockets of this node: UDP, and ICMP echo. What the two have in common.

    first packet ──► held ──OpenSocket──► upgrader worker: socket(), bind(), connect()
                       │                      │ SocketOpened, with the descriptor
                       ▼                      ▼
    packets ─────► headers off ──────────► socket ──► the world
    tunnel  ◄───── headers on  ◄────────── socket
                       ▲                      │ error queue: ICMP errors, with who said them
            ICMP error, translated ◄──────────┘

The socket is flow's own once it is here: the upgrader may end, and the session goes on. What is in a packet's header and not in its
payload is carried as far as a socket lets it: TTL (one less than it was, as a router does, both ways), DSCP and ECN, whether it may be
fragmented. The kernel is told when that differs from the packet before, so equal packets cost no call.

What the world answers with ICMP comes from the socket's error queue and is told to the client as a router on the way would have:
from the same sender, quoting the client's own packet (as much of it as the kernel gives). So traceroute sees the hops beyond.

An idle timer ends a session: what the client sends refreshes it, what it is sent doesn't (RFC 4787 REQ-6).

Limits: IP options and extension headers aren't carried; a reply whose TTL came to 1 is delivered with 1, as a socket can't answer with time
exceeded. What a client's ICMP errors say of replies can't be told to the server: the MTU in them is obeyed here, and an unreachable port ends
the session, whereupon the kernel tells the server of each datagram more that comes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final, TypeVar

from falkirk.flow.counters import RECEIVED
from falkirk.flow.decision import Outcome
from falkirk.flow.keys import key_of
from falkirk.flow.lane import HEADER
from falkirk.flow.table import Flow, Owner, State, Tunnel
from falkirk.linux import datagrams
from falkirk.wire import icmp
from falkirk.wire.build import MAX_ERROR4, MAX_ERROR6
from falkirk.wire.handover import OpenSocket, SocketFailed, SocketOpened
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import Packet, parse
from falkirk.wire.protocol import UDP
from falkirk.wire.translate import CARRIED4, CARRIED6

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

BUDGET: Final = 64
"""Datagrams (or trains of them) that one socket gives a turn."""
HELD_PACKETS: Final = 8
"""Packets of a session that wait for its socket."""
HELD_BYTES: Final = 16 << 20
"""Bytes of all that wait in a worker."""
RESERVED: Final = 64
"""Descriptors kept for tunnels, devices, files."""
PATH_MTU: Final = 600
"""Seconds that a path MTU is believed: RFC 1191 6.3 and RFC 8201 4 recommend ten minutes."""
SMALLEST: Final = 576
"""Of a path MTU that is believed: what everybody must take (RFC 791 3.1); IPv6 says 1,280 of itself."""
ENDED_BY_ERRNO: Final = {
    errno.EMFILE: "descriptors_exhausted",
    errno.ENFILE: "descriptors_exhausted",
    errno.ETOOMANYREFS: "descriptors_exhausted",
    errno.EADDRINUSE: "ports_exhausted",
    errno.EHOSTUNREACH: "upstream_unreachable",
    errno.ENETUNREACH: "upstream_unreachable",
    errno.EACCES: "upstream_prohibited",
    errno.EPERM: "upstream_prohibited",
    errno.ESHUTDOWN: "upgrader_lost",
}
_TOLD: Final = {
    errno.EHOSTUNREACH: Unreachable.HOST,
    errno.ENETUNREACH: Unreachable.NET,
    errno.EACCES: Unreachable.PROHIBITED,
    errno.EPERM: Unreachable.PROHIBITED,
}


class Session(Flow):
    """One session; `owner` knows its protocol."""

    __slots__ = (
        "dont_fragment",
        "fd",
        "held",
        "local",
        "mtu",
        "mtu_until",
        "raw",
        "segment",
        "sessions",
        "sock",
        "token",
        "touched",
        "traffic_class",
        "ttl",
        "vnet_ok",
    )

    def __init__(self, owner: Sessions[Any], tunnel: Tunnel, key: bytes) -> None:
        super().__init__(owner, tunnel, key)
        self.sessions = owner
        self.sock: socket.socket | None = None
        self.fd = -1
        self.token = 0
        """What its socket was asked for by; 0 where it isn't."""
        self.held: list[bytes] | None = []
        """Packets, each behind its virtio-net header, while the socket is opened; then None."""
        self.local = -1
        """The external port or identifier."""
        self.raw = False
        """A raw socket: see `falkirk.wire.handover.SocketOpened`."""
        self.mtu = tunnel.mtu
        """The largest packet that goes to the client."""
        self.mtu_until = 0
        """The second from which a path that was said to be narrower than the tunnel is tried anew."""
        self.ttl = 0
        """What the socket sends with; 0 before the first packet."""
        self.traffic_class = 0
        self.dont_fragment = True
        self.segment = 0
        """Bytes of a datagram where one send is several; 0: it never is."""
        self.touched = 0
        """The second of the last packet to the client."""
        self.vnet_ok = bytes(10)
        """A virtio-net header from the tunnel that was found to be true."""

    def path_mtu(self, now: int) -> int:
        """`mtu`, once what was learned too long ago is forgotten; `now` is in monotonic seconds."""
        if self.mtu_until and now >= self.mtu_until:
            self.mtu, self.mtu_until = self.tunnel.mtu, 0
        return self.mtu

    def ready(self, mask: int) -> None:
        """What epoll says of its socket."""
        self.sessions.readable(self, mask)


S = TypeVar("S", bound=Session)


class Sessions(Owner[S]):
    """Sessions of one protocol on one worker."""

    def __init__(self, worker: Worker, opening: Opening) -> None:
        self._worker = worker
        self._opening = opening

    # of the protocol

    @abstractmethod
    def make(self, tunnel: Tunnel, key: bytes) -> S:
        """A session."""

    @abstractmethod
    def idle_s(self, session: S) -> int:
        """Seconds without a packet from the client after which it ends."""

    @abstractmethod
    def wish(self, session: S) -> None:
        """Ask for its socket, now or when it can be."""

    @abstractmethod
    def receive(self, session: S) -> bool:
        """One datagram (or a train of them) from the socket to the tunnel; False where no more is there. Raises OSError where there was none."""

    @abstractmethod
    def quote(self, session: S, quoted: bytes) -> bytes | None:
        """The client's packet of which an error quotes `quoted`, as far as it is known; None where it isn't this session's."""

    def refused(self, session: S, code: int) -> str:
        """Why a session ends whose socket couldn't be opened."""
        return ENDED_BY_ERRNO.get(code, "upstream_error")

    # begun

    def begin(self, lane: Lane, tunnel: Tunnel, packet: Packet, end: int, ports: tuple[int, int]) -> None:
        """The first packet of a session (well formed, right checksum): route, rule and limits decide. `ports`: source and destination."""
        worker = self._worker
        if not worker.pair.ready:
            worker.drop("not_ready")
            return
        decision, timing = worker.ingress.decide(tunnel, packet.destination, ports[1], packet.protocol)
        key = key_of(packet.protocol, packet.source, packet.destination, *ports)
        if decision.outcome is not Outcome.LIFT:
            data = lane.view[:end].tobytes()
            told = Unreachable.PROHIBITED if decision.outcome is Outcome.PROHIBITED else Unreachable.NET
            if decision.reason == "not_dns" and packet.protocol == UDP:
                # RFC 1122 4.1.3.1: nobody listens there.
                told = Unreachable.PORT
            worker.answers.unreachable(tunnel, data, told)
            worker.lifecycle.refused(tunnel, key, decision, decision.reason, decision.why)
            return
        refusal = worker.lifecycle.refusal(tunnel) or self._opening.refusal()
        if refusal is not None:
            worker.lifecycle.refuse(tunnel, key, decision, refusal)
            return
        route = decision.route
        sessions: Sessions[Any] = worker.resolving if route is not None and route.target == "resolver" else self
        session = sessions.make(tunnel, key)
        worker.lifecycle.begin(session, decision, timing, worker.settings.transitory_idle_s)
        sessions.hold(lane, session, end)
        sessions.wish(session)

    def hold(self, lane: Lane, session: S, end: int) -> None:
        """Keep a packet until the socket is there; more than `HELD_PACKETS` are dropped."""
        held = session.held
        assert held is not None
        if len(held) >= HELD_PACKETS or self._opening.held_bytes + end > HELD_BYTES:
            self._worker.drop("held")
            return
        held.append(lane.view[:end].tobytes())
        self._opening.held_bytes += end

    def _let_go(self, session: S) -> list[bytes]:
        """Its held packets, which are held no more."""
        held, session.held = session.held, None
        assert held is not None
        self._opening.held_bytes -= sum(map(len, held))
        session.tunnel.device.held -= 1
        return held

    def opened(self, session: S, fd: int, local: int, raw: bool) -> None:
        """Its socket is there: what was held goes."""
        worker = self._worker
        six = session.family == 6
        family = socket.AF_INET6 if six else socket.AF_INET
        # Its type would be asked of the kernel, and isn't needed.
        session.sock = socket.socket(family, socket.SOCK_DGRAM, 0, fileno=fd)
        session.fd = fd
        session.local = local
        session.raw = raw
        held = self._let_go(session)
        worker.lifecycle.state(session, State.ESTABLISHED)
        worker.wheel.place(session, worker.second + self.idle_s(session))
        worker.watch(fd, select.EPOLLIN, session.ready)
        # What it carries in its first second is told at the end of that.
        worker.dirty.append(session)
        lane = worker.lane(session.tunnel.framing)
        for data in held:
            lane.view[: len(data)] = data
            lane.up(session.tunnel, len(data))

    def failed(self, session: S, code: int) -> None:
        """There is no socket: the client is told in ICMP's words where there are some for it."""
        worker = self._worker
        reason = self.refused(session, code)
        told = _TOLD.get(code)
        for data in self._let_go(session):
            if told is None:
                worker.drop(reason if reason in ("descriptors_exhausted", "ports_exhausted") else "upstream_error")
            else:
                worker.answers.unreachable(session.tunnel, data, told)
        worker.lifecycle.finish(session, reason)

    # to the world

    def _count_up(self, session: S, size: int, packets: int) -> None:
        """Count packets from the client, of `size` bytes in all."""
        worker = self._worker
        session.bytes_up += size
        session.packets_up += packets
        if session.tick != worker.second:
            session.tick = worker.second
            worker.dirty.append(session)

    @staticmethod
    def _header(session: S, ttl: int, traffic_class: int, dont_fragment: bool) -> None:
        """What is sent from now on has these in its header."""
        sock = session.sock
        if sock is None or (
            ttl == session.ttl and traffic_class == session.traffic_class and dont_fragment is session.dont_fragment
        ):
            return
        six = session.family == 6
        if ttl != session.ttl:
            datagrams.set_ttl(sock, ttl, six=six)
            session.ttl = ttl
        if traffic_class != session.traffic_class:
            # A class that this process may not give (SO_PRIORITY) is a hint that is lost.
            with contextlib.suppress(OSError):
                datagrams.set_traffic_class(sock, traffic_class, six=six)
            session.traffic_class = traffic_class
        if dont_fragment is not session.dont_fragment:
            datagrams.may_fragment(sock, six=six, allowed=not dont_fragment)
            session.dont_fragment = dont_fragment

    def write(self, session: S, parts: list[memoryview] | list[bytearray]) -> int:
        """Send one datagram (or what `set_segment` makes of it) that is these parts; the errno of what went wrong, else 0."""
        code = errno.EIO
        for _ in range(2):
            if session.sock is None:
                return code
            try:
                if len(parts) > 1:
                    os.writev(session.fd, parts)
                elif parts[0]:
                    os.write(session.fd, parts[0])
                else:
                    # write() of nothing sends nothing.
                    session.sock.send(b"")
            except OSError as error:
                code = error.errno or errno.EIO
                if code in (errno.EAGAIN, errno.EMSGSIZE, errno.EINVAL, errno.EIO, errno.ENOBUFS):
                    return code
                # It may be of a packet before this one (udp(7)): heard, it is gone, and this one is sent.
                self.hear(session)
            else:
                return 0
        return code

    def unsent(self, session: S, data: bytes, code: int) -> None:
        """A packet that the socket didn't take (behind its virtio-net header): the client is told why, or it is counted."""
        worker = self._worker
        told = _TOLD.get(code)
        if code == errno.EMSGSIZE and session.sock is not None:
            mtu = datagrams.path_mtu(session.sock, six=session.family == 6)
            packet = parse(data, HEADER, len(data) - HEADER)
            worker.answers.too_big(session.tunnel, data, packet, mtu)
        elif told is not None:
            worker.answers.unreachable(session.tunnel, data, told)
        else:
            worker.drop("socket_full" if code in (errno.EAGAIN, errno.ENOBUFS) else "upstream_error")

    # from the world

    def readable(self, session: S, mask: int) -> None:
        """Read the socket until it is empty or the budget is spent."""
        if mask & select.EPOLLERR:
            self.hear(session)
        for _ in range(BUDGET):
            if session.sock is None:
                return
            try:
                if not self.receive(session):
                    return
            except BlockingIOError:
                return
            except OSError:
                # An error of a packet before, told here because it waited; its story is in the queue.
                self.hear(session)

    def delivered(self, session: S, size: int, packets: int = 1) -> None:
        """Count packets to the client, of `size` bytes in all."""
        worker = self._worker
        session.bytes_down += size
        session.packets_down += packets
        if session.touched != worker.second:
            session.touched = worker.second
            worker.dirty.append(session)

    def hear(self, session: S) -> None:
        """Tell the client what the world says of its packets, as far as it says anything new."""
        sock = session.sock
        if sock is None:
            return
        for _ in range(BUDGET):
            error = datagrams.next_error(sock)
            if error is None:
                # Some errors are told without a story.
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                return
            if error.origin == datagrams.ORIGIN_LOCAL or error.destination != session.destination:
                continue
            quote = self.quote(session, error.quoted)
            carried = CARRIED4 if session.family == 4 else CARRIED6
            if quote is not None:
                self._worker.counts[RECEIVED] += 1
                if error.type in carried:
                    self._translate(session, error, quote)
                else:
                    self._worker.drop("icmp_not_error")

    def _translate(self, session: S, error: datagrams.SocketError, quote: bytes) -> None:
        four = session.family == 4
        rest = 0
        if error.errno == errno.EMSGSIZE:
            assert session.sock is not None
            mtu = error.info or datagrams.path_mtu(session.sock, six=not four)
            rest = min(mtu, session.tunnel.mtu)
        message = bytearray(icmp.build(error.type, error.code, rest))
        message += quote[: (MAX_ERROR4 - 20 if four else MAX_ERROR6 - 40) - len(message)]
        self._worker.answers.relay(session.tunnel, message, error.offender, session.source)

    # what the client says of replies

    def told(self, session: S, packet: Packet, mtu: int | None) -> None:
        """An ICMP error from the client that quotes a packet of this session; `mtu` where it says that one was too big."""
        worker = self._worker
        kind = (packet.version, packet.icmp_type, packet.icmp_code)
        if mtu is not None:
            # What is smaller still is for routers to cut, which these packets' DF lets them: no reason to make a thousand here.
            session.mtu = min(session.mtu, max(mtu, SMALLEST))
            session.mtu_until = worker.second + PATH_MTU
        worker.drop("icmp_error_taken")
        if kind in ((4, icmp.UNREACHABLE4, 3), (6, icmp.UNREACHABLE6, 4)):
            worker.lifecycle.finish(session, "client_unreachable")

    # ended

    def end(self, flow: S, reason: str) -> None:
        """End it; the client is told that it is prohibited, unless this worker goes and its successor may have it again."""
        worker = self._worker
        if flow.held is not None:
            for data in self._let_go(flow):
                worker.answers.unreachable(flow.tunnel, data, Unreachable.PROHIBITED)
        elif reason != "drained":
            quote = self.quote(flow, b"")
            four = flow.family == 4
            if quote is not None:
                code, type6, code6 = Unreachable.PROHIBITED.value
                message = bytearray(icmp.build(icmp.UNREACHABLE4 if four else type6, code if four else code6, 0))
                worker.answers.relay(flow.tunnel, message + quote, b"", flow.source, counted=False)
        worker.lifecycle.finish(flow, reason)

    def cut(self, flow: S, reason: str) -> None:
        """End it at once."""
        self._worker.lifecycle.finish(flow, reason)

    def bereave(self, flow: S, reason: str) -> None:
        """Only one whose socket isn't there yet needs the upgrader."""
        if flow.held is not None:
            self._worker.lifecycle.finish(flow, reason)

    def expire(self, flow: S) -> None:
        """End it where the client has been silent for long."""
        worker = self._worker
        limit = worker.settings.transitory_idle_s if flow.held is not None else self.idle_s(flow)
        if flow.tick + limit > worker.second:
            worker.wheel.place(flow, flow.tick + limit)
        else:
            worker.lifecycle.finish(flow, "idle")

    def release(self, flow: S, reason: str) -> None:
        """Give back its socket, and what is held."""
        worker = self._worker
        self._opening.forget(flow)
        if flow.held is not None:
            for _ in self._let_go(flow):
                worker.drop("tunnel_closed" if reason == "tunnel_closed" else "held")
        if flow.sock is not None:
            worker.unwatch(flow.fd)
            flow.sock.close()
            flow.sock = None
            flow.fd = -1


class Opening:
    """Sockets that have been asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: dict[int, Session] = {}
        self._token = 0
        self.held_bytes = 0
        """Of packets that wait in this worker."""

    def refusal(self) -> str | None:
        """Why there can't be another socket; None where there can."""
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self._worker.handlers) + len(self._waiting) >= most - RESERVED:
            return "descriptors_exhausted"
        return None

    def ask(self, session: Session, port: int, local: int, preface: bytes = b"") -> None:
        """Have a session's socket opened; with a preface (`falkirk.wire.asker`) it is one to the resolver."""
        decision = session.decision
        assert decision is not None
        route = decision.route
        assert route is not None
        self._token = self._token % 0xFFFFFFFF + 1
        session.token = self._token
        self._waiting[session.token] = session
        self._worker.to_upgrader.append(
            OpenSocket(
                token=session.token,
                protocol=session.protocol,
                destination=session.destination,
                port=port,
                egress=route.egress4 if session.family == 4 else route.egress6,
                local=local,
                flow_id=self._worker.lifecycle.identity(session),
                span_id=session.span_id,
                preface=preface,
            )
        )

    def opened(self, message: SocketOpened, fds: list[int]) -> None:
        """Take its descriptor out of `fds`; none is there where this process has too many."""
        session = self._waiting.pop(message.token, None)
        if session is None:
            if fds:
                os.close(fds.pop(0))
            return
        session.token = 0
        if fds:
            session.sessions.opened(session, fds.pop(0), message.local, message.raw)
        else:
            session.sessions.failed(session, errno.EMFILE)

    def failed(self, message: SocketFailed) -> None:
        """There is no socket."""
        session = self._waiting.pop(message.token, None)
        if session is not None:
            session.token = 0
            session.sessions.failed(session, message.errno)

    def forget(self, session: Session) -> None:
        """It doesn't wait any more; a socket that comes for it is closed."""
        if session.token:
            del self._waiting[session.token]
            session.token = 0
