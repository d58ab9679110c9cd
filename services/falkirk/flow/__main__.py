"""Wiring of the flow service's parent."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from falkirk.api.flow.v1 import flow_service_pb2_grpc
from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
from falkirk.api.router.v1 import router_service_pb2, router_service_pb2_grpc
from falkirk.flow.events import EventFeed
from falkirk.flow.fleet import Fleet
from falkirk.flow.metrics import DeviceCollector, FlowCollector
from falkirk.flow.service import FlowService
from falkirk.flow.settings import FlowSettings
from falkirk.runtime import telemetry
from falkirk.runtime.client import channel
from falkirk.runtime.replica import BlobReplica
from falkirk.runtime.server import Server
from falkirk.runtime.settings import Shell, arguments


async def serve(shell: Shell, settings: FlowSettings) -> None:
    """Serve until SIGTERM."""
    server = Server("flow", shell)
    feed = EventFeed()
    fleet = Fleet(shell, settings, feed, server.set_ready)
    server.metrics.register(FlowCollector(fleet.counters))
    server.metrics.register(DeviceCollector(fleet.live_flows))
    policy = channel(shell, "policy")
    router = channel(shell, "router")
    rules = policy_service_pb2_grpc.PolicyServiceStub(policy)
    routes = router_service_pb2_grpc.RouterServiceStub(router)
    directory = shell.data("flow") / "replica"

    async def new_rules(path: Path, revision: net_pb2.Revision) -> None:
        await fleet.snapshot("rules", path, revision)

    async def new_routes(path: Path, revision: net_pb2.Revision) -> None:
        await fleet.snapshot("routes", path, revision)

    fleet.replica = {
        "rules": BlobReplica(
            "rules",
            directory,
            lambda have: rules.WatchRules(policy_service_pb2.WatchRulesRequest(have=have)),
            new_rules,
        ),
        "routes": BlobReplica(
            "routes",
            directory,
            lambda have: routes.WatchRoutes(router_service_pb2.WatchRoutesRequest(have=have)),
            new_routes,
        ),
    }
    for replica in fleet.replica.values():
        await replica.load_disk()
    server.add(
        flow_service_pb2_grpc.add_FlowServiceServicer_to_server,
        FlowService(fleet, feed, server.process),
        "falkirk.api.flow.v1.FlowService",
    )
    audit = policy_service_pb2_grpc.AuditServiceStub(policy)
    await server.run(lambda: fleet.run(audit), *(replica.run for replica in fleet.replica.values()))


def main() -> int:
    """Reads settings and serves; the exit status."""
    shell, settings = arguments("flow", FlowSettings)
    telemetry.setup("flow", shell)
    asyncio.run(serve(shell, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
