"""Six child processes, kept running: what is behind `falkirk up`.

Each service is what `python -m falkirk.<service>` is, but forked (`falkirk.cli.nursery`), in a process group of its own (so that Ctrl-C reaches the
supervisor alone), and is started again when it ends: at once, then after 50 ms doubling to 2 s (`falkirk.runtime.backoff`). A service that ends with
status 2 refuses its settings; nothing is gained by trying again, so the mesh ends. Children die with the supervisor (`falkirk.runtime.supervised`), and orphans of a killed service
are waited for here.

`run` ends when `stop` is set: services drain one after another in the reverse order of their start, `DRAIN_SECONDS` each, then SIGKILL.
`hurry` kills at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from falkirk.cli.nursery import Born, Nursery, Stillborn
from falkirk.runtime import supervised
from falkirk.runtime.backoff import Backoff
from falkirk.runtime.log import Log

DRAIN_SECONDS: Final = 12.0
"""A service's own grace is 5 s for calls and 3 s for its workers."""
REFUSED: Final = 2
ORPHAN_SECONDS: Final = 5.0


class Refused(Exception):
    """A service doesn't accept its settings."""


class Supervisor:
    """Keeps `services` running, in this order; `arguments` go to each. Made in a running loop."""

    def __init__(self, services: Sequence[str], arguments: Sequence[str], log: Log) -> None:
        self._nursery = Nursery(arguments)
        self._children = [_Child(service, self._nursery, log, self._reap) for service in services]
        self._log = log
        self.stop = asyncio.Event()
        self.killed = False
        """True where a service had to be killed at the end."""

    def pids(self) -> dict[str, int]:
        """Process id by service, of those that run."""
        return {child.service: child.process.pid for child in self._children if child.process is not None}

    def hurry(self) -> None:
        """Kills every service now."""
        self.killed = True
        for child in self._children:
            child.signal(signal.SIGKILL)

    async def run(self) -> None:
        """Starts all, keeps them running, drains them. Raises Refused, and Stillborn where no process can be made."""
        supervised.adopt_orphans()
        self._nursery.start()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        keepers: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                keepers = [tasks.create_task(child.keep()) for child in self._children]
                try:
                    await self.stop.wait()
                finally:
                    for child in self._children:
                        child.let_end()
                    await self._drain(keepers)
        except ExceptionGroup as group:
            # What is raised in an `except*` would come out as a group again.
            told = group.subgroup((Refused, Stillborn))
            if told is None:
                raise
            raise told.exceptions[0] from None
        finally:
            self._nursery.close()
            await self._orphans()
            loop.remove_signal_handler(signal.SIGCHLD)

    async def _drain(self, keepers: Sequence[asyncio.Task[None]]) -> None:
        for child, keeper in reversed(list(zip(self._children, keepers, strict=True))):
            self._log.debug("stopping", name=child.service)
            child.signal(signal.SIGTERM)
            if child.process is not None:
                await asyncio.wait((child.ended,), timeout=DRAIN_SECONDS)
                if not child.ended.done():
                    self._log.error("killed", name=child.service, after_seconds=DRAIN_SECONDS)
                    self.killed = True
                    child.signal(signal.SIGKILL)
                    await asyncio.wait((child.ended,))
            keeper.cancel()

    def _reap(self) -> bool:
        """Collects orphans that ended; our own children are their keepers' to collect. False where no child is left."""
        if self._nursery.labour:
            return True  # one that nobody knows yet may be among them; its keeper looks here when it ends
        own = set(self.pids().values())
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
            if found is None or found.si_pid in own:
                return True  # its keeper collects it, and then looks here again
            os.waitpid(found.si_pid, 0)

    async def _orphans(self) -> None:
        """Workers end with their parents' pairs; wait for the last of them."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < deadline:
            if not self._reap():
                return
            await asyncio.sleep(0.02)


class _Child:
    """One service, start after start."""

    def __init__(self, service: str, nursery: Nursery, log: Log, reap: Callable[[], bool]) -> None:
        self.service = service
        self._nursery = nursery
        self._reap = reap
        self.process: Born | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._log = log
        self._generation = 0

    def let_end(self) -> None:
        """From now on it isn't started again."""
        self._stopping = True

    def over(self) -> bool:
        """True once it isn't to be started again."""
        return self._stopping

    def signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def keep(self) -> None:
        backoff = Backoff()
        while not self.over():
            started = time.monotonic()
            status = await self._live()
            if self.over():
                return
            if status == REFUSED:
                raise Refused(f"{self.service} refuses to start, see above")
            wait = backoff.ended(time.monotonic() - started)
            self._log.warning("service_ended", name=self.service, status=status, again_in_seconds=wait)
            await asyncio.sleep(wait)

    async def _live(self) -> int:
        """One process, from start to end; its status."""
        loop = asyncio.get_running_loop()
        self._generation += 1
        birth = asyncio.ensure_future(self._nursery.bear(self.service, self._generation))
        try:
            process = await asyncio.shield(birth)
        except asyncio.CancelledError:
            process = await birth
            process.kill()
            process.wait()
            raise
        self.ended = ended = loop.create_future()
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, _settle, ended)
        self.process = process
        try:
            await asyncio.shield(ended)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            if not ended.done():
                process.kill()
            process.wait()
            self.process = None
            self._reap()
        return process.wait()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
