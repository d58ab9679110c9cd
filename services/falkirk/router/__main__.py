"""Wiring of the router."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from prometheus_client import Gauge

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
from falkirk.api.registry.v1 import registry_service_pb2 as registry
from falkirk.api.router.v1 import router_service_pb2_grpc
from falkirk.router.book import RouteBook
from falkirk.router.metrics import ResolverCollector
from falkirk.router.name_book import NameBook
from falkirk.router.press import Press
from falkirk.router.resolver import ResolverProcess
from falkirk.router.service import RouterService
from falkirk.router.settings import Settings
from falkirk.runtime import client, supervised, telemetry
from falkirk.runtime.replica import BlobReplica, ResourceReplica
from falkirk.runtime.roads import AlreadyRunning
from falkirk.runtime.server import Server
from falkirk.runtime.settings import SettingsError, Shell, arguments

KINDS = (
    registry.KIND_TENANT,
    registry.KIND_VIRTUAL_NETWORK,
    registry.KIND_USER,
    registry.KIND_DEVICE,
    registry.KIND_ROUTE,
    registry.KIND_ZONE,
)


async def serve(shell: Shell, settings: Settings) -> None:
    """Until SIGTERM."""
    server = Server("router", shell)
    resolver = ResolverProcess(shell, settings)
    server.metrics.register(ResolverCollector(resolver.counters, resolver.pending))
    book = RouteBook(settings.connect_timeout_ms)
    press = Press(book, lambda: server.set_ready(True), NameBook(book.devices), resolver.tell)
    replica = ResourceReplica(
        "resources", shell.data("router") / "replica", client.channel(shell, "registry"), KINDS, press.on_change
    )
    process = net_pb2.ProcessInfo(name="router", pid=os.getpid(), generation=supervised.generation())
    process.start_time.FromNanoseconds(time.time_ns())
    service = RouterService(press, replica, lambda: [process, *resolver.processes()])
    policy = client.channel(shell, "policy")
    stub = policy_service_pb2_grpc.PolicyServiceStub(policy)
    rules = BlobReplica(
        "rules",
        shell.data("router") / "rules",
        lambda have: stub.WatchRules(policy_service_pb2.WatchRulesRequest(have=have)),
        resolver.rules,
    )
    await rules.load_disk()
    server.add(
        router_service_pb2_grpc.add_RouterServiceServicer_to_server, service, "falkirk.api.router.v1.RouterService"
    )
    for name, help_text, read in (
        ("falkirk_router_routes", "Routes in the published table.", lambda: press.table.routes),
        ("falkirk_router_routes_left_out", "Routes that couldn't be compiled.", press.book.left_out),
        ("falkirk_router_table_bytes", "Memory of the published table.", lambda: press.table.memory),
        ("falkirk_router_watchers", "Open WatchRoutes streams.", lambda: press.publisher.watchers),
    ):
        Gauge(name, help_text, registry=server.metrics).set_function(read)
    audit = policy_service_pb2_grpc.AuditServiceStub(policy)
    await server.run(replica.run, press.run, rules.run, lambda: resolver.run(audit))


def main() -> int:
    """Reads settings and serves; the exit status."""
    shell, settings = arguments("router", Settings)
    telemetry.setup("router", shell)
    try:
        asyncio.run(serve(shell, settings))
    except (SettingsError, AlreadyRunning) as error:
        print(f"falkirk router: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
