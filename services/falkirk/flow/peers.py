"""The flow worker's neighbours: on-ramps, which hand it tunnels, and the upgrader worker beside it.

Both speak `falkirk.wire.handover` over SEQPACKET sockets. On-ramps connect to this worker's socket; this worker connects
to its upgrader's, and goes on trying every 50 ms while that is away. A neighbour's death costs what it held and nothing
else: tunnels stay open without their on-ramp, and come back to the next one as `Held`.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.linux import seqpacket
from falkirk.wire.handover import (
    MAX_DATAGRAM,
    ONRAMP_TO_FLOW,
    PROTOCOL,
    UPGRADER_TO_FLOW,
    Adopt,
    Adopted,
    AdoptRefused,
    Closed,
    Connected,
    Devices,
    DialFailed,
    Hello,
    LowerWanted,
    Message,
    Recontext,
    SocketFailed,
    SocketOpened,
    Trunk,
    Trunked,
    TunnelClosed,
    batches,
)
from falkirk.wire.slots import LOWERED

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

READ: Final = select.EPOLLIN | select.EPOLLRDHUP
RETRY: Final = 50_000_000
"""Nanoseconds between attempts to reach the upgrader worker."""
BUDGET: Final = 64
DEVICES: Final = 4
TUNNEL_BUFFER: Final = 4 * 1024 * 1024


class Link:
    """One SEQPACKET connection: what can't be sent at once waits, in order, and is never lost while the peer lives."""

    def __init__(self, worker: Worker, sock: socket.socket) -> None:
        self._worker = worker
        self.sock = sock
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self.generation = 0
        self.greeted = False
        worker.watch(sock.fileno(), READ, self.ready)

    def ready(self, mask: int) -> None:
        """What epoll says of it."""
        if mask & select.EPOLLOUT:
            self._drain()
        for _ in range(BUDGET):
            try:
                received = seqpacket.receive(self.sock, MAX_DATAGRAM + 1)
            except OSError:
                received = (b"", [])
            if received is None:
                return
            data, fds = received
            try:
                if data:
                    self.datagram(data, fds)
            except (msgspec.DecodeError, ValueError) as error:
                self._worker.log.error("peer_refused", peer=self.name, error=str(error))
            for fd in fds:
                os.close(fd)
            if not data or not self.greeted:
                self.over("connection closed" if not data else "it said no hello that can be taken")
                return

    def datagram(self, data: bytes, fds: list[int]) -> None:
        """Take a datagram, and out of `fds` the descriptors that it keeps. ValueError ends the rest of this datagram, and
        the connection where no hello was taken."""
        raise NotImplementedError

    def greet(self, message: Message, role: str, seen: dict[int, int]) -> bool:
        """Whether it is the hello that comes first. Raises ValueError where that is missing, or not to be taken."""
        if isinstance(message, Hello):
            self.greeted = False
            check(message, role, seen)
            self.greeted = True
            self.generation = message.generation
            return True
        if not self.greeted:
            raise ValueError("the first message must be Hello")
        return False

    @property
    def backlog(self) -> int:
        """Datagrams that wait for the peer."""
        return len(self._waiting)

    @property
    def name(self) -> str:
        """For logs."""
        raise NotImplementedError

    def over(self, why: str) -> None:
        """The peer is gone, or refused."""
        self._worker.unwatch(self.sock.fileno())
        self.sock.close()
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
        self._worker.log.info("peer_gone", peer=self.name, why=why)

    def send(self, messages: list[Message]) -> None:
        """Send messages without descriptors, as many datagrams as it takes."""
        for data in batches(messages):
            self.send_data(data, [])

    def send_data(self, data: bytes, fds: list[int]) -> None:
        """Send one datagram with copies of descriptors that are the caller's."""
        if self.sock.fileno() < 0:
            return
        if not self._waiting:
            try:
                if seqpacket.send(self.sock, data, fds):
                    return
            except OSError:
                return  # The reader's side finds the end and says so.
        if not self._waiting:
            self._worker.rewatch(self.sock.fileno(), READ | select.EPOLLOUT)
        self._waiting.append((data, [os.dup(fd) for fd in fds]))

    def _drain(self) -> None:
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                if not seqpacket.send(self.sock, data, fds):
                    return
            except OSError:
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)
        self._worker.rewatch(self.sock.fileno(), READ)


class OnrampLink(Link):
    """An on-ramp that connected."""

    onramp = -1
    """Its worker number, once it said hello."""

    @property
    def name(self) -> str:
        """For logs."""
        return f"onramp.worker.{self.onramp}"

    def datagram(self, data: bytes, fds: list[int]) -> None:
        """Tunnels come and go."""
        for message in ONRAMP_TO_FLOW.decode(data):
            greeted = self.greet(message, "onramp", self._worker.onramp_generations)
            match message:
                case Hello() if greeted:
                    self.onramp = message.worker
                    self._worker.tunnels.onramp_arrived(self)
                case Trunk():
                    self._trunk(fds)
                case Adopt():
                    self._adopt(message, fds)
                case Recontext():
                    self._worker.tunnels.recontext(message.tunnel, message.context)
                case TunnelClosed():
                    self._worker.tunnels.close(message.tunnel, message.reason)

    def _trunk(self, fds: list[int]) -> None:
        try:
            if not fds:
                raise ValueError("the trunk's descriptor got lost: too many are open")
            self._worker.trunks.arrived(self.onramp, fds[0])
        except ValueError:
            # It comes again, with another one.
            self.greeted = False
            raise
        del fds[0]
        self.send([Trunked()])

    def _adopt(self, message: Adopt, fds: list[int]) -> None:
        tunnels = self._worker.tunnels
        trunk = self._worker.trunks.get(self.onramp)
        carried = fds.pop(0) if message.descriptors and fds else -1
        known = tunnels.get(message.tunnel)
        refusal: tuple[str, str] | None
        if message.descriptors and carried < 0:
            refusal = "NO_DESCRIPTOR", "the tunnel's descriptor got lost: too many are open"
        elif known is None:
            refusal = tunnels.adopt(self, message, carried)
            if refusal is None:
                carried = -1
        elif known.bearer.transport is not message.transport or (not message.descriptors and known.bearer is not trunk):
            refusal = "INVALID", "the number is another tunnel's"
        else:
            # Said again by an on-ramp that didn't hear our answer.
            tunnels.recontext(message.tunnel, message.context)
            refusal = None
        if carried >= 0:
            os.close(carried)
        self.send([Adopted(message.tunnel) if refusal is None else AdoptRefused(message.tunnel, *refusal)])

    def over(self, why: str) -> None:
        """The peer is gone, or refused."""
        super().over(why)
        self._worker.onramps.discard(self)


class UpgraderLink(Link):
    """The upgrader worker beside this one."""

    name = "upgrader"

    def datagram(self, data: bytes, fds: list[int]) -> None:
        """What became of dials and streams."""
        tracker, admin = self._worker.tracker, self._worker.admin_flows
        for message in UPGRADER_TO_FLOW.decode(data):
            self.greet(message, "upgrader", self._worker.upgrader_generations)
            match message:
                case Connected():
                    (admin if message.slot >= LOWERED else tracker).connected(message)
                case DialFailed():
                    (admin if message.slot >= LOWERED else tracker).dial_failed(message)
                case Closed():
                    (admin if message.slot >= LOWERED else tracker).closed(message)
                case LowerWanted():
                    admin.wanted(message)
                case SocketOpened():
                    self._worker.opening.opened(message, fds)
                case SocketFailed():
                    self._worker.opening.failed(message)
                case Devices():
                    check_devices(message, fds)
                    devices, fds[:DEVICES] = fds[:DEVICES], []
                    self._worker.pair.paired(self, message, devices)

    def over(self, why: str) -> None:
        """The peer is gone, or refused."""
        super().over(why)
        self._worker.pair.unpaired(self)


def check(hello: Hello, role: str, seen: dict[int, int]) -> None:
    """Refuse a peer of another protocol or role, or one that was replaced. Raises ValueError."""
    if hello.protocol != PROTOCOL:
        raise ValueError(f"{hello.role} speaks protocol {hello.protocol}, this is {PROTOCOL}: upgrade both together")
    if hello.role != role:
        raise ValueError(f"expected {role}, got {hello.role}")
    if hello.generation < seen.get(hello.worker, 0):
        raise ValueError(f"{role} {hello.worker} of generation {hello.generation} was replaced")
    seen[hello.worker] = hello.generation


def check_devices(message: Devices, fds: list[int]) -> None:
    """Refuse devices that can't be ones. Raises ValueError."""
    if not 0 < message.listener_port < 65536:
        raise ValueError(f"{message.listener_port} isn't a port")
    if len(fds) < message.descriptors or message.descriptors != DEVICES:
        raise ValueError(f"{message.descriptors} devices were announced, {len(fds)} came, and {DEVICES} are needed")
    for fd in fds[:DEVICES]:
        # A TUN is a character device; in tests a socket stands in for it.
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)):
            raise ValueError("a descriptor isn't a TUN device")


def dial_upgrader(worker: Worker, path: Path, hello: Hello) -> UpgraderLink | None:
    """One attempt to reach the upgrader worker; None where it isn't there."""
    try:
        sock = seqpacket.connect(path)
    except OSError:
        return None
    if not worker.trusted(seqpacket.peer(sock).uid):
        sock.close()
        worker.log.error("peer_refused", peer="upgrader", error=f"{path} belongs to a uid that isn't of this mesh")
        return None
    link = UpgraderLink(worker, sock)
    link.send([hello])
    return link


def grow(fd: int) -> bool:
    """Let a tunnel hold a few dozen super-packets; the kernel's limit for unprivileged processes applies. False where it
    isn't a unix SEQPACKET socket."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            return False
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, TUNNEL_BUFFER)
    finally:
        sock.detach()
    return True
