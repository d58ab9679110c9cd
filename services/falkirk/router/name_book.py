"""The names of devices and zones as the registry says them, ready for the resolver (`falkirk.router.name_table`).

A device's name is known in the virtual network that it has selected (else the tenant's default), as its addresses are; one that is disabled or not approved yet has no name, as
nothing would answer there.

Limit: a change of names goes through all devices anew, 100,000 in 0.4 s, in which the router answers nothing else; what changes no name (posture, keys,
groups, routes) costs nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

from falkirk.api.registry.v1 import registry_service_pb2 as registry
from falkirk.api.registry.v1.tenant_service_pb2 import Tenant
from falkirk.api.registry.v1.virtual_network_service_pb2 import VirtualNetwork
from falkirk.api.registry.v1.zone_service_pb2 import Zone, ZoneRecordType
from falkirk.decide import resolver
from falkirk.decide.routes import Place, RouteEntry, RouteSource
from falkirk.router import name_table
from falkirk.router.devices import DeviceBook

ROUTE_NAME: Final = "resolver"
_TYPES: Final = {
    value.number: value.name.removeprefix("ZONE_RECORD_TYPE_") for value in ZoneRecordType.DESCRIPTOR.values
}


class NameBook:
    """Tenants, virtual networks and zones, by id. Devices are another book's, which hears of each transaction before this one."""

    def __init__(self, devices: DeviceBook) -> None:
        self._devices = devices
        self._tenants: dict[str, Tenant] = {}
        self._networks: dict[str, VirtualNetwork] = {}
        self._zones: dict[str, Zone] = {}
        self._changed = True

    @property
    def changed(self) -> bool:
        """Whether `networks` would give something else than it did last."""
        return self._changed or self._devices.names_changed

    def apply(self, changed: Iterable[registry.Resource], removed: Iterable[registry.Tombstone]) -> None:
        """One transaction."""
        kinds: dict[int, dict[str, object]] = {
            registry.KIND_TENANT: self._tenants,  # type: ignore[dict-item]  # what is forgotten is forgotten by id
            registry.KIND_VIRTUAL_NETWORK: self._networks,  # type: ignore[dict-item]
            registry.KIND_ZONE: self._zones,  # type: ignore[dict-item]
        }
        for tombstone in removed:
            self._changed |= kinds.get(tombstone.kind, {}).pop(tombstone.id, None) is not None
        for resource in changed:
            kind = resource.WhichOneof("resource")
            match kind:
                case "tenant":
                    self._tenants[resource.tenant.metadata.id] = resource.tenant
                case "virtual_network":
                    self._networks[resource.virtual_network.metadata.id] = resource.virtual_network
                case "zone":
                    self._zones[resource.zone.metadata.id] = resource.zone
            self._changed |= kind in ("tenant", "virtual_network", "zone")

    def networks(self) -> list[name_table.Network]:
        """What the resolver is told."""
        self._changed = self._devices.names_changed = False
        found: dict[tuple[str, str], name_table.Network] = {}
        for network in self._networks.values():
            tenant = self._tenants.get(network.metadata.tenant_id)
            if tenant is None:
                continue
            said = name_table.Network(network.metadata.id, tenant.metadata.name, _pools(tenant), [], [])
            found[tenant.metadata.id, network.metadata.name] = said
            if network.is_default:
                found[tenant.metadata.id, ""] = said
        for device in self._devices.all():
            place = found.get((device.tenant_id, device.virtual_network))
            if place is not None and device.shown:
                place.devices.append((device.name, device.addresses))
        for zone in self._zones.values():
            place = found.get((zone.metadata.tenant_id, zone.virtual_network))
            if place is not None:
                place.zones.append(_zone(zone))
        return [network for (_, name), network in found.items() if name]

    def sources(self, taken: Container[Place]) -> list[RouteSource]:
        """The ways to every tenant's resolver, in each of its virtual networks, but those that are `taken`: that lead elsewhere already."""
        sources = []
        for network in self._networks.values():
            tenant = self._tenants.get(network.metadata.tenant_id)
            for address in resolver.addresses(*_pools(tenant)) if tenant is not None else ():
                prefix = f"{address}/{128 if ':' in address else 32}"
                source = RouteSource(network.metadata.id, RouteEntry("", ROUTE_NAME, prefix, "resolver"))
                if source.place not in taken:
                    sources.append(source)
        return sources


def _pools(tenant: Tenant) -> list[str]:
    return [pool for pool in (tenant.device_pool4, tenant.device_pool6) if pool]


def _zone(zone: Zone) -> name_table.Zone:
    records = [
        name_table.Record(
            zone.domain if record.name == "@" else f"{record.name}.{zone.domain}",
            _TYPES[record.type],
            record.value,
            record.ttl_s or name_table.ZONE_TTL,
        )
        for record in zone.records
    ]
    return name_table.Zone(zone.domain, records, list(zone.forward_to))
