"""The pair between an upgrader worker and its flow worker: who may connect, the hellos, batches both ways.

One flow worker is paired at a time. A new one of an equal or newer generation takes the place of the old, whose pair is closed;
an older one is refused (it is a process that was replaced). What the upgrader says within a turn goes out as one datagram at its end;
what the pair doesn't take waits here, in order: at most an answer and an end for each slot, so the number of
slots bounds it, and an answer for each socket that was asked for. When the flow worker is gone, what waits for it is gone too: its
successor begins with AbortAll. Sockets ride beside their messages and are closed here once they are sent.

Limits: at most `MAX_STRANGERS` connections that haven't said Hello; the oldest gives way.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import msgspec

from falkirk.linux import seqpacket
from falkirk.linux.sockets import Socket
from falkirk.wire import handover
from falkirk.wire.handover import Devices, Hello, Message, SocketFailed, SocketOpened

MAX_STRANGERS: Final = 4
BUDGET: Final = 16
"""Datagrams read a turn."""


class Pairing:
    """Listens for flow workers and speaks with the current one.

    `refused(reason, **fields)` tells of what was turned away, "uid", "hello" or "message"; `bury(socket)` closes one when the turn is over.
    """

    def __init__(
        self,
        epoll: select.epoll,
        listener: socket.socket,
        hello: Hello,
        devices: tuple[Devices, Sequence[int]],
        uids: frozenset[int],
        refused: Callable[..., None],
        bury: Callable[[Socket], None],
    ) -> None:
        self._epoll = epoll
        self._listener = listener
        self._hello = hello
        self._devices, self._device_fds = devices
        self._uids = uids
        self._refused = refused
        self._bury = bury
        self._strangers: dict[int, socket.socket] = {}
        self._peer: socket.socket | None = None
        self._peer_fd = -1
        self._newest = 0
        self._outgoing: deque[Message] = deque()
        self._sockets: deque[socket.socket] = deque()
        """Those of the `SocketOpened` in there, in order."""
        self._full = False
        epoll.register(listener, select.EPOLLIN)

    @property
    def paired(self) -> bool:
        """True while a flow worker is there."""
        return self._peer is not None

    def owns(self, fd: int) -> bool:
        """Is this descriptor one of these?"""
        return fd == self._peer_fd or fd == self._listener.fileno() or fd in self._strangers

    def on_event(self, fd: int, events: int) -> list[Message]:
        """Readiness of one of these descriptors; what the flow worker says, in order."""
        if fd == self._peer_fd:
            if events & select.EPOLLOUT and self._full:
                self._full = False
                self._epoll.modify(fd, select.EPOLLIN)
            return self._receive()
        if fd in self._strangers:
            return self._greet(fd)
        self._accept()
        return []

    def _accept(self) -> None:
        while (sock := seqpacket.accept(self._listener)) is not None:
            uid = seqpacket.peer(sock).uid
            if uid not in self._uids:
                self._refused("uid", uid=uid)
                sock.close()
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                self._bury(self._strangers.pop(next(iter(self._strangers))))
            self._strangers[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLIN)

    def _greet(self, fd: int) -> list[Message]:
        """The first datagram of a connection: a Hello that fits makes it the flow worker."""
        received = seqpacket.receive(self._strangers[fd], handover.MAX_DATAGRAM)
        if received is None:
            return []
        sock = self._strangers.pop(fd)
        messages = self._decode(received)
        hello = messages[0] if messages else None
        if not isinstance(hello, Hello) or not self._fits(hello):
            if messages:
                self._refused("hello", said=repr(hello))
            self._bury(sock)
            return []
        self._drop_peer()
        self._newest = hello.generation
        self._peer, self._peer_fd = sock, fd
        try:
            seqpacket.send(sock, handover.encode([self._hello, self._devices]), self._device_fds)
        except OSError:
            self._drop_peer()
            return []
        return messages[1:]

    def _fits(self, hello: Hello) -> bool:
        return (
            hello.role == "flow"
            and hello.worker == self._hello.worker
            and hello.protocol == handover.PROTOCOL
            and hello.generation >= self._newest
        )

    def _receive(self) -> list[Message]:
        messages: list[Message] = []
        for _ in range(BUDGET):
            if self._peer is None:
                break
            try:
                received = seqpacket.receive(self._peer, handover.MAX_DATAGRAM, 0)
            except OSError:
                self._drop_peer()
                break
            if received is None:
                break
            more = self._decode(received)
            if not more:
                self._drop_peer()
                break
            messages += more
        return messages

    def _decode(self, received: tuple[bytes, list[int]]) -> list[Message]:
        """Messages of a datagram; none where it is the end or isn't one of ours."""
        data, fds = received
        for fd in fds:
            os.close(fd)
        if not data:
            return []
        try:
            return list(handover.FLOW_TO_UPGRADER.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._refused("message", error=str(error))
            return []

    def _drop_peer(self) -> None:
        if self._peer is not None:
            self._epoll.unregister(self._peer_fd)
            self._bury(self._peer)
        self._peer, self._peer_fd = None, -1
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self._outgoing.clear()
        self._full = False

    def say(self, message: Message) -> None:
        """To the flow worker, at the end of the turn; to nobody where there is none."""
        if self._peer is not None:
            self._outgoing.append(message)

    def give(self, message: SocketOpened, sock: socket.socket) -> None:
        """The same with a socket, which is the flow worker's from then on."""
        if self._peer is None:
            sock.close()
            return
        self._outgoing.append(message)
        self._sockets.append(sock)

    def flush(self) -> None:
        """Send what was said, as far as the pair takes it."""
        while self._outgoing and not self._full and self._peer is not None:
            batch, fds = self._batch()
            try:
                sent = seqpacket.send(self._peer, handover.encode(batch), fds)
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS and fds:
                    self._refuse_one(error.errno)
                    continue
                self._drop_peer()
                return
            if not sent:
                self._full = True
                self._epoll.modify(self._peer_fd, select.EPOLLIN | select.EPOLLOUT)
                return
            for _ in batch:
                self._outgoing.popleft()
            for _ in fds:
                self._sockets.popleft().close()

    def _batch(self) -> tuple[list[Message], list[int]]:
        """What goes in the next datagram, and the descriptors beside it."""
        batch: list[Message] = []
        fds: list[int] = []
        for message in islice(self._outgoing, handover.MAX_MESSAGES):
            if isinstance(message, SocketOpened):
                if len(fds) == handover.MAX_DESCRIPTORS:
                    break
                fds.append(self._sockets[len(fds)].fileno())
            batch.append(message)
        return batch, fds

    def _refuse_one(self, code: int) -> None:
        """More descriptors are on their way than this user may have open (unix(7)): the next one isn't sent."""
        at = next(index for index, message in enumerate(self._outgoing) if isinstance(message, SocketOpened))
        opened = self._outgoing[at]
        assert isinstance(opened, SocketOpened)
        self._outgoing[at] = SocketFailed(opened.token, code)
        self._sockets.popleft().close()

    def close(self) -> None:
        """Everything; the socket's path stays, for the parent to replace."""
        self._drop_peer()
        for sock in self._strangers.values():
            sock.close()
        self._strangers.clear()
        self._listener.close()
