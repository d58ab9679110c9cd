"""A lock chamber for tests: an upgrader worker with fakes around it, all in this process and driven turn by turn.

Loopback TCP stands for the private namespace: a client of slot n comes from 127.1.0.n (or from ::1, slot 1, for IPv6).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from falkirk.linux import seqpacket
from falkirk.runtime.counters import Counters
from falkirk.upgrader import control
from falkirk.upgrader.worker import Worker
from falkirk.wire import handover
from falkirk.wire.handover import Closed, Connected, Hello, Message, Prepare

DEADLINE_S = 20.0
M = TypeVar("M", bound=Message)


def slot_of(address: str) -> int:
    return 1 if address == "::1" else int(address.rsplit(".", 1)[1])


def address_of(slot: int, family: socket.AddressFamily) -> str:
    return "::1" if family == socket.AF_INET6 else f"127.1.0.{slot}"


def packed(family: socket.AddressFamily) -> bytes:
    return socket.inet_pton(family, "::1" if family == socket.AF_INET6 else "127.0.0.1")


def listen(family: socket.AddressFamily, backlog: int = 128) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    sock.close()


class Chamber:
    """A worker, the flow worker that talks to it, and a server."""

    def __init__(
        self,
        directory: Path,
        *,
        family: socket.AddressFamily = socket.AF_INET,
        open_timeout_s: float = 30.0,
        uids: tuple[int, ...] | None = None,
        capacity: int = 100,
        connect: bool = True,
    ) -> None:
        import os

        self.family = family
        self.path = directory / "upgrader.worker.0.sock"
        self.listener, self.server = listen(family), listen(family)
        self.counters = Counters.create(control.COUNTERS)
        self.spans: list[control.SpanEnded] = []
        self.told: list[control.FromWorker] = []
        """What the worker says to its parent but spans."""
        self._devices = [os.open(os.devnull, os.O_RDWR) for _ in range(4)]
        setup = control.Setup(
            0,
            1,
            5,
            str(self.path),
            0o660,
            (os.getuid(),) if uids is None else uids,
            1024,
            1500,
            open_timeout_s,
            "",
            "info",
            "json",
        )
        self.worker = Worker(
            setup,
            [self.listener],
            slot_of,
            seqpacket.listen(self.path, 0o660),
            self._devices,
            self.counters,
            self._hear,
            capacity,
        )
        self.said: list[Message] = []
        self.fds: list[int] = []
        self.flow: socket.socket | None = None
        self._open: list[socket.socket] = [self.server]
        if connect:
            self.flow = self.connect_flow(10)
            self.until(lambda: len(self.said) >= 2)

    def _hear(self, said: control.FromWorker) -> bool:
        if isinstance(said, control.SpanEnded):
            self.spans.append(said)
        else:
            self.told.append(said)
        return True

    def connect_flow(self, generation: int, **fields: object) -> socket.socket:
        sock = seqpacket.connect(self.path)
        self._open.append(sock)
        hello = {"role": "flow", "worker": 0, "generation": generation} | fields
        seqpacket.send(sock, handover.encode([Hello(**hello)]))  # type: ignore[arg-type]
        return sock

    def turn(self, timeout: float = 0.02) -> None:
        self.worker.turn(timeout)
        while self.flow is not None and (received := seqpacket.receive(self.flow, 1 << 17)) is not None:
            if not received[0]:
                self.flow = None
                break
            self.said += handover.UPGRADER_TO_FLOW.decode(received[0])
            self.fds += received[1]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"didn't come; flow heard {self.said}"
            self.turn()

    def hear(self, kind: type[M]) -> M:
        """The next message of a kind; it is taken off."""
        self.until(lambda: any(isinstance(message, kind) for message in self.said))
        message = next(message for message in self.said if isinstance(message, kind))
        self.said.remove(message)
        return message

    def say(self, *messages: Message) -> None:
        assert self.flow is not None
        assert seqpacket.send(self.flow, handover.encode(messages))

    def prepare(self, slot: int = 1, port: int | None = None, **fields: Any) -> None:
        values: dict[str, object] = {
            "slot": slot,
            "flow_id": bytes([slot & 0xFF]) * 16,
            "destination": packed(self.family),
            "port": self.server.getsockname()[1] if port is None else port,
            "egress": b"",
            "connect_timeout_ms": 5000,
            "idle_timeout_s": 100,
            "treatment": "l4",
        }
        self.say(Prepare(**(values | fields)))  # type: ignore[arg-type]

    def hold(self, slot: int = 1, **fields: Any) -> socket.socket:
        """Prepare a slot until it is connected; the server's socket."""
        self.prepare(slot, **fields)
        assert self.hear(Connected).slot == slot
        peer, _ = self.server.accept()
        peer.setblocking(False)
        self._open.append(peer)
        return peer

    def client(self, slot: int = 1, receive_buffer: int = 0) -> socket.socket:
        """A client that connects from a slot."""
        sock = socket.socket(self.family)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((address_of(slot, self.family), 0))
        sock.setblocking(False)
        sock.connect_ex(self.listener.getsockname()[:2])
        self._open.append(sock)
        return sock

    def open(self, slot: int = 1, receive_buffer: int = 0, **fields: Any) -> tuple[socket.socket, socket.socket]:
        """A whole stream: the client's socket and the server's."""
        upstream = self.hold(slot, **fields)
        before = self.counters.read("opened")
        client = self.client(slot, receive_buffer)
        self.until(lambda: self.counters.read("opened") > before)
        return client, upstream

    def read(self, sock: socket.socket, count: int) -> bytes:
        """Exactly `count` bytes, or fewer up to the end."""
        data = bytearray()
        deadline = time.monotonic() + DEADLINE_S
        while len(data) < count:
            assert time.monotonic() < deadline, f"only {len(data)} of {count} bytes came"
            try:
                piece = sock.recv(count - len(data))
            except BlockingIOError:
                self.turn(0.01)
                continue
            if not piece:
                break
            data += piece
        return bytes(data)

    def at_end(self, sock: socket.socket) -> bool:
        return self.read(sock, 1) == b""

    def was_reset(self, sock: socket.socket) -> bool:
        """Does reading on lead to a RST (and not to an end)?"""
        try:
            while self.read(sock, 65536):
                pass
        except ConnectionResetError:
            return True
        return False

    def write_until_full(self, sock: socket.socket) -> int:
        """Write until nothing moves any more; the bytes written."""
        total, still = 0, 0
        block = bytes(256 * 1024)
        while still < 5:
            try:
                total += sock.send(block)
                still = 0
            except BlockingIOError:
                still += 1
            self.turn(0.02)
        return total

    def closed(self, slot: int = 1) -> Closed:
        message = self.hear(Closed)
        assert message.slot == slot
        return message

    def close(self) -> None:
        import os

        self.worker.close()
        for sock in self._open:
            sock.close()
        for fd in (*self._devices, *self.fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.counters.close()


@contextlib.contextmanager
def chamber(directory: Path, **fields: object) -> Iterator[Chamber]:
    made = Chamber(directory, **fields)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])
