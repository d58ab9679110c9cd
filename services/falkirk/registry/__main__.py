"""Starts the registry: settings, store, feed, the services."""

from __future__ import annotations

import asyncio
import sys
import time

from falkirk.api.registry.v1 import (
    authority_service_pb2_grpc,
    device_service_pb2_grpc,
    device_token_service_pb2_grpc,
    node_service_pb2_grpc,
    policy_document_service_pb2_grpc,
    presence_service_pb2_grpc,
    registry_service_pb2_grpc,
    route_service_pb2_grpc,
    tenant_service_pb2_grpc,
    user_service_pb2_grpc,
    virtual_network_service_pb2_grpc,
    zone_service_pb2_grpc,
)
from falkirk.registry.authority import Authority
from falkirk.registry.authority_service import AuthorityService
from falkirk.registry.device_service import DeviceService, DeviceTokenService, private_key
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.metrics import StoreCollector
from falkirk.registry.node_service import NodeService
from falkirk.registry.presence_service import PresenceService
from falkirk.registry.sealing import Seal
from falkirk.registry.service import Desk, RegistryService, ResourceService, surroundings
from falkirk.registry.settings import Settings
from falkirk.registry.store import Store, StoreError, Transaction
from falkirk.registry.watch import FEED_BYTES, Feed
from falkirk.runtime import telemetry
from falkirk.runtime.oidc import Trusted, Verifier
from falkirk.runtime.server import MESSAGE_BYTES, Server
from falkirk.runtime.settings import Shell, arguments

_REGISTER = {
    "tenant": tenant_service_pb2_grpc.add_TenantServiceServicer_to_server,
    "user": user_service_pb2_grpc.add_UserServiceServicer_to_server,
    "device": device_service_pb2_grpc.add_DeviceServiceServicer_to_server,
    "virtual_network": virtual_network_service_pb2_grpc.add_VirtualNetworkServiceServicer_to_server,
    "route": route_service_pb2_grpc.add_RouteServiceServicer_to_server,
    "policy": policy_document_service_pb2_grpc.add_PolicyServiceServicer_to_server,
    "node": node_service_pb2_grpc.add_NodeServiceServicer_to_server,
    "zone": zone_service_pb2_grpc.add_ZoneServiceServicer_to_server,
}


async def serve(shell: Shell, settings: Settings, store: Store) -> None:
    """Serve until told to stop."""
    loop = asyncio.get_running_loop()
    feed = Feed(store, settings.max_watches, min(FEED_BYTES, settings.history_bytes))

    desk = Desk(store, feed, surroundings())
    presence = PresenceService(desk)

    def published(transaction: Transaction) -> None:
        feed.publish(transaction)
        presence.on_commit(transaction)

    def committed(transaction: Transaction) -> None:
        loop.call_soon_threadsafe(published, transaction)

    store.on_commit = committed
    key_file = settings.authority.key_file or shell.data("registry") / "authority.key"
    authority = Authority(Seal(key_file, settings.authority.passphrase_file), settings.authority)
    trusted = [Trusted(issuer.issuer, issuer.audience, issuer.jwks_url) for issuer in settings.oidc]
    key = private_key(shell.data("registry") / "device.key")
    devices = DeviceService(desk, key, settings.oidc, Verifier(trusted), presence.table.knows, settings.node_addresses)
    certificates = AuthorityService(authority, desk, surroundings(), shell.listen_tcp, devices.person)
    servicers: dict[str, ResourceService] = {
        "device": devices,
        "node": NodeService(desk),
    }
    server = Server("registry", shell)
    server.metrics.register(StoreCollector(store, feed))
    for name, register in _REGISTER.items():
        servicer = servicers.get(name) or ResourceService(BY_NAME[name], desk)
        server.add(register, servicer, BY_NAME[name].service)
    server.add(
        device_token_service_pb2_grpc.add_DeviceTokenServiceServicer_to_server,
        DeviceTokenService(desk),
        "falkirk.api.registry.v1.DeviceTokenService",
    )
    server.add(
        presence_service_pb2_grpc.add_PresenceServiceServicer_to_server,
        presence,
        "falkirk.api.registry.v1.PresenceService",
    )
    server.add(
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server,
        RegistryService(desk, time.time_ns()),
        "falkirk.api.registry.v1.RegistryService",
    )
    server.add(
        authority_service_pb2_grpc.add_AuthorityServiceServicer_to_server,
        certificates,
        "falkirk.api.registry.v1.AuthorityService",
    )
    server.set_ready(True)
    await server.run(presence.run, certificates.run)


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
        private_key(shell.data("registry") / "device.key")
    except (StoreError, OSError, ValueError) as error:
        print(f"falkirk registry: {error}", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(shell, settings, store))
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
