"""RouterService: proto <-> values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import ip_address
from typing import Any

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import route_service_pb2
from falkirk.api.router.v1 import router_service_pb2 as pb
from falkirk.api.router.v1 import router_service_pb2_grpc
from falkirk.decide.routes import RouteEntry
from falkirk.router import off_ramp
from falkirk.router.press import Press
from falkirk.runtime.contexts import destination_proto
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.replica import ResourceReplica


class RouterService(router_service_pb2_grpc.RouterServiceServicer):
    """Answers from the table that is published."""

    def __init__(
        self, press: Press, replica: ResourceReplica, processes: Callable[[], Sequence[net_pb2.ProcessInfo]]
    ) -> None:
        self._press, self._replica, self._processes = press, replica, processes

    async def Resolve(self, request: pb.ResolveRequest, context: Any) -> pb.ResolveResponse:
        """The longest match; NOT_FOUND with NO_ROUTE where none covers the destination."""
        network_id, destination = self._where(request.tenant, request.virtual_network, request.destination_address)
        found = self._press.table.lookup(network_id, destination)
        if found is None:
            raise FalkirkError(
                grpc.StatusCode.NOT_FOUND,
                "NO_ROUTE",
                f"no route of this virtual network covers {request.destination_address}",
                destination=request.destination_address,
            )
        return pb.ResolveResponse(route=_resolved(found), replica=self._status())

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Every covering route, and what the off-ramp would do with the first."""
        network_id, destination = self._where(request.tenant, request.virtual_network, request.destination_address)
        found = self._press.table.covering(network_id, destination)
        return pb.ExplainResponse(
            routes=[_resolved(entry) for entry in found],
            off_ramp=off_ramp.described(found[0] if found else None, destination),
            replica=self._status(),
        )

    async def WatchRoutes(self, request: pb.WatchRoutesRequest, context: Any) -> AsyncIterator[pb.WatchRoutesResponse]:
        """Snapshots, without end."""
        async for response in self._press.publisher.watch(request.have if request.HasField("have") else None):
            yield response

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        """What it stands at."""
        return pb.StatsResponse(
            replicas=[self._replica.status(), self._status()],
            routes=[
                net_pb2.Counter(name=name, value=count)
                for name, count in sorted(self._press.book.routes_by_tenant().items())
            ],
            processes=self._processes(),
        )

    def _where(self, tenant: str, network: str, address: str) -> tuple[str, bytes]:
        """The virtual network's id and the packed destination."""
        try:
            destination = ip_address(address).packed
        except ValueError as error:
            raise FalkirkError(
                grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS", f"destination_address: {error}", address=address
            ) from error
        if self._press.revision is None:
            raise FalkirkError(
                grpc.StatusCode.UNAVAILABLE, "NOT_READY", "the router has no routes from the registry yet"
            )
        try:
            network_id = self._press.book.network_id(tenant, network)
        except KeyError as error:
            raise FalkirkError(
                grpc.StatusCode.NOT_FOUND, "UNKNOWN_TENANT", f"there is no tenant {tenant!r}", tenant=tenant
            ) from error
        if network_id is None:
            raise FalkirkError(
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_VIRTUAL_NETWORK",
                f"tenant {tenant} has no virtual network {network or 'default'!r}",
                virtual_network=network,
            )
        return network_id, destination

    def _status(self) -> net_pb2.ReplicaStatus:
        """The table's, whose revision may be a little behind the replica's."""
        resources = self._replica.status()
        return net_pb2.ReplicaStatus(
            name="routes",
            revision=self._press.revision,
            live=resources.live,
            source=resources.source,
            items=self._press.table.routes,
        )


def _resolved(entry: RouteEntry) -> pb.ResolvedRoute:
    device = None
    target: route_service_pb2.RouteTarget | None
    if entry.device is not None:
        target = route_service_pb2.RouteTarget(device=route_service_pb2.DeviceTarget(device=entry.device.device))
        device = destination_proto(entry.device)
    elif entry.target == "resolver":
        target = None
    elif entry.target == "blackhole":
        target = route_service_pb2.RouteTarget(blackhole=route_service_pb2.BlackholeTarget())
    else:
        target = route_service_pb2.RouteTarget(
            internet=route_service_pb2.InternetTarget(
                egress_address4=_text(entry.egress4),
                egress_address6=_text(entry.egress6),
                connect_timeout_ms=entry.connect_timeout_ms,
            )
        )
    return pb.ResolvedRoute(
        route_id=entry.route_id,
        route=entry.name,
        prefix=entry.prefix,
        target=target,
        device=device,
        resolver=entry.target == "resolver",
    )


def _text(packed: bytes) -> str:
    return str(ip_address(packed)) if packed else ""
