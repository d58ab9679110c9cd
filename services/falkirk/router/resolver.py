"""The resolver's process as the router holds it: started, told what it must know, its records delivered.

    registry ─► book ─► names, routes ─┐ memories
    policy ─WatchRules─► replica ──────┴──────────► router.worker     (`falkirk.router.worker`)
    policy ◄─Deliver─── delivery ◄─── spool ◄──────────┘

While policy is away its rules on disk stay in force, and records wait in the spool. The router doesn't wait for the resolver to be ready: routes
matter more than names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2_grpc
from falkirk.router import control
from falkirk.router.settings import Settings
from falkirk.runtime import blob, roads
from falkirk.runtime.counters import Counters
from falkirk.runtime.delivery import Delivery
from falkirk.runtime.settings import Shell
from falkirk.runtime.workers import WorkerPool
from falkirk.wire import asker

log = structlog.get_logger()
LAST_RECORDS_SECONDS: Final = 2.0
"""How long policy may take for the last records of a drain; what it doesn't take is delivered after the next start."""


class ResolverProcess:
    """One process, started again where it ends."""

    def __init__(self, shell: Shell, settings: Settings) -> None:
        self._shell, self._settings = shell, settings
        self.counters = Counters.create(control.COUNTERS)
        self.ready = False
        """Whether devices can reach it."""
        self._memories: dict[str, int] = {}
        self._spool = shell.data("router") / "spool" / "resolver"
        self._delivery = Delivery(self._spool, lambda lines: None)
        self._pool = WorkerPool(
            "router.worker",
            1,
            lambda _, fd: [sys.executable, "-m", "falkirk.router.worker", "--control-fd", str(fd)],
            self._message,
            self._started,
            self._exited,
        )

    def tell(self, name: str, data: bytes) -> None:
        """A new snapshot of "rules", "routes" or "names"."""
        fd = os.memfd_create(f"falkirk-{name}", os.MFD_CLOEXEC)
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        old = self._memories.pop(name, None)
        if old is not None:
            os.close(old)
        self._memories[name] = fd
        self._pool.send(0, control.encode(control.Load(name)), (fd,))

    async def rules(self, path: Path, revision: net_pb2.Revision) -> None:
        """For a BlobReplica of the rules."""
        self.tell("rules", (await asyncio.to_thread(blob.load, path)).data)

    def processes(self) -> Sequence[net_pb2.ProcessInfo]:
        """It, for Stats."""
        return self._pool.processes()

    def pending(self) -> int:
        """Records that policy hasn't acknowledged."""
        return self._delivery.pending

    def _started(self, worker: int, generation: int) -> None:
        shell = self._shell
        start = control.Start(
            node=shell.node,
            mesh_dir=str(shell.run_dir / "mesh"),
            mode=roads.SOCKET_MODES["mesh"],
            uids=tuple(sorted({0, os.getuid(), *shell.mesh_uids})),
            spool=str(self._spool),
            settings=self._settings,
            log_level=shell.log.level,
            log_format=shell.log.format,
        )
        self._pool.send(worker, control.encode(start), (self.counters.fd,))
        for name, fd in self._memories.items():
            self._pool.send(worker, control.encode(control.Load(name)), (fd,))

    def _message(self, worker: int, data: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        match control.TO_PARENT.decode(data):
            case control.Ready():
                for name in (asker.DATAGRAMS, asker.STREAMS):
                    roads.own(self._shell.run_dir / "mesh" / name, self._shell.roads.mesh)
                self.ready = True
                log.info("resolver_ready")
            case control.Spooled():
                self._delivery.grown()
            case control.Loaded() as loaded:
                if loaded.error:
                    log.error("snapshot_refused", name=loaded.name, error=loaded.error)

    def _exited(self, worker: int, status: int) -> None:
        self.ready = False
        log.warning("worker_exited", worker=worker, status=status)
        for name in control.GAUGES:
            self.counters.view[self.counters.index[name]] = 0
        self._delivery.grown()

    async def run(self, stub: policy_service_pb2_grpc.AuditServiceStub) -> None:
        """Keep the process and deliver what it records, until cancelled; then it ends, and its last records are delivered."""
        async with asyncio.TaskGroup() as tasks:
            delivery = tasks.create_task(self._delivery.run(stub))
            try:
                await self._pool.run()
            finally:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_RECORDS_SECONDS):
                        self._delivery.grown()
                        await self._delivery.delivered()
                delivery.cancel()
                for name in (asker.DATAGRAMS, asker.STREAMS):
                    (self._shell.run_dir / "mesh" / name).unlink(missing_ok=True)
