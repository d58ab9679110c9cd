"""Pools of child processes: messages, descriptors, restarts, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from falkirk.runtime import workers
from falkirk.runtime.workers import Child, WorkerPool
from tests.process.in_loop import in_loop

WORKER = Path(__file__).with_name("runtime_worker.py")
DEADLINE = 15.0


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


class Seen:
    """What the callbacks were told, and a way to wait for it."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.exited: list[tuple[int, int]] = []
        self.messages: list[tuple[int, bytes]] = []
        self.fds: list[int] = []
        self._changed = asyncio.Event()

    def on_start(self, worker: int, generation: int) -> None:
        self.started.append((worker, generation))
        self._changed.set()

    def on_exit(self, worker: int, status: int) -> None:
        self.exited.append((worker, status))
        self._changed.set()

    def on_message(self, worker: int, data: bytes, fds: list[int]) -> None:
        self.messages.append((worker, data))
        self.fds += fds
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def running(seen: Seen, count: int = 2, grace: float = 3.0) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(
        "test.worker",
        count,
        lambda _worker, fd: [sys.executable, str(WORKER), str(fd)],
        seen.on_message,
        seen.on_start,
        seen.on_exit,
        grace=grace,
    )
    task = asyncio.create_task(pool.run())
    try:
        await seen.until(lambda: len(seen.started) >= count)
        yield pool
    finally:
        pids = pool.pids()
        task.cancel()
        await asyncio.wait((task,))
        assert pool.pids() == []
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


@in_loop
async def test_messages_and_descriptors_there_and_back() -> None:
    seen = Seen()
    async with running(seen) as pool:
        reader, writer = os.pipe()
        assert pool.send(0, b"hello", [writer])
        assert pool.send(1, b"you")
        os.close(writer)
        await seen.until(lambda: len(seen.messages) == 2)
        first, second = pool.pids()
        assert sorted(seen.messages) == [(0, b"%d hello" % first), (1, b"%d you" % second)]
        os.write(seen.fds[0], b"x")
        assert os.read(reader, 10) == b"x"
        os.close(seen.fds[0])
        os.close(reader)
        infos = pool.processes()
        assert [(info.name, info.pid, info.generation) for info in infos] == [
            ("test.worker.0", first, 1),
            ("test.worker.1", second, 1),
        ]
        assert infos[0].start_time.seconds > 0


@in_loop
async def test_a_worker_that_ends_is_started_again() -> None:
    seen = Seen()
    async with running(seen) as pool:
        pool.send(0, b"exit")
        await seen.until(lambda: (0, 2) in seen.started)
        assert seen.exited == [(0, 7)]
        os.kill(pool.pids()[0], signal.SIGKILL)
        await seen.until(lambda: (0, 3) in seen.started)
        assert seen.exited == [(0, 7), (0, -signal.SIGKILL)]
        pool.send(0, b"again")
        await seen.until(lambda: len(seen.messages) == 1)
        assert (1, 2) not in seen.started


@in_loop
async def test_a_full_socket_queues_in_order() -> None:
    seen = Seen()
    async with running(seen, count=1) as pool:
        pid = pool.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        for number in range(1000):
            assert pool.send(0, b"%04d" % number + bytes(8192))
        os.kill(pid, signal.SIGCONT)
        await seen.until(lambda: len(seen.messages) == 1000)
        assert [int(data.split()[1][:4]) for _, data in seen.messages] == list(range(1000))


@in_loop
async def test_a_stuck_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "QUEUE_MESSAGES", 10)
    seen = Seen()
    async with running(seen, count=1) as pool:
        pool.send(0, b"stuck")
        while pool.send(0, bytes(60000)):
            pass
        await seen.until(lambda: (0, 2) in seen.started)
        assert seen.exited == [(0, -signal.SIGKILL)]


@in_loop
async def test_drain_kills_what_does_not_listen() -> None:
    seen = Seen()
    async with running(seen, count=1, grace=0.1) as pool:
        pool.send(0, b"ignore")
        await seen.until(lambda: len(seen.messages) == 1)


@in_loop
async def test_a_callback_that_fails_ends_the_pool() -> None:
    def fail(worker: int, data: bytes, fds: list[int]) -> None:
        raise ValueError("the parent's fault")

    started = asyncio.Event()
    pool = WorkerPool(
        "test.worker",
        1,
        lambda _worker, fd: [sys.executable, str(WORKER), str(fd)],
        fail,
        lambda _worker, _generation: started.set(),
    )
    pool_run = asyncio.create_task(pool.run())
    async with asyncio.timeout(DEADLINE):
        await started.wait()
        assert pool.send(0, b"hello")
        with pytest.raises(ExceptionGroup):
            await pool_run
    assert pool.pids() == []


@in_loop
async def test_a_child_inherits_what_it_is_given() -> None:
    seen = Seen()
    child = Child(
        "test.helper",
        lambda fd: [sys.executable, str(WORKER), str(fd)],
        lambda data, fds: seen.on_message(0, data, fds),
        lambda generation: seen.on_start(0, generation),
        lambda status: seen.on_exit(0, status),
    )
    task = asyncio.create_task(child.run())
    await seen.until(lambda: bool(seen.started))
    assert child.send(b"hello")
    await seen.until(lambda: bool(seen.messages))
    assert seen.messages == [(0, b"%d hello" % (child.pid or 0))]
    assert [info.name for info in child.processes()] == ["test.helper"]
    child.kill()
    await seen.until(lambda: (0, 2) in seen.started)
    task.cancel()
    await asyncio.wait((task,))
    assert child.pid is None
