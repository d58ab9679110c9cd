"""One service's gRPC: one asyncio loop, three servers (admin/, mesh/, read/) that share the servicer objects; a fourth one for TCP, where settings
name an address (`listen_tcp`), behind a front that knows callers by their certificates (`falkirk.runtime.tcp`).

A `__main__.py` does no more than::

    shell, settings = arguments("flow", Settings)
    telemetry.setup("flow", shell)
    server = Server("flow", shell)
    server.add(flow_service_pb2_grpc.add_FlowServiceServicer_to_server, Service(...), "falkirk.api.flow.v1.FlowService")
    asyncio.run(server.run(pool.run, replica.run))          # something calls server.set_ready(True) when all is there

`run` takes the name's lock, binds the sockets, serves metrics, starts the background coroutines and waits for SIGTERM or SIGINT. Then it
drains: health says NOT_SERVING, streams end with UNAVAILABLE, unary calls in flight finish within `grace` seconds, background tasks are
cancelled, and `run` returns, so that the process exits with 0. A background coroutine that fails ends the server the same way, and `run`
raises what it raised. A second signal doesn't hurry: the supervisor kills after its own grace.

Health answers for "" and for each service name: SERVING once `set_ready(True)` was called, NOT_SERVING before, after `set_ready(False)`, and
while draining.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector

from falkirk.api.net.v1 import net_pb2
from falkirk.linux import heap
from falkirk.runtime import metrics, roads, supervised, telemetry
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.gates import Gate, RoadGate
from falkirk.runtime.interceptor import Calls, GateInterceptor, draining
from falkirk.runtime.refusals import Refusals
from falkirk.runtime.settings import ROADS, UNIX_PATH_MAX, Road, SettingsError, Shell

GRACE_SECONDS: Final = 5.0
MESSAGE_BYTES: Final = 16 * 1024 * 1024
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Clients ping every 10 s so that a stopped server is noticed (see falkirk.runtime.client).
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

Background = Callable[[], Coroutine[Any, Any, None]]
log = structlog.get_logger()


class Health:
    """grpc.health.v1: one state for the whole service."""

    def __init__(self) -> None:
        self.names = {""}
        self._ready = False
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        """What every name answers."""
        serving = self._ready and not self._draining
        return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING

    def set(self, *, ready: bool | None = None, draining: bool | None = None) -> None:
        """Changes the state; watchers hear of it."""
        self._ready = self._ready if ready is None else ready
        self._draining = self._draining if draining is None else draining
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that isn't here."""
        if request.service not in self.names:
            raise FalkirkError(grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE", f"{request.service!r} is not served here")
        return health_pb2.HealthCheckResponse(status=self.status)

    async def List(self, request: Any, context: Any) -> health_pb2.HealthListResponse:
        """The state now of every name."""
        answer = health_pb2.HealthCheckResponse(status=self.status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(sorted(self.names), answer))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and after each change; ends with UNAVAILABLE once it has said NOT_SERVING for a drain."""
        last: int | None = None
        while True:
            changed = self._changed
            known = request.service in self.names
            status = self.status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            elif self._draining:
                raise draining()
            else:
                await changed.wait()


class Server:
    """A service's servers; see the module's docstring. `metrics` is the registry for the service's own collectors."""

    def __init__(self, name: str, shell: Shell, *, grace: float = GRACE_SECONDS) -> None:
        heap.give_back()
        self.name, self.shell, self.grace = name, shell, grace
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        self._calls = Calls(name, self.metrics, shell.telemetry.sample_ratio)
        self._refusals = Refusals(name, shell)
        self._calls.on_refused = self._refusals.call
        self._health = Health()
        self._services: list[tuple[Callable[[Any, Any], None], Any]] = []
        self._stop = asyncio.Event()
        self._started_ns = time.time_ns()
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health, "grpc.health.v1.Health")

    def add(self, register: Callable[[Any, Any], None], servicer: Any, full_service_name: str) -> None:
        """Serves a generated service: its add_…_to_server function, its servicer, its full name. Before `run` only."""
        self._services.append((register, servicer))
        self._health.names.add(full_service_name)

    @property
    def ready(self) -> bool:
        """True while health says SERVING."""
        return bool(self._health.status == health_pb2.HealthCheckResponse.SERVING)

    def set_ready(self, ready: bool) -> None:
        """Turns health to SERVING or back. Idempotent; call it from the loop."""
        before = self.ready
        self._health.set(ready=ready)
        if self.ready != before:
            log.info("ready" if ready else "not_ready")

    def process(self) -> net_pb2.ProcessInfo:
        """This process, for the `processes` of Stats."""
        info = net_pb2.ProcessInfo(name=self.name, pid=os.getpid(), generation=supervised.generation())
        info.start_time.FromNanoseconds(self._started_ns)
        return info

    def stop(self) -> None:
        """Begins to drain, as SIGTERM does."""
        self._stop.set()

    async def run(self, *background: Background) -> None:
        """Serves until SIGTERM, SIGINT, `stop` or the failure of a background coroutine; returns when drained.

        Ends the process with a logged reason where it can't begin: status 2 where directories or sockets can't be made as the settings say,
        1 where another process has the name (it may be about to end; a supervisor tries again).
        """
        try:
            await self._run(background)
        except SettingsError as error:
            log.error("cannot_start", why=str(error))
            raise SystemExit(2) from None
        except roads.AlreadyRunning as error:
            log.error("cannot_start", why=str(error))
            raise SystemExit(1) from None

    async def _run(self, background: tuple[Background, ...]) -> None:
        loop = asyncio.get_running_loop()
        roads.prepare(self.shell)
        with roads.sole(self.shell.run_dir, self.name):
            servers = [self._bind_road(road) for road in ROADS]
            background = (self._refusals.run, *background)
            if self.name in self.shell.listen_tcp:
                from falkirk.runtime import (
                    tcp,  # and cryptography with it, which a mesh without TCP needn't load in each service
                )

                port = tcp.Port(self.name, self.shell, self.metrics, self._refusals)
                servers.append(self._bind(port.gate, port.backend, "admin"))
                background = (port.run, *background)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            try:
                async with metrics.serving(self.shell, self.name, self.metrics):
                    for server in servers:
                        await server.start()
                    log.info("listening", run_dir=str(self.shell.run_dir), pid=os.getpid())
                    await self._serve(servers, background)
            finally:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
                await asyncio.to_thread(telemetry.shutdown)
        log.info("stopped")

    async def _serve(self, servers: list[grpc.aio.Server], background: tuple[Background, ...]) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(start()) for start in background]
            try:
                await self._stop.wait()
            finally:
                await self._drain(servers)
            for task in running:
                task.cancel()

    async def _drain(self, servers: list[grpc.aio.Server]) -> None:
        log.info("draining")
        self._health.set(draining=True)
        self._calls.end_streams()
        async with asyncio.TaskGroup() as tasks:
            for server in servers:
                tasks.create_task(server.stop(self.grace))

    def _bind_road(self, road: Road) -> grpc.aio.Server:
        path = self.shell.socket(road, self.name)
        if len(os.fsencode(path)) > UNIX_PATH_MAX:
            raise SettingsError(f"{path} is too long for a unix socket; choose a shorter --run-dir")
        return self._bind(RoadGate(road), path, road)

    def _bind(self, gate: Gate, path: Path, road: Road) -> grpc.aio.Server:
        """A server behind a gate, on a socket in a road's directory."""
        server = grpc.aio.server(interceptors=[GateInterceptor(gate, self._calls)], options=OPTIONS)
        for register, servicer in self._services:
            register(servicer, server)
        reflection.enable_server_reflection((*sorted(self._health.names - {""}), reflection.SERVICE_NAME), server)
        # A process that was killed leaves its sockets; the lock says that nobody serves them now.
        path.unlink(missing_ok=True)
        try:
            with roads.binding(road):
                server.add_insecure_port(f"unix:{path}")
            roads.own(path, self.shell.roads.get(road))
        except (RuntimeError, OSError) as error:
            raise SettingsError(f"{path}: {error}") from error
        return server
