"""The upgrader's parent: gives each worker its descriptors, knows when all are there, passes spans on.

The service is ready once both namespaces are made and every worker listens for its flow worker. Each worker has a pair with the lowering namespace's
helper, made anew whenever one of the two is started. A worker that dies is
started again with the same devices, listeners and counters; clients that its listener had taken in meanwhile are reset by the new one, since
it expects none.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

import structlog

from falkirk.linux import namespace_messages, seqpacket
from falkirk.linux.namespace_messages import Purpose
from falkirk.runtime import roads, telemetry
from falkirk.runtime.counters import Counters
from falkirk.runtime.settings import Shell
from falkirk.runtime.workers import WorkerPool
from falkirk.upgrader import control
from falkirk.upgrader.errands import Errands
from falkirk.upgrader.namespace import PrivateNamespace
from falkirk.upgrader.settings import Settings

log = structlog.get_logger()


class Lock:
    """The whole lock: namespaces and workers. `on_ready` hears of every change."""

    def __init__(
        self, shell: Shell, settings: Settings, uids: frozenset[int], on_ready: Callable[[bool], None]
    ) -> None:
        self._shell = shell
        self._settings = settings
        self._uids = uids
        self._on_ready = on_ready
        self._ready: set[int] = set()
        self.namespace = PrivateNamespace("upgrader.helper", settings.helper(shell.workers, Purpose.LIFT))
        self.lowering = PrivateNamespace(
            "upgrader.lower_helper", settings.helper(shell.workers, Purpose.LOWER), self._new_helper
        )
        self.counters = [Counters.create(control.COUNTERS) for _ in range(shell.workers)]
        self.pool = WorkerPool("upgrader.worker", shell.workers, _command, self._hear, self._started, self._exited)
        self.errands = Errands(shell.workers, self.pool.send)

    async def run(self) -> None:
        """Starts workers once the namespaces are there, and keeps them until cancelled."""
        await self.namespace.ready.wait()
        await self.lowering.ready.wait()
        await self.pool.run()

    def _helper_pair(self, worker: int) -> socket.socket:
        """The worker's end of a new pair with the lowering namespace's helper; where that is away the pair ends at once."""
        ours, theirs = seqpacket.pair()
        with theirs:
            self.lowering.helper.send(namespace_messages.encode(namespace_messages.Serve(worker)), [theirs.fileno()])
        return ours

    def _new_helper(self) -> None:
        for worker in range(self._shell.workers):
            if self.pool.alive(worker):
                with self._helper_pair(worker) as pair:
                    self.pool.send(worker, control.encode(control.HelperPair()), [pair.fileno()])

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
        vnet, raw, *listeners = self.namespace.descriptors(worker)
        lowering = self.lowering.descriptors(worker)
        with self._helper_pair(worker) as pair:
            descriptors = [self.counters[worker].fd, vnet, raw, *lowering, pair.fileno(), *listeners]
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
            case control.LowerOpened() | control.LowerOver() as said:
                self.errands.hear(said)

    def _exited(self, worker: int, status: int) -> None:
        log.warning("worker_exited", worker=worker, status=status, streams=self.counters[worker].read("streams"))
        for name in control.GAUGES:
            counters = self.counters[worker]
            counters.view[counters.index[name]] = 0
        self._ready.discard(worker)
        self._on_ready(False)
        self.errands.worker_lost(worker)


def _command(_worker: int, fd: int) -> list[str]:
    return [sys.executable, "-m", "falkirk.upgrader.worker", "--control-fd", str(fd)]
