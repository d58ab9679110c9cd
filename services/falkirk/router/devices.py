"""Devices as the registry says them, as far as routes lead to them: who they are, and which addresses are their own.

Every address of a device is reachable in the virtual network that the device has selected (else the tenant's default), without a
route: a source for the compiler with the longest prefix, no route id and the name `device/NAME`, which no route can have. Policy
decides who gets there.

Rules see the destination device's owner and groups, so these stand in the entry, and a change of a user is a change of the routes to
that user's devices.

Limit: a device whose virtual network or owner isn't known yet is left out until it is (both come in the same transaction).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from ipaddress import ip_network
from typing import Final

from falkirk.api.registry.v1 import registry_service_pb2
from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteSource

_DEVICE: Final = registry_service_pb2.KIND_DEVICE
_USER: Final = registry_service_pb2.KIND_USER


class DeviceBook:
    """Devices and their owners. `waiting` has those whose virtual network or owner isn't known."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._ids: dict[tuple[str, str], str] = {}
        self._users: dict[tuple[str, str], tuple[str, ...]] = {}
        self._user_names: dict[str, tuple[str, str]] = {}
        self._owned: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._sources: dict[str, list[RouteSource]] = {}
        self.waiting: set[str] = set()

    def apply(
        self,
        changed: Iterable[registry_service_pb2.Resource],
        removed: Iterable[registry_service_pb2.Tombstone],
    ) -> set[str]:
        """One transaction; returns the ids of the devices that aren't what they were. Names may swap within it."""
        touched: set[str] = set()
        changed = list(changed)
        for tombstone in removed:
            self._forget(tombstone.kind, tombstone.id, touched)
        for resource in changed:
            kind = resource.WhichOneof("resource")
            if kind == "device":
                self._forget(_DEVICE, resource.device.metadata.id, touched)
            elif kind == "user":
                self._forget(_USER, resource.user.metadata.id, touched)
        for resource in changed:
            kind = resource.WhichOneof("resource")
            if kind == "device":
                self._add_device(resource.device, touched)
            elif kind == "user":
                self._add_user(resource.user, touched)
        return touched

    def of_tenant(self, tenant_id: str) -> set[str]:
        """Ids of the tenant's devices that leave their virtual network to the tenant's default."""
        return {
            identity
            for identity, device in self._devices.items()
            if device.metadata.tenant_id == tenant_id and not device.virtual_network
        }

    def find(self, tenant_id: str, name: str) -> str | None:
        """A device's id by its name."""
        return self._ids.get((tenant_id, name))

    def destination(self, identity: str) -> DestinationDevice | None:
        """A device as rules see it at the other end; None where it, or its owner, isn't known."""
        device = self._devices.get(identity)
        if device is None:
            return None
        owner: tuple[str, ...] | None = ()
        if device.user:
            owner = self._users.get((device.metadata.tenant_id, device.user))
        if owner is None:
            return None
        groups = tuple(sorted({*device.groups, *owner}))
        return DestinationDevice(device.metadata.id, device.metadata.name, device.user, groups)

    def refresh(self, identities: Iterable[str], network_id: Callable[[str, str], str | None]) -> None:
        """Make the sources of these devices anew. `network_id` gives a virtual network's id by tenant id and name, an empty name the
        default's."""
        for identity in list(identities):
            self._sources.pop(identity, None)
            self.waiting.discard(identity)
            device, destination = self._devices.get(identity), self.destination(identity)
            if device is None:
                continue
            network = network_id(device.metadata.tenant_id, device.virtual_network)
            if network is None or destination is None:
                self.waiting.add(identity)
                continue
            self._sources[identity] = [
                RouteSource(
                    network,
                    RouteEntry(
                        "", f"device/{device.metadata.name}", str(ip_network(text)), "device", device=destination
                    ),
                )
                for text in device.addresses
            ]

    def sources(self, taken: Callable[[str, str], bool]) -> list[RouteSource]:
        """Every device's own addresses, but those that a route is written for: `taken(network id, prefix)`."""
        return [
            source
            for sources in self._sources.values()
            for source in sources
            if not taken(source.virtual_network_id, source.entry.prefix)
        ]

    def _forget(self, kind: int, identity: str, touched: set[str]) -> None:
        if kind == _DEVICE and identity in self._devices:
            device = self._devices.pop(identity)
            touched.add(identity)
            self._ids.pop((device.metadata.tenant_id, device.metadata.name), None)
            self._owned[device.metadata.tenant_id, device.user].discard(identity)
        elif kind == _USER and identity in self._user_names:
            name = self._user_names.pop(identity)
            self._users.pop(name, None)
            touched |= self._owned.get(name, set())

    def _add_device(self, device: Device, touched: set[str]) -> None:
        metadata = device.metadata
        self._devices[metadata.id] = device
        self._ids[metadata.tenant_id, metadata.name] = metadata.id
        if device.user:
            self._owned[metadata.tenant_id, device.user].add(metadata.id)
        touched.add(metadata.id)

    def _add_user(self, user: User, touched: set[str]) -> None:
        name = user.metadata.tenant_id, user.metadata.name
        self._user_names[user.metadata.id] = name
        self._users[name] = tuple(user.groups)
        touched |= self._owned.get(name, set())
