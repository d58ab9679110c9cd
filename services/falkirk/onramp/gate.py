"""The gate: accepts producers, reads their first datagram, and refuses what isn't a context.

Who is silent for longer than the context's timeout is refused; so is whoever comes while the room for pending connections is
full, its own uid's share or all of it. Uids that may not connect at all share one share between them, and are
told so only after their first datagram, like everybody else: they can't crowd out those who may.

Refusing is orderly: the answer is written, sending is shut off, and what the producer had sent already is thrown away before
the close; an unread queue would turn the producer's answer into ECONNRESET.

Limit: at EMFILE the gate rests for 100 ms and leaves connections in the kernel's backlog.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final

from falkirk.linux import seqpacket
from falkirk.linux.seqpacket import Peer
from falkirk.onramp.admission import Grants
from falkirk.onramp.context import MAX_CONTEXT, Code, ContextRequest, Refusal
from falkirk.onramp.parsers import Parser
from falkirk.onramp.reactor import Reactor, Timer

ACCEPTS_A_TURN: Final = 64
REST_S: Final = 0.1
_DISCARDED: Final = 1024
_STRANGERS: Final = -1
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Admit = Callable[[socket.socket, Peer, ContextRequest], None]
Refused = Callable[[Code], None]


def refuse(sock: socket.socket, answer: bytes) -> None:
    """Tell the producer, and close."""
    # A producer that is gone, or has filled its queue, gets no answer.
    with contextlib.suppress(OSError):
        seqpacket.send(sock, answer)
    discard(sock)


def discard(sock: socket.socket) -> None:
    """End the connection for every copy of the descriptor, and close ours."""
    with contextlib.suppress(OSError), sock:
        sock.shutdown(socket.SHUT_RDWR)
        for _ in range(_DISCARDED):
            # Without room for them, descriptors that were sent along are closed by the kernel.
            received = seqpacket.receive(sock, 1, 0)
            if received is None or not received[0]:
                break


class _Pending:
    """A connection that has said nothing yet."""

    __slots__ = ("peer", "share", "sock", "timer")

    def __init__(self, sock: socket.socket, peer: Peer, share: int, timer: Timer) -> None:
        self.sock, self.peer, self.share, self.timer = sock, peer, share, timer


class Gate:
    """Pending connections; `admit` gets the socket of each that sent a context, and owns it."""

    def __init__(
        self,
        reactor: Reactor,
        listener: socket.socket,
        parser: Parser,
        grants: Grants,
        admit: Admit,
        refused: Refused,
        *,
        timeout_s: float,
        max_pending: int,
        max_pending_per_uid: int,
    ) -> None:
        self._reactor, self._listener, self._parser, self._grants = reactor, listener, parser, grants
        self._admit, self._refused = admit, refused
        self._timeout_s, self._max_pending, self._max_share = timeout_s, max_pending, max_pending_per_uid
        self._open = False
        self._pending: dict[int, _Pending] = {}
        self._shares: Counter[int] = Counter()

    def open(self) -> None:
        """Accept from now on. Idempotent."""
        if self._open:
            return
        self._open = True
        self._reactor.add(self._listener.fileno(), select.EPOLLIN, self._on_connections)

    def _on_connections(self, _: int) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock = seqpacket.accept(self._listener)
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._reactor.remove(self._listener.fileno())
                self._open = False
                self._reactor.later(REST_S, self.open)
                return
            if sock is None:
                return
            self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        peer = seqpacket.peer(sock)
        share = peer.uid if self._grants.knows(peer.uid) else _STRANGERS
        if len(self._pending) >= self._max_pending or self._shares[share] >= self._max_share:
            self._refuse(sock, Refusal(Code.LIMIT, "too many connections wait for admission; try again"))
            return
        fd = sock.fileno()
        timer = self._reactor.later(self._timeout_s, lambda: self._on_timeout(fd))
        self._pending[fd] = _Pending(sock, peer, share, timer)
        self._shares[share] += 1
        self._reactor.add(fd, select.EPOLLIN | select.EPOLLRDHUP, lambda mask: self._on_context(fd, mask))

    def _on_timeout(self, fd: int) -> None:
        waited = f"no context came within {self._timeout_s:g} s"
        self._refuse(self._release(fd).sock, Refusal(Code.TIMEOUT, waited))

    def _on_context(self, fd: int, mask: int) -> None:
        sock = self._pending[fd].sock
        received = seqpacket.receive(sock, MAX_CONTEXT + 1)
        if received is None:
            return
        data, descriptors = received
        for descriptor in descriptors:
            os.close(descriptor)
        pending = self._release(fd)
        if not data and not descriptors and mask & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
            self._refused(Code.GONE)
            sock.close()
            return
        try:
            self._grants.check_uid(pending.peer.uid)
            request = self._read(data, len(descriptors))
            self._grants.check(pending.peer.uid, request.tenant, request.transport)
        except Refusal as refusal:
            self._refuse(sock, refusal)
            return
        self._admit(sock, pending.peer, request)

    def _read(self, data: bytes, descriptors: int) -> ContextRequest:
        if descriptors:
            raise Refusal(Code.INVALID_CONTEXT, "the first datagram must carry no descriptors")
        if not data:
            raise Refusal(Code.INVALID_CONTEXT, "the first datagram is empty")
        if len(data) > MAX_CONTEXT:
            raise Refusal(Code.TOO_LARGE, f"a context has at most {MAX_CONTEXT} bytes")
        return self._parser(data)

    def _release(self, fd: int) -> _Pending:
        pending = self._pending.pop(fd)
        pending.timer.cancel()
        self._reactor.remove(fd)
        self._shares[pending.share] -= 1
        if not self._shares[pending.share]:
            del self._shares[pending.share]
        return pending

    def _refuse(self, sock: socket.socket, refusal: Refusal) -> None:
        self._refused(refusal.code)
        refuse(sock, refusal.answer())
