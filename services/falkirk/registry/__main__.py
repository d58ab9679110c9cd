"""Starts the registry: settings, store, feed, seven services."""

from __future__ import annotations

import asyncio
import sys
import time

from falkirk.api.registry.v1 import (
    device_service_pb2_grpc,
    policy_document_service_pb2_grpc,
    registry_service_pb2_grpc,
    route_service_pb2_grpc,
    tenant_service_pb2_grpc,
    user_service_pb2_grpc,
    virtual_network_service_pb2_grpc,
    zone_service_pb2_grpc,
)
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.metrics import StoreCollector
from falkirk.registry.service import Desk, RegistryService, ResourceService, surroundings
from falkirk.registry.settings import Settings
from falkirk.registry.store import Store, StoreError, Transaction
from falkirk.registry.watch import FEED_BYTES, Feed
from falkirk.runtime import telemetry
from falkirk.runtime.server import MESSAGE_BYTES, Server
from falkirk.runtime.settings import Shell, arguments

_REGISTER = {
    "tenant": tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
    "user": user_service_pb2_grpc.add_UserServiceServicer_to_server,
    "device": device_service_pb2_grpc.add_DeviceServiceServicer_to_server,
    "virtual_network": virtual_network_service_pb2_grpc.add_VirtualNetworkServiceServicer_to_server,
    "route": route_service_pb2_grpc.add_RouteServiceServicer_to_server,
    "policy": policy_document_service_pb2_grpc.add_PolicyServiceServicer_to_server,
    "zone": zone_service_pb2_grpc.add_ZoneServiceServicer_to_server,
}


async def serve(shell: Shell, settings: Settings, store: Store) -> None:
    """Serve until told to stop."""
    loop = asyncio.get_running_loop()
    feed = Feed(store, settings.max_watches, min(FEED_BYTES, settings.history_bytes))

    def committed(transaction: Transaction) -> None:
        loop.call_soon_threadsafe(feed.publish, transaction)

    store.on_commit = committed
    desk = Desk(store, feed, surroundings())
    server = Server("registry", shell)
    server.metrics.register(StoreCollector(store, feed))
    for name, register in _REGISTER.items():
        server.add(register, ResourceService(BY_NAME[name], desk), BY_NAME[name].service)
    server.add(
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
        RegistryService(desk, time.time_ns()),
        "falkirk.api.registry.v1.RegistryService",
    )
    server.set_ready(True)
    await server.run()


def main() -> int:
    """The process; its exit status."""
    shell, settings = arguments("registry", Settings)
    telemetry.setup("registry", shell)
    try:
        # Of a message of gRPC, the rest is for what a resource's frame in it costs.
        store = Store(
            shell.data("registry") / "falkirk.db",
            history_bytes=settings.history_bytes,
            transaction_bytes=MESSAGE_BYTES * 3 // 4,
        )
    except (StoreError, OSError) as error:
        print(f"falkirk registry: {error}", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(shell, settings, store))
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
