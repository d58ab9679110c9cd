"""Sessions of UDP with the tenant's resolver: questions as datagrams to a process of the mesh, instead of a socket to the world.

What the upgrader hands over is a unix SEQPACKET connection to the resolver, on which it has said already who asks (`falkirk.wire.asker`); each
datagram behind that is one DNS message, either way. What lies in an IP header (TTL, DSCP) ends here. Questions are few, so their packets
go the slow path, with all its tests.

A resolver that isn't there, or goes, is told to the client as a closed port (RFC 1122 4.1.3.1), so that it asks its next server at once; the
next question of the same port begins another session. While the resolver doesn't read, questions are dropped as `socket_full`.

Limits: a reply larger than the tunnel's MTU leaves in fragments, like every UDP reply; the resolver sends none larger than the client said.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.flow.counters import FORWARDED, RECEIVED
from falkirk.flow.decision import RETOLD
from falkirk.flow.lane import HEADER
from falkirk.flow.session import Session, Sessions
from falkirk.flow.table import Tunnel
from falkirk.wire import asker
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads, quoted_packet
from falkirk.wire.icmp import Unreachable

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.table import Flow

TTL: Final = 64
LARGEST: Final = 65_507
AWAY: Final = (errno.ENOENT, errno.ECONNREFUSED, errno.EPIPE, errno.ECONNRESET, errno.EAGAIN)
"""What connecting or writing says where no resolver is there."""


def preface(flow: Flow, flow_id: bytes) -> bytes:
    """What the resolver hears first about a flow, of UDP or TCP."""
    said = asker.Asker(flow_id, flow.protocol, flow.source, flow.source_port, flow.destination, flow.tunnel.context)
    data = asker.encode(said)
    if len(data) > asker.MAX:
        # Rules that need those facts fail closed (`falkirk.decide.rules`): a device can't talk its way around a rule by talking much.
        bare = msgspec.structs.replace(said.context, posture={}, attributes={})
        data = asker.encode(msgspec.structs.replace(said, context=bare))
    return data


class ResolverSession(Session):
    """A device's UDP port that asks the resolver."""

    __slots__ = ("heads",)

    def __init__(self, owner: ResolverSessions, tunnel: Tunnel, key: bytes) -> None:
        super().__init__(owner, tunnel, key)
        self.heads = Heads(self.destination, self.source, self.destination_port, self.source_port)
        """Of packets to the client."""


class ResolverSessions(Sessions[ResolverSession]):
    """Those of one worker."""

    def make(self, tunnel: Tunnel, key: bytes) -> ResolverSession:
        """A session."""
        return ResolverSession(self, tunnel, key)

    def idle_s(self, session: ResolverSession) -> int:
        """As for any session of port 53."""
        return self._worker.settings.udp_dns_idle_s

    def wish(self, session: ResolverSession) -> None:
        """At once: nothing is shared with other sessions."""
        self._opening.ask(
            session, session.destination_port, 0, preface(session, self._worker.lifecycle.identity(session))
        )

    def refused(self, session: ResolverSession, code: int) -> str:
        """Why it ends where no resolver was to be had."""
        return "resolver_away" if code in AWAY else super().refused(session, code)

    def failed(self, session: ResolverSession, code: int) -> None:
        """No resolver is there: for the client its port is closed."""
        if code not in AWAY:
            super().failed(session, code)
            return
        worker = self._worker
        for data in self._let_go(session):
            worker.answers.unreachable(session.tunnel, data, Unreachable.PORT)
        worker.lifecycle.finish(session, "resolver_away")

    def end(self, flow: ResolverSession, reason: str) -> None:
        """Quietly where its device's context has changed: the resolver is told anew with the next question."""
        if flow.held is None and reason == RETOLD:
            self._worker.lifecycle.finish(flow, reason)
        else:
            super().end(flow, reason)

    # to the resolver

    def packet(self, session: ResolverSession, lane: Lane, end: int, start: int, stop: int) -> None:
        """A packet of it at [10, end) of the lane's buffer, whose payload is at [start, stop)."""
        if session.held is not None:
            self.hold(lane, session, end)
        else:
            self.question(session, lane, start, stop)

    def question(self, session: ResolverSession, lane: Lane, start: int, stop: int) -> None:
        """A datagram whose payload is at [start, stop) of the lane's buffer; the packet was found to be well formed."""
        worker = self._worker
        if start == stop:
            # An empty datagram would read as the connection's end.
            worker.drop("dns_malformed")
            return
        if session.sock is None:
            return
        self._count_up(session, stop - HEADER, 1)
        try:
            session.sock.send(lane.view[start:stop])
        except BlockingIOError:
            worker.drop("socket_full")
        except OSError:
            worker.answers.unreachable(session.tunnel, lane.view[:stop].tobytes(), Unreachable.PORT)
            worker.lifecycle.finish(session, "resolver_lost")
        else:
            worker.counts[FORWARDED] += 1

    # from the resolver

    def receive(self, session: ResolverSession) -> bool:
        """One reply to the tunnel; False where none will come any more. Raises BlockingIOError where there is none."""
        worker, heads, sock = self._worker, session.heads, session.sock
        assert sock is not None
        try:
            reply = sock.recv(LARGEST)
        except ConnectionResetError:
            reply = b""
        if not reply:
            worker.lifecycle.finish(session, "resolver_lost")
            return False
        packet = bytearray(heads.size) + reply
        heads.put(packet, 0, len(reply), TTL, 0)
        tunnel = session.tunnel
        worker.counts[RECEIVED] += 1
        self.delivered(session, len(packet))
        if len(packet) > session.path_mtu(worker.second):
            sent = worker.fragments.say(tunnel, bytes(packet), session.mtu)
        elif tunnel.framing is Framing.RAW:
            sent = worker.tunnels.deliver(tunnel, memoryview(packet))
        else:
            sent = worker.tunnels.say(tunnel, bytes(packet))
        worker.counts[FORWARDED] += sent
        return True

    def hear(self, session: ResolverSession) -> None:
        """The resolver's process is gone, or goes: a unix socket has no errors of the world to tell."""
        if session.sock is not None:
            with contextlib.suppress(OSError):
                code = session.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return
            self._worker.lifecycle.finish(session, "resolver_lost")

    def quote(self, session: ResolverSession, quoted: bytes) -> bytes | None:
        """The client's datagram as far as it is quoted."""
        ends = session.source, session.destination, session.source_port, session.destination_port
        return quoted_packet(*ends, quoted)
