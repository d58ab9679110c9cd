"""The workers, as their parent holds them: what they share, what they said, what they must know."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2_grpc
from falkirk.decide.routes import RouteTable
from falkirk.decide.rules import RuleTable
from falkirk.flow import control, counters, limits
from falkirk.flow.capture import Captures
from falkirk.flow.events import EventFeed
from falkirk.flow.live import LiveReader, LiveRecord
from falkirk.flow.roster import Roster
from falkirk.flow.settings import FlowSettings
from falkirk.flow.text import address_text
from falkirk.runtime import blob, telemetry
from falkirk.runtime.counters import Counters
from falkirk.runtime.delivery import Delivery
from falkirk.runtime.replica import BlobReplica, SnapshotRefused
from falkirk.runtime.settings import Shell
from falkirk.runtime.workers import WorkerPool
from falkirk.wire.context import TunnelContext
from falkirk.wire.handover import encode
from falkirk.wire.slots import SlotPlan

log = structlog.get_logger()
NAMES: Final = ("rules", "routes")
LAST_RECORDS_SECONDS: Final = 2.0
"""How long policy may take for the last records of a drain; what it doesn't take is delivered after the next start."""


class Fleet:
    """All workers of the service. `on_ready` hears when all are ready, and when not any more."""

    def __init__(self, shell: Shell, settings: FlowSettings, feed: EventFeed, on_ready: Callable[[bool], None]) -> None:
        self.workers = shell.workers
        self.counters = [Counters.create(counters.NAMES) for _ in range(shell.workers)]
        self.routes = RouteTable()
        self.rules = RuleTable.empty()
        self.settings = settings
        self.replica: dict[str, BlobReplica] = {}
        self._shell = shell
        self._on_ready = on_ready
        self._tenants = os.memfd_create("falkirk-tenants", os.MFD_CLOEXEC)
        os.ftruncate(self._tenants, limits.SIZE)
        self._plan = SlotPlan(shell.workers)
        self._directory = shell.data("flow")
        self._snapshots: dict[str, control.Load] = {}
        self._ready = [False] * shell.workers
        self._live: list[LiveReader | None] = [None] * shell.workers
        self._deliveries = [
            Delivery(self._directory / "spool" / f"worker-{worker}", feed.lines) for worker in range(shell.workers)
        ]
        self.captures = Captures(shell.workers, self._tap)
        self.pool = WorkerPool(
            "flow.worker",
            shell.workers,
            lambda _, fd: [sys.executable, "-m", "falkirk.flow.worker", "--control-fd", str(fd)],
            self._message,
            self._started,
            self._exited,
        )
        self.roster = Roster(shell.workers, self.pool.send, self.pool.alive)

    # workers

    def _started(self, worker: int, generation: int) -> None:
        shell = self._shell
        start = control.Start(
            worker=worker,
            workers=self.workers,
            generation=generation,
            node=shell.node,
            sample_ratio=shell.telemetry.sample_ratio if telemetry.exporting() else 0.0,
            run_dir=str(shell.run_dir),
            data_dir=str(shell.data_dir),
            mesh_uids=shell.mesh_uids,
            settings=self.settings,
        )
        self.pool.send(worker, encode([start]), (self.counters[worker].fd, self._tenants))
        for load in self._snapshots.values():
            self.pool.send(worker, encode([load]))
        self.roster.started(worker)
        self.captures.started(worker)

    def _tap(self, worker: int, wanted: control.Tap, fd: int) -> bool:
        return self.pool.send(worker, encode([wanted]), (fd,))

    def _exited(self, worker: int, status: int) -> None:
        log.warning("worker_exited", worker=worker, status=status)
        self.roster.exited(worker)
        self._set_ready(worker, False)
        self._deliveries[worker].grown()

    def _message(self, worker: int, data: bytes, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        for message in control.TO_PARENT.decode(data):
            match message:
                case control.Spooled():
                    self._deliveries[worker].grown()
                case control.TunnelOpened():
                    self.roster.opened(worker, message)
                case control.TunnelEnded():
                    self.roster.ended(worker, message.tunnel)
                case control.Status():
                    self._set_ready(worker, message.ready)
                case control.Loaded():
                    if message.error:
                        log.error("snapshot_refused", worker=worker, name=message.name, error=message.error)

    def _set_ready(self, worker: int, ready: bool) -> None:
        self._ready[worker] = ready
        self._on_ready(all(self._ready))

    def terminate(self, worker: int, record: LiveRecord, reason: str) -> bool:
        """Ask a worker to end a flow; False where the worker is away."""
        return self.pool.send(worker, encode([control.Terminate(record.tunnel, record.key, record.flow_id, reason)]))

    def processes(self) -> list[net_pb2.ProcessInfo]:
        """The workers' processes."""
        return self.pool.processes()

    # what they share

    def live(self, worker: int) -> LiveReader | None:
        """The worker's live table; None before its first start."""
        path = self._directory / "live" / f"worker-{worker}"
        reader = self._live[worker]
        if reader is None or not reader.is_at(path):
            # Not closed: whoever goes through the old one may go on.
            try:
                reader = LiveReader(path)
            except (FileNotFoundError, ValueError):
                reader = None
            self._live[worker] = reader
        return reader

    def context(self, worker: int, tunnel: int) -> TunnelContext | None:
        """Whom a tunnel speaks for; None where it is closed."""
        opened = self.roster.open[worker].get(tunnel)
        return opened.context if opened is not None else None

    def tunnels_of(self, device_id: str) -> list[tuple[int, int]]:
        """(worker, number) of a device's open tunnels."""
        return [
            (worker, number)
            for worker, tunnels in enumerate(self.roster.open)
            for number, opened in tunnels.items()
            if opened.context.device_id == device_id
        ]

    def worker_of(self, device_id: str) -> int:
        """The worker that has a device's tunnels, or would have (`falkirk.onramp.tunnels`)."""
        return zlib.crc32(device_id.encode()) % self.workers

    def tenant_flows(self, tenant_id: str) -> int:
        """Flows of a tenant on this node."""
        return limits.flows_of(self._tenants, bytes.fromhex(tenant_id.replace("-", "")))

    def ready(self, worker: int) -> bool:
        """Whether a worker takes new flows."""
        return self._ready[worker]

    def live_flows(self) -> Iterator[tuple[TunnelContext, int, int]]:
        """Context, IP bytes up and down of each live flow whose tunnel is open."""
        for worker in range(self.workers):
            table = self.live(worker)
            for tunnel, _, _, up, down in table.sums() if table is not None else ():
                context = self.context(worker, tunnel)
                if context is not None:
                    yield context, up, down

    def context_of(self, tenant: str, device: str) -> TunnelContext | None:
        """The context of an open tunnel of a device, by names."""
        return next(
            (
                opened.context
                for tunnels in self.roster.open
                for opened in tunnels.values()
                if opened.context.device == device and opened.context.tenant == tenant
            ),
            None,
        )

    def slot_address(self, worker: int, record: LiveRecord) -> str:
        """The slot's address in the private namespace; empty for a flow without one."""
        if not record.slot:
            return ""
        address = self._plan.address4 if record.family == 4 else self._plan.address6
        return address_text(address(worker, record.slot))

    # what they must know

    async def snapshot(self, name: str, path: Path, revision: net_pb2.Revision) -> None:
        """A new snapshot lies at `path`: load it here, and have every worker load it."""
        try:
            if name == "routes":
                self.routes = await asyncio.to_thread(_load_routes, path)
            else:
                self.rules = await asyncio.to_thread(_load_rules, path)
        except ValueError as error:
            raise SnapshotRefused(str(error)) from error
        rules = sum(map(self.rules.count, self.rules.tenants()))
        self.replica[name].items = self.routes.routes if name == "routes" else rules
        load = control.Load(name, str(path), revision.epoch, revision.number)
        self._snapshots[name] = load
        for worker in range(self.workers):
            self.pool.send(worker, encode([load]))

    def replicas(self) -> list[net_pb2.ReplicaStatus]:
        """What the replicas stand at."""
        return [replica.status() for replica in self.replica.values()]

    def spooled(self) -> int:
        """Audit records that policy hasn't acknowledged."""
        return sum(delivery.pending for delivery in self._deliveries)

    async def run(self, stub: policy_service_pb2_grpc.AuditServiceStub) -> None:
        """Keep the workers and deliver what they record, until cancelled; then they end, and their last records are delivered."""
        async with asyncio.TaskGroup() as tasks:
            deliveries = [tasks.create_task(delivery.run(stub)) for delivery in self._deliveries]
            try:
                await self.pool.run()
            finally:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_RECORDS_SECONDS):
                        for delivery in self._deliveries:
                            delivery.grown()
                            await delivery.delivered()
                for task in deliveries:
                    task.cancel()


def _load_routes(path: Path) -> RouteTable:
    return RouteTable.loaded(blob.mapped(path))


def _load_rules(path: Path) -> RuleTable:
    loading = RuleTable.load(blob.load(path).data)
    for _ in loading:
        pass
    assert loading.table is not None
    return loading.table
