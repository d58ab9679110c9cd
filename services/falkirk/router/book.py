"""The route book: routes as the registry says them, ready to compile.

Routes name their tenant by id, their virtual network and the device that they lead to by name; what is renamed comes with its routes,
renamed too, in the same transaction. Each route is converted once, when it or its device changes. Devices' own addresses are compiled
like routes (`falkirk.router.devices`); a route that somebody wrote for exactly such an address takes its place.

Limit: a route that can't be converted (a target that isn't built, a prefix that isn't one) is left out and told by `left_out`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, Final

import structlog

from falkirk.api.registry.v1 import registry_service_pb2, route_service_pb2
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteSource, Target
from falkirk.router.devices import DeviceBook

log = structlog.get_logger()

_ROUTE: Final = registry_service_pb2.KIND_ROUTE
_NETWORK: Final = registry_service_pb2.KIND_VIRTUAL_NETWORK
_TENANT: Final = registry_service_pb2.KIND_TENANT


class RouteBook:
    """What `Resolve` needs names for, and what is compiled."""

    def __init__(self, connect_timeout_ms: int) -> None:
        """`connect_timeout_ms` is for routes that don't say."""
        self._connect_timeout_ms = connect_timeout_ms
        self._tenants: dict[str, str] = {}
        self._networks: dict[str, tuple[str, str]] = {}
        self._network_ids: dict[tuple[str, str], str] = {}
        self._defaults: dict[str, str] = {}
        self._sources: dict[str, RouteSource] = {}
        self._route_tenants: dict[str, str] = {}
        self._waiting: dict[str, route_service_pb2.Route] = {}
        self.devices = DeviceBook()
        self._to_devices: dict[str, route_service_pb2.Route] = {}
        """Routes that lead to a device; its name and groups stand in their entries."""

    def apply(
        self,
        changed: Iterable[registry_service_pb2.Resource],
        removed: Iterable[registry_service_pb2.Tombstone],
    ) -> None:
        """One transaction."""
        changed, removed = list(changed), list(removed)
        routes: dict[str, route_service_pb2.Route] = {}
        defaults = dict(self._defaults)
        for tombstone in removed:
            self._forget(tombstone.kind, tombstone.id)
        for resource in changed:
            kind = resource.WhichOneof("resource")
            if kind == "tenant":
                self._forget(_TENANT, resource.tenant.metadata.id)
            elif kind == "virtual_network":
                self._forget(_NETWORK, resource.virtual_network.metadata.id)
        for resource in changed:
            match resource.WhichOneof("resource"):
                case "tenant":
                    self._tenants[resource.tenant.metadata.name] = resource.tenant.metadata.id
                case "virtual_network":
                    self._add_network(resource.virtual_network)
                case "route":
                    routes[resource.route.metadata.id] = resource.route
        touched = self.devices.apply(changed, removed)
        for tenant_id in {*defaults, *self._defaults}:
            if defaults.get(tenant_id) != self._defaults.get(tenant_id):
                touched |= self.devices.of_tenant(tenant_id)
        touched |= self.devices.waiting
        self.devices.refresh(touched, self._network)
        # A route may wait for its virtual network or device only within a transaction; keep it all the same.
        again = self._waiting | {
            key: route
            for key, route in self._to_devices.items()
            if touched and self.devices.find(route.metadata.tenant_id, route.target.device.device) in touched
        }
        for route in (again | routes).values():
            self._add_route(route)

    def sources(self) -> list[RouteSource]:
        """Everything to compile."""
        return [*self._sources.values(), *self.devices.sources({source.place for source in self._sources.values()})]

    def left_out(self) -> int:
        """Routes that couldn't be converted."""
        return len(self._waiting)

    def network_id(self, tenant: str, name: str) -> str | None:
        """A virtual network's id by names; an empty name takes the tenant's default. KeyError for an unknown tenant."""
        tenant_id = self._tenants[tenant]
        return self._network_ids.get((tenant_id, name)) if name else self._defaults.get(tenant_id)

    def routes_by_tenant(self) -> Counter[str]:
        """Routes in force, by the tenant's name."""
        names = {tenant_id: name for name, tenant_id in self._tenants.items()}
        return Counter(names.get(tenant_id, tenant_id) for tenant_id in self._route_tenants.values())

    def _forget(self, kind: int, identity: str) -> None:
        if kind == _TENANT:
            for name in [name for name, tenant_id in self._tenants.items() if tenant_id == identity]:
                del self._tenants[name]
        elif kind == _NETWORK and identity in self._networks:
            tenant_id, name = self._networks.pop(identity)
            self._network_ids.pop((tenant_id, name), None)
            if self._defaults.get(tenant_id) == identity:
                del self._defaults[tenant_id]
        elif kind == _ROUTE:
            self._sources.pop(identity, None)
            self._route_tenants.pop(identity, None)
            self._waiting.pop(identity, None)
            self._to_devices.pop(identity, None)

    def _network(self, tenant_id: str, name: str) -> str | None:
        return self._network_ids.get((tenant_id, name)) if name else self._defaults.get(tenant_id)

    def _add_network(self, network: Any) -> None:
        metadata = network.metadata
        self._networks[metadata.id] = metadata.tenant_id, metadata.name
        self._network_ids[metadata.tenant_id, metadata.name] = metadata.id
        if network.is_default:
            self._defaults[metadata.tenant_id] = metadata.id

    def _add_route(self, route: route_service_pb2.Route) -> None:
        metadata = route.metadata
        self._forget(_ROUTE, metadata.id)
        network = self._network(metadata.tenant_id, route.virtual_network)
        device = None
        if route.target.WhichOneof("target") == "device":
            self._to_devices[metadata.id] = route
            identity = self.devices.find(metadata.tenant_id, route.target.device.device)
            device = self.devices.destination(identity) if identity is not None else None
        try:
            if network is None:
                raise ValueError(f"virtual network {route.virtual_network} isn't known")
            source = RouteSource(network, _entry(route, self._connect_timeout_ms, device))
        except ValueError as error:
            self._waiting[metadata.id] = route
            log.warning("route_left_out", route=metadata.name, tenant=metadata.tenant, why=str(error))
            return
        self._sources[metadata.id] = source
        self._route_tenants[metadata.id] = metadata.tenant_id


_TARGETS: Final[dict[str, Target]] = {"internet": "internet", "blackhole": "blackhole", "device": "device"}


def _entry(route: route_service_pb2.Route, connect_timeout_ms: int, device: DestinationDevice | None) -> RouteEntry:
    """ValueError where the target isn't built, its device isn't known or an address isn't one."""
    kind = route.target.WhichOneof("target")
    target = _TARGETS.get(kind or "")
    if target is None:
        raise ValueError(f"target {kind} isn't built")
    if target == "device" and device is None:
        raise ValueError(f"device {route.target.device.device} isn't known")
    internet = route.target.internet
    return RouteEntry(
        route_id=route.metadata.id,
        name=route.metadata.name,
        prefix=route.prefix,
        target=target,
        egress4=_packed(internet.egress_address4),
        egress6=_packed(internet.egress_address6),
        connect_timeout_ms=internet.connect_timeout_ms or connect_timeout_ms,
        device=device,
    )


def _packed(address: str) -> bytes:
    return ip_address(address).packed if address else b""
