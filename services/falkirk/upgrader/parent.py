"""The upgrader's parent: gives each worker its descriptors, knows when all are there, passes spans on.

The service is ready once the namespace is made and every worker listens for its flow worker. A worker that dies is
started again with the same devices, listeners and counters; clients that its listener had taken in meanwhile are reset by the new one, since
it expects none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import structlog

from falkirk.runtime import roads, telemetry
from falkirk.runtime.counters import Counters
from falkirk.runtime.settings import Shell
from falkirk.runtime.workers import WorkerPool
from falkirk.upgrader import control
from falkirk.upgrader.namespace import PrivateNamespace
from falkirk.upgrader.settings import Settings

log = structlog.get_logger()


class Lock:
    """The whole lock: namespace and workers. `on_ready` hears of every change."""

    def __init__(
        self, shell: Shell, settings: Settings, uids: frozenset[int], on_ready: Callable[[bool], None]
    ) -> None:
        self._shell = shell
        self._settings = settings
        self._uids = uids
        self._on_ready = on_ready
        self._ready: set[int] = set()
        self.namespace = PrivateNamespace(settings.helper(shell.workers))
        self.counters = [Counters.create(control.COUNTERS) for _ in range(shell.workers)]
        self.pool = WorkerPool("upgrader.worker", shell.workers, _command, self._hear, self._started, self._exited)

    async def run(self) -> None:
        """Starts workers once the namespace is there, and keeps them until cancelled."""
        await self.namespace.ready.wait()
        await self.pool.run()

    def _started(self, worker: int, generation: int) -> None:
        log.info("worker_started", worker=worker, generation=generation)
        devices = self.namespace.devices[worker]
        setup = control.Setup(
            worker=worker,
            workers=self._shell.workers,
            generation=time.time_ns(),
            path=str(self._shell.run_dir / "mesh" / f"upgrader.worker.{worker}.sock"),
            mode=roads.SOCKET_MODES["mesh"],
            uids=tuple(sorted(self._uids)),
            listener_port=devices.port,
            mtu=devices.vnet_mtu,
            open_timeout_s=self._settings.open_timeout_s,
            congestion=self._settings.upstream_congestion,
            log_level=self._shell.log.level,
            log_format=self._shell.log.format,
        )
        descriptors = [self.counters[worker].fd, *self.namespace.descriptors(worker)]
        self.pool.send(worker, control.encode(setup), descriptors)

    def _hear(self, worker: int, data: bytes, _fds: list[int]) -> None:
        match control.FROM_WORKER.decode(data):
            case control.Ready():
                path = self._shell.run_dir / "mesh" / f"upgrader.worker.{worker}.sock"
                roads.own(path, self._shell.roads.mesh)
                self._ready.add(worker)
                self._on_ready(len(self._ready) == self._shell.workers)
            case control.SpanEnded() as span:
                telemetry.emit_span(
                    span.name,
                    span.trace_id,
                    span.parent_span_id,
                    None,
                    span.start_ns,
                    span.end_ns,
                    span.attributes,
                    span.status,
                )

    def _exited(self, worker: int, status: int) -> None:
        log.warning("worker_exited", worker=worker, status=status, streams=self.counters[worker].read("streams"))
        for name in control.GAUGES:
            counters = self.counters[worker]
            counters.view[counters.index[name]] = 0
        self._ready.discard(worker)
        self._on_ready(False)


def _command(_worker: int, fd: int) -> list[str]:
    return [sys.executable, "-m", "falkirk.upgrader.worker", "--control-fd", str(fd)]
