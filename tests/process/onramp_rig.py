"""A rig for the on-ramp's worker: the real process, with this process as its parent, its flow worker and its producers.

All waits have a deadline; nothing sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import falkirk
from falkirk.linux import seqpacket
from falkirk.onramp import board, control, neighbours
from falkirk.onramp.control import Ended, Opened, Setup, State, Update
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, TenantRow, UserRow
from falkirk.runtime.counters import Counters
from falkirk.wire import handover
from falkirk.wire.handover import Adopt, Adopted, Hello, Trunk

DEADLINE_S = 30.0
M = TypeVar("M", bound=handover.Message)
C = TypeVar("C", bound=control.Message)

ROWS: tuple[Row, ...] = (
    TenantRow("t-acme", "acme", 100),
    NetworkRow("n-default", "t-acme", "default", True),
    NetworkRow("n-lab", "t-acme", "lab"),
    UserRow("u-ann", "t-acme", "ann", ("eng",)),
    DeviceRow(
        "d-laptop", "t-acme", "laptop", "ann", ("managed",), (b"\x64\x60\x00\x02", bytes(15) + b"\x02"), max_flows=7
    ),
    DeviceRow("d-off", "t-acme", "off", disabled=True),
    TenantRow("t-other", "other"),
    NetworkRow("n-other", "t-other", "default", True),
    DeviceRow("d-other", "t-other", "laptop"),
)
CONTEXT: dict[str, Any] = {"v": 1, "tenant": "acme", "device": "laptop"}


def readable(sock: socket.socket, deadline_s: float = DEADLINE_S) -> None:
    """Wait until there is something to read."""
    if not select.select([sock], [], [], deadline_s)[0]:
        raise TimeoutError(f"nothing to read within {deadline_s} s")


def datagram(sock: socket.socket) -> bytes:
    """The next datagram; no bytes at the end."""
    readable(sock)
    received = seqpacket.receive(sock, 1 << 17)
    assert received is not None
    return received[0]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition that can't be waited for otherwise."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition doesn't come true")
        select.select([], [], [], 0.005)


class FlowFake:
    """A flow worker: listens, says Hello, and takes or refuses tunnels as the test says."""

    def __init__(self, path: Path, worker: int = 0, listener: socket.socket | None = None) -> None:
        """`listener`: of another that takes another on-ramp worker's connection to the same flow worker."""
        self.listener = listener or seqpacket.listen(path)
        self.worker = worker
        self.link: socket.socket | None = None
        self.inbox: list[handover.Message] = []
        self.descriptors: list[int] = []

    def accept(self, generation: int | None = None, **hello: Any) -> Hello:
        """Take the on-ramp's connection; its Hello."""
        readable(self.listener)
        self.link = seqpacket.accept(self.listener)
        assert self.link is not None
        found = self.expect(Hello)
        mine = {"role": "flow", "worker": self.worker, "generation": generation or time.time_ns(), **hello}
        self.send(Hello(**mine))
        return found

    def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        assert self.link is not None
        while not self.inbox:
            readable(self.link)
            received = seqpacket.receive(self.link, handover.MAX_DATAGRAM)
            assert received is not None
            assert received[0], "the on-ramp closed the link"
            self.inbox += handover.ONRAMP_TO_FLOW.decode(received[0])
            self.descriptors += received[1]
        message = self.inbox.pop(0)
        assert isinstance(message, kind), message
        return message

    def trunk(self) -> socket.socket:
        """The next trunk, taken: this worker's end."""
        self.expect(Trunk)
        trunk = socket.socket(fileno=self.descriptors.pop(0))
        trunk.setblocking(False)
        return trunk

    def adopt(self, *, take: bool = True) -> tuple[Adopt, socket.socket]:
        """The next Adopt and its tunnel; taken, so the greeting is written."""
        message = self.expect(Adopt)
        tunnel = socket.socket(fileno=self.descriptors.pop(0))
        if take:
            if message.greeting:
                tunnel.send(message.greeting)
            self.send(Adopted(message.tunnel))
        return message, tunnel

    def send(self, *messages: handover.Message, fds: tuple[int, ...] = ()) -> None:
        """Say something."""
        assert self.link is not None
        assert seqpacket.send(self.link, handover.encode(messages), fds)

    def die(self) -> None:
        """Leave the listener, drop the link, as a killed worker does."""
        if self.link is not None:
            self.link.close()
        self.link = None
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.inbox, self.descriptors = [], []

    def close(self) -> None:
        """Leave altogether."""
        self.die()
        self.listener.close()


class Rig:
    """The worker process and its parent's end."""

    def __init__(
        self, directory: Path, flow_workers: int = 1, *, outside: socket.socket | None = None, **settings: Any
    ) -> None:
        """`outside`: WireGuard's socket."""
        self.directory, self.outside = directory, outside
        self.tunnel_path = directory / "tunnel.sock"
        self.counters = Counters.create(control.COUNTERS)
        self.board = board.create(settings.get("workers", 1))
        self.inbox = neighbours.inbox()
        self.listener = seqpacket.listen(self.tunnel_path, 0o666)
        self.reports: list[control.Message] = []
        self.kept: list[socket.socket] = []
        self.number = 0
        mine = os.getuid()
        self.setup = Setup(
            **{
                "worker": 0,
                "workers": 1,
                "mesh_dir": str(directory),
                "flow_workers": flow_workers,
                "peer_uids": (mine,),
                "grants": ((mine, ("*",)),),
                "device_uids": (),
                "parser": "json",
                "mtu": 1400,
                "first_tunnel": 1,
                "context_timeout_ms": 10_000,
                "adopt_timeout_ms": 10_000,
                "max_pending": 1024,
                "max_pending_per_uid": 128,
                "max_tunnels": 1000,
                "max_tunnels_per_device": 100,
                "log_level": "error",
                **settings,
            }
        )
        self.start()

    def start(self) -> None:
        """Start the process."""
        self.parent, theirs = seqpacket.pair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "falkirk.onramp.worker", "--control-fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(Path(falkirk.__file__).parents[1])},
            )
        outside = [self.outside.fileno(), self.inbox[0].fileno()] if self.outside is not None else []
        self.tell(self.setup, (self.counters.fd, self.board.fd, self.listener.fileno(), *outside))

    def kill(self) -> None:
        """kill -9, and forget its reports."""
        self.process.kill()
        self.process.wait()
        self.parent.close()
        self.reports.clear()

    def tell(self, message: control.Message, fds: tuple[int, ...] = ()) -> None:
        """Say something as the parent."""
        assert seqpacket.send(self.parent, control.encode(message), fds)

    def update(self, *changed: Row, removed: tuple[str, ...] = (), full: bool = False) -> None:
        """Push a transaction."""
        self.number += 1
        memory = os.memfd_create("rows", os.MFD_CLOEXEC)
        try:
            os.write(memory, b"".join(control.pack(changed, removed)))
            self.tell(Update(full, "e", self.number), (memory,))
        finally:
            os.close(memory)

    def ready(self, *rows: Row) -> None:
        """Push the whole state, and wait until it is applied and every link is up."""
        self.update(*(rows or ROWS), full=True)
        self.report(State, lambda state: state.number == self.number and all(state.links))

    def report(self, kind: type[C], wanted: Callable[[C], bool] = lambda _: True) -> C:
        """The next report of this kind that is wanted; others stay."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for place, message in enumerate(self.reports):
                if isinstance(message, kind) and wanted(message):
                    return self.reports.pop(place)  # type: ignore[return-value]  # it is of this kind
            readable(self.parent, max(0.0, deadline - time.monotonic()))
            data = datagram(self.parent)
            assert data, "the worker has ended"
            self.reports.append(control.TO_PARENT.decode(data))

    def connect(self) -> socket.socket:
        """A producer that hasn't said anything."""
        return seqpacket.connect(self.tunnel_path)

    def producer(self, context: dict[str, Any] | bytes = CONTEXT) -> socket.socket:
        """A producer that has sent a first datagram."""
        sock = self.connect()
        sock.send(context if isinstance(context, bytes) else json.dumps(context).encode())
        return sock

    def opened(self, flow: FlowFake, context: dict[str, Any] = CONTEXT) -> tuple[socket.socket, Adopt, socket.socket]:
        """A producer whose tunnel the flow worker has taken: (producer, Adopt, flow's end)."""
        sock = self.producer(context)
        message, tunnel = flow.adopt()
        assert b"admitted" in datagram(sock)
        self.report(Opened, lambda opened: opened.tunnel == message.tunnel)
        self.kept += [sock, tunnel]  # a socket that a test drops must stay open
        return sock, message, tunnel

    def ended(self, tunnel: int) -> str:
        """Why a tunnel ended."""
        return self.report(Ended, lambda ended: ended.tunnel == tunnel).reason

    def refusal(self, sock: socket.socket) -> str:
        """The code of the answer, after which the connection ends."""
        answer = json.loads(datagram(sock))
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"code", "message"}
        assert answer["error"]["message"]
        assert datagram(sock) == b""
        code: str = answer["error"]["code"]
        return code

    def descriptors(self) -> int:
        """How many descriptors the worker has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def close(self) -> None:
        """End the process, which must not have ended before."""
        assert self.process.poll() is None, "the worker has crashed"
        self.parent.close()
        try:
            assert self.process.wait(DEADLINE_S) == 0
        finally:
            self.process.kill()
            self.process.wait()
            for sock in (*self.kept, *self.inbox):
                sock.close()
            self.listener.close()
            self.tunnel_path.unlink()
            self.counters.close()
            self.board.close()


@contextlib.contextmanager
def rig(
    directory: Path, flow_workers: int = 1, *, outside: socket.socket | None = None, **settings: Any
) -> Iterator[tuple[Rig, list[FlowFake]]]:
    """A ready worker and its flow workers."""
    flows = [FlowFake(directory / f"flow.worker.{number}.sock", number) for number in range(flow_workers)]
    made = Rig(directory, flow_workers, outside=outside, **settings)
    try:
        for flow in flows:
            flow.accept()
        made.ready()
        yield made, flows
        made.close()
    finally:
        made.process.kill()
        made.process.wait()
        for flow in flows:
            flow.close()
