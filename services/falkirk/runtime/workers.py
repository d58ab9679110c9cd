"""Packet workers and helpers: child processes that a service's parent starts, talks to and starts again.

Each place (worker 0, 1, …) holds one process and one SEQPACKET pair made for it; the child inherits its end by number (`--control-fd`) and exits
when the pair ends, so it never outlives its parent. A process that ends is started again: at once the first time, then after 50 ms doubling to
2 s, from the beginning once one has lived 5 s (`falkirk.runtime.backoff`). `generation` counts starts of a place, from 1.

Callbacks run in the loop, in order, per place: `on_start(worker, generation)`, any number of `on_message(worker, data, fds)`, then
`on_exit(worker, status)` (the exit code, or minus the signal). Descriptors that `on_message` gets are its own to close. A callback that raises
ends the pool, and with it the service: it is a fault of the parent.

`send` never blocks: what the socket doesn't take waits in a queue of at most `QUEUE_MESSAGES`, descriptors duplicated, and goes out in order.
A worker that doesn't read until the queue is full is killed and started again: it is stuck, and silence would be worse.

On cancellation (drain) children get SIGTERM, and SIGKILL after `grace` seconds.

Limits: a datagram holds at most what SO_SNDBUF allows (about 200 KiB by default) and 16 descriptors. No gRPC here: the upgrader starts its helper
before gRPC. SIGKILL of the parent closes the pairs; children notice by EPOLLHUP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from falkirk.linux import seqpacket
from falkirk.runtime.backoff import Backoff

if TYPE_CHECKING:
    from falkirk.api.net.v1.net_pb2 import ProcessInfo

QUEUE_MESSAGES: Final = 4096
MAX_DATAGRAM: Final = 256 * 1024
MAX_DESCRIPTORS: Final = 16
BUDGET: Final = 64
"""Messages read from one worker before the loop gets its turn."""
GRACE_SECONDS: Final = 3.0
SEND_BUFFER: Final = 4 * 1024 * 1024
"""Bytes asked of the kernel, which gives at most net.core.wmem_max."""
ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Packet processes have one thread; the linear algebra that numpy brings along would start one a core."""

OnMessage = Callable[[int, bytes, list[int]], None]
OnStart = Callable[[int, int], None]
OnExit = Callable[[int, int], None]


class WorkerPool:
    """`count` places for processes of one kind; `name` is "flow.worker", places are "flow.worker.0" and so on.

    `command(worker, fd)` gives the argument list of a process whose control socket is the descriptor `fd`.
    """

    def __init__(
        self,
        name: str,
        count: int,
        command: Callable[[int, int], list[str]],
        on_message: OnMessage,
        on_start: OnStart | None = None,
        on_exit: OnExit | None = None,
        *,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._places = [
            _Place(f"{name}.{worker}", worker, command, on_message, on_start, on_exit, grace) for worker in range(count)
        ]

    async def run(self) -> None:
        """Keeps all places filled until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for place in self._places:
                tasks.create_task(place.run())

    def send(self, worker: int, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Sends a message with copies of descriptors; False where no process is there to take it."""
        return self._places[worker].send(data, fds)

    def kill(self, worker: int) -> None:
        """Kills a worker's process (it is started again)."""
        self._places[worker].kill()

    def alive(self, worker: int) -> bool:
        """True while the worker's process runs."""
        return self._places[worker].pid is not None

    def pids(self) -> list[int]:
        """Process ids of the processes that run."""
        return [place.pid for place in self._places if place.pid is not None]

    def processes(self) -> list[ProcessInfo]:
        """The processes that run, for Stats."""
        return [info for place in self._places if (info := place.info()) is not None]


class Child:
    """One helper process, kept like a worker; `name` is "upgrader.helper". Callbacks go without a worker's number."""

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        on_message: Callable[[bytes, list[int]], None],
        on_start: Callable[[int], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
        *,
        grace: float = GRACE_SECONDS,
        pass_fds: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._place = _Place(
            name,
            0,
            lambda _worker, fd: command(fd),
            lambda _worker, data, fds: on_message(data, fds),
            (lambda _worker, generation: on_start(generation)) if on_start else None,
            (lambda _worker, status: on_exit(status)) if on_exit else None,
            grace,
            pass_fds,
        )

    async def run(self) -> None:
        """Keeps the process running until cancelled."""
        await self._place.run()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Sends a message with copies of descriptors; False where the process isn't there to take it."""
        return self._place.send(data, fds)

    def kill(self) -> None:
        """Kills the process (it is started again)."""
        self._place.kill()

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._place.pid

    def processes(self) -> list[ProcessInfo]:
        """The process if it runs, for Stats."""
        info = self._place.info()
        return [] if info is None else [info]


class _Place:
    """One process after another, each with its own pair."""

    def __init__(
        self,
        name: str,
        worker: int,
        command: Callable[[int, int], list[str]],
        on_message: OnMessage,
        on_start: OnStart | None,
        on_exit: OnExit | None,
        grace: float,
        pass_fds: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._name, self._worker, self._command, self._grace = name, worker, command, grace
        self._on_message, self._on_start, self._on_exit = on_message, on_start, on_exit
        self._pass_fds = pass_fds
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._generation = 0
        self._started_ns = 0
        self._failed: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        backoff = Backoff()
        while True:
            started = time.monotonic()
            await self._live()
            await asyncio.sleep(backoff.ended(time.monotonic() - started))

    async def _live(self) -> None:
        """One process, from its start to its end."""
        loop = asyncio.get_running_loop()
        self._socket, process = self._spawn()
        self._process = process
        self._failed = loop.create_future()
        exited = loop.create_future()
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, _settle, exited)
        loop.add_reader(self._socket, self._readable)
        try:
            if self._on_start is not None:
                self._on_start(self._worker, self._generation)
            await asyncio.wait((exited, self._failed), return_when=asyncio.FIRST_COMPLETED)
            while not self._failed.done() and self._drain():
                pass  # its last words
        finally:
            loop.remove_reader(pidfd)
            try:
                if process.poll() is None:
                    await self._end(process, pidfd)
            finally:
                os.close(pidfd)
                self._forget(loop)
        if self._failed.done():
            self._failed.result()
        if self._on_exit is not None:
            self._on_exit(self._worker, process.returncode)

    def _spawn(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        """A process with the other end of a new pair. vfork and exec: the loop stands still for about a millisecond."""
        ours, theirs = seqpacket.pair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            try:
                process = subprocess.Popen(
                    self._command(self._worker, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *self._pass_fds()),
                    env=os.environ | ONE_THREAD,
                )
            except BaseException:
                ours.close()
                raise
        self._generation += 1
        self._started_ns = time.time_ns()
        return ours, process

    async def _end(self, process: subprocess.Popen[bytes], pidfd: int) -> None:
        """SIGTERM, then SIGKILL."""
        loop = asyncio.get_running_loop()
        exited = loop.create_future()
        loop.add_reader(pidfd, _settle, exited)
        try:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(exited, self._grace)
        finally:
            loop.remove_reader(pidfd)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._socket is not None:
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        self._socket = self._process = None
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()

    def send(self, data: bytes, fds: Sequence[int]) -> bool:
        if self._socket is None or self._process is None:
            return False
        if not self._queue:
            sent = _send(self._socket, data, fds)
            if sent is not None:
                return sent
            asyncio.get_running_loop().add_writer(self._socket, self._writable)
        if len(self._queue) >= QUEUE_MESSAGES:
            self.kill()
            return False
        self._queue.append((data, [os.dup(fd) for fd in fds]))
        return True

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)

    def _writable(self) -> None:
        assert self._socket is not None
        while self._queue:
            data, fds = self._queue[0]
            if _send(self._socket, data, fds) is None:
                return
            self._queue.popleft()
            _close_all(fds)
        asyncio.get_running_loop().remove_writer(self._socket)

    def _readable(self) -> None:
        self._drain()

    def _drain(self) -> bool:
        """Delivers at most `BUDGET` messages; True where there may be more."""
        if self._socket is None:
            return False
        try:
            for _ in range(BUDGET):
                message = seqpacket.receive(self._socket, MAX_DATAGRAM, MAX_DESCRIPTORS)
                if message is None:
                    return False
                if not message[0]:  # the other end is gone; the pidfd tells of the exit
                    asyncio.get_running_loop().remove_reader(self._socket)
                    return False
                self._on_message(self._worker, *message)
        except Exception as error:  # noqa: BLE001 - handed to `_live`, which raises it out of the pool
            asyncio.get_running_loop().remove_reader(self._socket)
            if self._failed is not None and not self._failed.done():
                self._failed.set_exception(error)
            return False
        return True

    def info(self) -> ProcessInfo | None:
        from falkirk.api.net.v1 import net_pb2

        if self._process is None:
            return None
        info = net_pb2.ProcessInfo(name=self._name, pid=self._process.pid, generation=self._generation)
        info.start_time.FromNanoseconds(self._started_ns)
        return info


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> bool | None:
    """True where it went, False where nobody is left to take it, None where the socket is full."""
    try:
        return seqpacket.send(sock, data, fds) or None
    except (BrokenPipeError, ConnectionResetError):
        return False
