"""Bytes between the two sockets of a stream, by level-triggered epoll, each end with the exact mask that `stream` computes.

A read starts in one shared buffer: most reads are small, and two calls move them. A read that fills it shows bulk;
from then on that end is spliced through a pipe, which costs the CPU a third of copying. An empty pipe is nobody's: one
serves all streams in turn, and only bytes that the other end doesn't take stay in theirs (or, where no pipe is to be
had, in memory).

A turn moves at most `BUDGET` bytes of an end, so that no stream starves another. Sockets close at the end of the turn:
a descriptor's number isn't given to another stream while events of the old one are still in hand.

Errors: whatever a socket reports, also EHOSTUNREACH or ETIMEDOUT, ends the stream with RST both ways. Bytes that an end had sent before its
RST are passed first where the other end takes them at once, as TCP itself would have delivered them.

Limits: at most `MAX_PIPES` pipes (1 MiB, two descriptors) exist; stalled streams beyond that keep 64 KiB in memory each.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final

from falkirk.linux import sockets, splice
from falkirk.linux.sockets import Socket
from falkirk.upgrader.stream import DIALLED, READ, Command, End, Reason, Stream, fin, interest, took

BUFFER: Final = 64 * 1024
"""Bytes of one copied read; one that fills it shows bulk."""
PIPE: Final = 1024 * 1024
"""Bytes of one spliced read, at most."""
BULK_ENDS: Final = 16 * 1024
"""A spliced read of fewer bytes ends bulk."""
BUDGET: Final = 2 * 1024 * 1024
"""Bytes of one end that a turn moves before it looks at others."""
SPARE_PIPES: Final = 8
DESCRIPTORS: Final = 1024
"""The table of descriptors grows by this many."""
MAX_PIPES: Final = 128
_ERROR: Final = select.EPOLLERR | select.EPOLLHUP
_READABLE: Final = READ | _ERROR

TcpEnd = End[Socket]
TcpStream = Stream[Socket]


class Relay:
    """Every stream's sockets, from the dial on. `on_over(stream, reason)` is called once for each that was held."""

    def __init__(self, epoll: select.epoll, on_over: Callable[[TcpStream, str], None]) -> None:
        self._epoll = epoll
        self._on_over = on_over
        self._buffer = memoryview(bytearray(BUFFER))
        self._pipes = splice.Pipes(SPARE_PIPES, PIPE)
        self._kept: dict[TcpEnd, memoryview | splice.Pipe] = {}
        """What waits, by the end that sent it: an end is here exactly while its `waiting` isn't 0."""
        self._closing: list[Socket] = []
        self.streams: list[TcpStream | None] = [None] * DESCRIPTORS
        """By descriptor (a list, because those are dense: a quarter of a dict's memory); a stream in OPEN is here twice."""
        self.bytes_up = 0
        """Bytes that upstreams took since the relay was made."""
        self.bytes_down = 0
        """Bytes that clients took."""

    def dial(self, stream: TcpStream) -> None:
        """Watch a stream whose upstream connects; the first event is its owner's (`stream.phase` says so)."""
        self._register(stream, stream.upstream.handle.fileno(), DIALLED)

    def open(self, stream: TcpStream, client: Socket, now: float) -> None:
        """The client has come: relay."""
        stream.opened(client, READ, now)
        self._register(stream, client.fileno(), READ)
        end = stream.client
        assert end is not None
        self._watch(stream.upstream, end)

    def on_event(self, stream: TcpStream, fd: int, events: int, now: float) -> None:
        """Readiness of one of the stream's descriptors (not of one that is being dialled)."""
        end, other = stream.upstream, stream.client
        if other is None:
            if events & _ERROR and sockets.pending_error(end.handle):
                self.reset(stream, stream.reset_by(end))
            return
        if fd != end.handle.fileno():
            end, other = other, end
        stream.active = now
        if other.waiting:
            if not self._flush(stream, other, end):
                return
            # What waited is through, so there is probably more; to read it now spares four changes of masks.
            if not other.waiting and not other.ended and not self._read(stream, other, end):
                return
        if events & _READABLE:
            if not end.ended and not end.waiting:
                if not self._read(stream, end, other):
                    return
            elif events & _ERROR and sockets.pending_error(end.handle):
                # Parked, and its peer has reset: that doesn't wait for a stalled other end.
                self.reset(stream, stream.reset_by(end))
                return
        self._watch(end, other)
        self._watch(other, end)

    def _read(self, stream: TcpStream, end: TcpEnd, other: TcpEnd) -> bool:
        """Move what the end's peer has sent; False where the stream is over."""
        budget = BUDGET
        while budget > 0 and not end.waiting:
            moved = self._splice(stream, end, other) if end.bulk else self._copy(stream, end, other)
            if moved < 0:
                return False
            if not moved and end.bulk and budget == BUDGET and not end.ended:
                # splice(2) stops for good in front of urgent data, which recv(2) passes.
                end.bulk = False
                continue
            if not moved or not end.bulk:
                break
            budget -= moved
        return True

    def _copy(self, stream: TcpStream, end: TcpEnd, other: TcpEnd) -> int:
        """One read through the buffer: bytes moved, or -1 where the stream is over."""
        try:
            size = end.handle.recv_into(self._buffer)
        except BlockingIOError:
            return 0
        except OSError:
            return self.reset(stream, stream.reset_by(end))
        if size == 0:
            return self._obey(stream, fin(end, other), other)
        try:
            count = other.handle.send(self._buffer[:size])
        except BlockingIOError:
            count = 0
        except OSError:
            return self.reset(stream, stream.reset_by(other))
        self._count(stream, end, count)
        took(end, other, size, count)
        if count < size:
            self._kept[end] = memoryview(bytes(self._buffer[count:size]))
        end.bulk = size == BUFFER
        return size

    def _splice(self, stream: TcpStream, end: TcpEnd, other: TcpEnd) -> int:
        """One read through a pipe: bytes moved, or -1 where the stream is over."""
        if self._pipes.open >= MAX_PIPES:
            return self._copy(stream, end, other)
        try:
            pipe = self._pipes.take()
        except OSError:
            # No descriptors, or no memory for pipes: slower, not broken.
            return self._copy(stream, end, other)
        try:
            size = splice.splice(end.handle.fileno(), pipe.write, PIPE)
        except OSError:
            self._pipes.give_back(pipe, empty=False)
            return self.reset(stream, stream.reset_by(end))
        if not size:
            self._pipes.give_back(pipe, empty=True)
            return 0 if size is None else self._obey(stream, fin(end, other), other)
        end.bulk = size >= BULK_ENDS
        return size if self._pour(stream, end, other, pipe, size) else -1

    def _pour(self, stream: TcpStream, end: TcpEnd, other: TcpEnd, pipe: splice.Pipe, size: int) -> bool:
        """Empty a pipe of `size` bytes into the other end, or keep it; False where the stream is over."""
        sent = 0
        while sent < size:
            try:
                count = splice.splice(pipe.read, other.handle.fileno(), size - sent)
            except OSError:
                self._kept.pop(end, None)
                self._pipes.give_back(pipe, empty=False)
                self.reset(stream, stream.reset_by(other))
                return False
            if count is None:
                break
            sent += count
        self._count(stream, end, sent)
        command = took(end, other, size, sent)
        if end.waiting:
            self._kept[end] = pipe
            return True
        self._kept.pop(end, None)
        self._pipes.give_back(pipe, empty=True)
        return self._obey(stream, command, other) >= 0

    def _flush(self, stream: TcpStream, end: TcpEnd, other: TcpEnd) -> bool:
        """Offer the other end what waits for it; False where the stream is over."""
        kept = self._kept[end]
        if isinstance(kept, splice.Pipe):
            return self._pour(stream, end, other, kept, end.waiting)
        try:
            count = other.handle.send(kept)
        except BlockingIOError:
            return True
        except OSError:
            self.reset(stream, stream.reset_by(other))
            return False
        self._count(stream, end, count)
        command = took(end, other, end.waiting, count)
        if end.waiting:
            self._kept[end] = kept[count:]
            return True
        del self._kept[end]
        return self._obey(stream, command, other) >= 0

    def _count(self, stream: TcpStream, end: TcpEnd, count: int) -> None:
        if end is stream.upstream:
            self.bytes_down += count
        else:
            self.bytes_up += count

    def _obey(self, stream: TcpStream, command: Command | None, other: TcpEnd) -> int:
        """Carry out what followed from an event: 0, or -1 where the stream is over."""
        if command is Command.PASS_FIN:
            try:
                other.handle.shutdown(socket.SHUT_WR)
            except OSError:
                # ENOTCONN: its peer has reset already.
                return self.reset(stream, stream.reset_by(other))
        elif command is Command.FINISH:
            for end in (stream.client, stream.upstream):
                if end is not None:
                    sockets.fin_on_close(end.handle)
            self._over(stream, Reason.FINISHED)
            return -1
        return 0

    def reset(self, stream: TcpStream, reason: str) -> int:
        """End the stream with RST to whoever is connected; always -1."""
        self._over(stream, reason)
        return -1

    def _over(self, stream: TcpStream, reason: str) -> None:
        self.release(stream)
        self._on_over(stream, reason)

    def release(self, stream: TcpStream) -> None:
        """Forget a stream, its sockets and what waits; `on_over` isn't called."""
        for end in (stream.client, stream.upstream):
            if end is None:
                continue
            self.streams[end.handle.fileno()] = None
            self.bury(end.handle)
            if end.waiting:
                kept = self._kept.pop(end, None)
                if isinstance(kept, splice.Pipe):
                    self._pipes.give_back(kept, empty=False)

    def bury(self, handle: Socket) -> None:
        """Close a socket when the turn is over."""
        self._closing.append(handle)

    def close_buried(self) -> None:
        """At the end of a turn: close what is over (SO_LINGER makes it FIN or RST)."""
        for handle in self._closing:
            handle.close()
        self._closing.clear()

    def _register(self, stream: TcpStream, fd: int, mask: int) -> None:
        if fd >= len(self.streams):
            self.streams.extend([None] * (fd + DESCRIPTORS - len(self.streams)))
        self.streams[fd] = stream
        self._epoll.register(fd, mask)

    def _watch(self, end: TcpEnd, other: TcpEnd) -> None:
        mask = interest(end, other)
        if mask != end.mask:
            end.mask = mask
            self._epoll.modify(end.handle.fileno(), mask)

    def close(self) -> None:
        """Close what is over and the spare pipes; streams must be over."""
        self.close_buried()
        self._pipes.close()
