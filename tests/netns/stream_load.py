"""Streams of every habit, between clients in one place and servers in another, watched by one thread.

Both ends of a stream are sockets of this process, so what became of each is known exactly: how many bytes of the pattern
came, whether one was wrong, and how it ended: "" (open), "eof", or the name of an errno. The server's end is found by a
number that the client sends first.

A stream that ends with "eof" although its sender hadn't ended it is a lie, and so is one that lacks bytes: `lies`.

Limit: paced by a tick of 100 ms, a few kilobytes each: this keeps connections busy, it measures nothing.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

TICK_S: Final = 0.1
PACE: Final = 8192
"""Bytes a tick of a sender that takes its time."""
GULP: Final = 65536
BULK: Final = 1 << 20
"""Bytes a tick of one that doesn't."""
PATTERN: Final = bytes(index % 251 for index in range(251 * 512))
ENDLESS: Final = 1 << 40
HELLO: Final = struct.Struct("!16sQ")
LENGTH: Final = struct.Struct("!Q")
SHORT_BYTES: Final = 20_000
BRIEF_S: Final = 15.0
"""A short stream that hasn't ended after this long is given up."""
FINISHED_BYTES: Final = 16_384


class Habit(enum.Enum):
    """What the two ends do."""

    DOWNLOAD = "the server sends without end, and doesn't say how much"
    DOWNLOAD_LENGTH = "the server says how much, and sends"
    BULK = "the server sends as fast as it can, the client reads all of it"
    SLOW_READER = "the server sends as fast as it can, the client reads little by little"
    IDLE = "one byte each way, then silence"
    UPLOAD = "the client sends without end"
    CLIENT_ENDED = "the client has sent its FIN, the server sends on"
    SERVER_ENDED = "the server has sent its FIN, the client sends on"
    FINISHED = "both have sent all and their FIN, the client hasn't read it yet"
    SHORT = "a few kilobytes, and both ends close"


LASTING: Final = tuple(habit for habit in Habit if habit not in (Habit.SHORT, Habit.BULK))
"""Those that cost little."""
_CLIENT_SENDS: Final = {Habit.UPLOAD, Habit.SERVER_ENDED}
_ENDS_AFTER: Final = {Habit.SHORT: SHORT_BYTES, Habit.FINISHED: FINISHED_BYTES, Habit.SERVER_ENDED: 1}
_SERVER_SENDS: Final = {Habit.DOWNLOAD, Habit.DOWNLOAD_LENGTH, Habit.BULK, Habit.SLOW_READER, Habit.CLIENT_ENDED}


@dataclass(eq=False)
class End:
    """One end of a stream."""

    sock: socket.socket
    connected: bool = False
    to_send: int = 0
    """Bytes of the pattern that are still to be sent."""
    then_fin: bool = False
    reads: bool = True
    eof: bool = False
    received: int = 0
    sent: int = 0
    expects: int = -1
    """Bytes of the pattern after which an end is true; negative where every end is a lie."""
    skip: int = 0
    """Bytes of a header that come before the pattern."""
    outcome: str = ""
    wrong: bool = False


@dataclass(eq=False)
class Stream:
    """A stream; `group` is the caller's."""

    number: int
    habit: Habit
    group: object
    client: End
    server: End | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def open(self) -> bool:
        """Neither end has heard of an end that is one."""
        return self.server is not None and not self.client.outcome and not self.server.outcome

    @property
    def steady(self) -> bool:
        """As far as its habit goes before something happens to it."""
        server = self.server
        if server is None:
            return False
        if self.habit is Habit.FINISHED:
            return server.outcome == "eof" and server.to_send == 0
        if self.habit is Habit.CLIENT_ENDED and not server.eof:
            return False
        return self.open and self.client.received > 0 and (self.habit not in _CLIENT_SENDS or server.received > 0)

    @property
    def progress(self) -> int:
        """Bytes that have come at the end that the habit sends to."""
        if self.server is None:
            return 0
        return self.server.received if self.habit in _CLIENT_SENDS else self.client.received

    @property
    def moves(self) -> bool:
        """Whether `progress` grows as long as the stream lives."""
        return self.habit in _CLIENT_SENDS or self.habit in _SERVER_SENDS

    def lies(self) -> list[str]:
        """What mustn't be, whatever happened: a wrong byte, or an end that looks complete and isn't."""
        found = []
        for name, end in (("client", self.client), ("server", self.server)):
            if end is None:
                continue
            if end.wrong:
                found.append(f"{self}: the {name} got a wrong byte")
            if end.eof and end.received != end.expects:
                found.append(f"{self}: the {name} saw an end after {end.received} bytes, sent were {end.expects}")
        return found

    def __str__(self) -> str:
        ends = [f"{end.outcome or 'open'} {end.received}" if end else "none" for end in (self.client, self.server)]
        return f"stream {self.number} ({self.habit.name}, {self.group}; client {ends[0]}, server {ends[1]})"


class Load:
    """All streams; `close` ends them and the thread."""

    def __init__(self, listeners: Iterable[socket.socket]) -> None:
        self.streams: dict[int, Stream] = {}
        self.short: list[Stream] = []
        """Short streams that are over."""
        self._numbers = itertools.count(1)
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._jobs: list[Callable[[], None]] = []
        self._guard = threading.Lock()
        self._running = True
        self._sources: list[Callable[[], Stream | None]] = []
        for listener in listeners:
            listener.setblocking(False)
            self._watch(listener, select.EPOLLIN, partial(self._accept, listener))
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def begin(self, habit: Habit, sock: socket.socket, address: tuple[str, int], group: object) -> Stream:
        """Connect a fresh socket, and have the stream behave."""
        stream = Stream(next(self._numbers), habit, group, End(sock))
        self._do(lambda: self._begin(stream, address))
        return stream

    def keep_brief(self, source: Callable[[], tuple[socket.socket, tuple[str, int], object]]) -> None:
        """From now on always have one short stream of this source under way."""

        def start() -> Stream:
            sock, address, group = source()
            stream = Stream(next(self._numbers), Habit.SHORT, group, End(sock))
            self._begin(stream, address)
            return stream

        self._do(lambda: self._sources.append(_renewing(start, self.short.append)))

    def read_on(self, streams: Iterable[Stream]) -> None:
        """Let clients that haven't read do so."""

        chosen = list(streams)

        def resume() -> None:
            for stream in chosen:
                stream.client.reads = True

        self._do(resume)

    def forget(self, stream: Stream) -> None:
        """Close both ends."""
        self._do(lambda: self._forget(stream))

    def close(self) -> None:
        """Stop, and close every socket. Doing it twice is doing it once."""
        if not self._running:
            return
        self._do(lambda: setattr(self, "_running", False))
        self._thread.join()
        for stream in list(self.streams.values()):
            self._forget(stream)
        self._epoll.close()
        os.close(self._wake)

    # the thread

    def _do(self, job: Callable[[], None]) -> None:
        with self._guard:
            self._jobs.append(job)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        tick = time.monotonic()
        while self._running:
            for fd, mask in self._epoll.poll(max(0.0, tick + TICK_S - time.monotonic())):
                if fd == self._wake:
                    os.eventfd_read(fd)
                    with self._guard:
                        jobs, self._jobs = self._jobs, []
                    for job in jobs:
                        job()
                elif fd in self._handlers:
                    self._handlers[fd](mask)
            if time.monotonic() >= tick + TICK_S:
                tick = time.monotonic()
                self._tick(tick)

    def _tick(self, now: float) -> None:
        for stream in list(self.streams.values()):
            for end in (stream.client, stream.server):
                if end is not None and end.connected and not end.outcome:
                    self._turn(stream, end)
            if stream.habit is Habit.SHORT and not stream.client.outcome and now - stream.started > BRIEF_S:
                self._over(stream.client, "given up")
                self._finish_short(stream)
        for renew in self._sources:
            renew()

    def _watch(self, sock: socket.socket, mask: int, handler: Callable[[int], None]) -> None:
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock, mask)

    def _begin(self, stream: Stream, address: tuple[str, int]) -> None:
        self.streams[stream.number] = stream
        sock = stream.client.sock
        sock.setblocking(False)
        self._prepare(stream)
        sock.connect_ex(address)
        self._watch(sock, select.EPOLLOUT, lambda mask: self._connected(stream, mask))

    @staticmethod
    def _prepare(stream: Stream) -> None:
        client, habit = stream.client, stream.habit
        if habit in _CLIENT_SENDS:
            client.to_send = ENDLESS
        elif habit in (Habit.CLIENT_ENDED, Habit.FINISHED):
            client.then_fin = True
        if habit is Habit.FINISHED:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.reads = False
        client.skip = LENGTH.size if habit is Habit.DOWNLOAD_LENGTH else 0
        # The server's answer to the client's number is one byte of the pattern.
        client.expects = _ENDS_AFTER.get(habit, -1)

    def _connected(self, stream: Stream, mask: int) -> None:
        end = stream.client
        code = end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._over(end, errno.errorcode[code])
            self._finish_short(stream)
            return
        try:
            end.sock.send(HELLO.pack(b"falkirk", stream.number))
        except OSError as error:
            self._over(end, errno.errorcode[error.errno or 0])
            self._finish_short(stream)
            return
        self._rewatch(stream, end)

    def _accept(self, listener: socket.socket, _: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                self._watch(sock, select.EPOLLIN, partial(self._greet, sock))

    def _greet(self, sock: socket.socket, _: int) -> None:
        """The client's number tells whose end this is."""
        try:
            hello = sock.recv(HELLO.size)
        except OSError:
            hello = b""
        stream = self.streams.get(HELLO.unpack(hello)[1]) if len(hello) == HELLO.size else None
        if stream is None:
            self._drop(sock)
            return
        server = stream.server = End(sock, to_send=1)
        habit = stream.habit
        if habit in _SERVER_SENDS:
            server.to_send = ENDLESS
        elif habit in (Habit.SHORT, Habit.FINISHED):
            server.to_send, server.then_fin = stream.client.expects, True
        elif habit is Habit.SERVER_ENDED:
            server.then_fin = True
        if habit is Habit.DOWNLOAD_LENGTH:
            sock.send(LENGTH.pack(ENDLESS))
        if habit in (Habit.CLIENT_ENDED, Habit.FINISHED, Habit.SHORT):
            server.expects = 0
        self._rewatch(stream, server)

    def _rewatch(self, stream: Stream, end: End) -> None:
        """Errors and hang-ups at once; bytes and FINs at the tick, which paces them."""
        end.connected = True
        self._handlers[end.sock.fileno()] = lambda mask: self._turn(stream, end)
        self._epoll.modify(end.sock, select.EPOLLET)
        self._turn(stream, end)

    def _turn(self, stream: Stream, end: End) -> None:
        try:
            self._send(stream, end)
            if end.reads:
                self._receive(stream, end)
            if end.eof and not end.to_send and not end.then_fin:
                self._over(end, "eof")
            elif code := end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._over(end, errno.errorcode[code])
        except OSError as error:
            self._over(end, errno.errorcode[error.errno or 0])
        self._finish_short(stream)

    def _send(self, stream: Stream, end: End) -> None:
        fast = stream.habit in (Habit.SLOW_READER, Habit.SHORT, Habit.FINISHED)
        left = min(end.to_send, BULK if stream.habit is Habit.BULK else (1 << 18) if fast else PACE)
        with contextlib.suppress(BlockingIOError):
            while left > 0:
                at = end.sent % 251
                count = end.sock.send(PATTERN[at : at + min(left, GULP)])
                end.sent += count
                end.to_send -= count
                left -= count
        if end.then_fin and not end.to_send:
            end.then_fin = False
            end.sock.shutdown(socket.SHUT_WR)

    def _receive(self, stream: Stream, end: End) -> None:
        left = GULP if stream.habit is Habit.SLOW_READER else BULK
        while left > 0 and not end.eof:
            try:
                data = end.sock.recv(min(left, GULP))
            except BlockingIOError:
                return
            left -= len(data)
            if not data:
                end.eof = True
                return
            taken = min(end.skip, len(data))
            end.skip -= taken
            data = data[taken:]
            at = end.received % 251
            end.wrong |= data != PATTERN[at : at + len(data)]
            end.received += len(data)

    def _finish_short(self, stream: Stream) -> None:
        if stream.habit is Habit.SHORT and stream.client.outcome:
            stream.ended = time.monotonic()
            self._forget(stream)

    def _over(self, end: End, outcome: str) -> None:
        end.outcome = outcome
        self._drop(end.sock)

    def _drop(self, sock: socket.socket) -> None:
        if self._handlers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)
        sock.close()

    def _forget(self, stream: Stream) -> None:
        for end in (stream.client, stream.server):
            if end is not None:
                self._drop(end.sock)
        self.streams.pop(stream.number, None)


def _renewing(start: Callable[[], Stream], over: Callable[[Stream], None]) -> Callable[[], None]:
    current: list[Stream] = []

    def renew() -> None:
        if current and current[0].client.outcome:
            over(current.pop())
        if not current:
            current.append(start())

    return renew
