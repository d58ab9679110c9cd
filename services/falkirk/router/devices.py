"""Devices as the registry says them, as far as routes lead to them: who they are, and which addresses are their own.

Every address of a device is reachable in the virtual network that the device has selected (else the tenant's default), without a
route: a source for the compiler with the longest prefix, no route id and the name `device/NAME`, which no route can have. Policy
decides who gets there.

Rules see the destination device's owner and groups, so these stand in the entry, and a change of a user is a change of the routes to
that user's devices.

What is kept of a device is what routes and names need; the message that says it takes ten times as much.

Limit: a device whose virtual network or owner isn't known yet is left out until it is (both come in the same transaction).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable
from ipaddress import ip_network
from typing import Final

import msgspec

from falkirk.api.registry.v1 import registry_service_pb2
from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import Place, RouteEntry, RouteSource
from falkirk.wire.sharing import share

_DEVICE: Final = registry_service_pb2.KIND_DEVICE
_USER: Final = registry_service_pb2.KIND_USER


class Known(msgspec.Struct, frozen=True, gc=False):
    """A device, as far as routes and names have to do with it."""

    id: str
    tenant_id: str
    name: str
    user: str
    groups: tuple[str, ...]
    virtual_network: str
    addresses: tuple[str, ...]
    shown: bool
    """Whether it has a name: it is neither disabled nor waiting for approval."""


def _known(device: Device) -> Known:
    metadata = device.metadata
    known = Known(
        # The replica has it too.
        id=sys.intern(metadata.id),
        tenant_id=metadata.tenant_id,
        name=metadata.name,
        user=device.user,
        groups=tuple(device.groups),
        virtual_network=device.virtual_network,
        addresses=tuple(device.addresses),
        shown=not device.disabled and not device.pending,
    )
    share(known, ("tenant_id", "user", "groups", "virtual_network"))
    return known


def _named(device: Known | None) -> tuple[object, ...]:
    """What names come from."""
    return (device.name, device.virtual_network, device.addresses, device.shown) if device is not None else ()


class DeviceBook:
    """Devices and their owners. `waiting` has those whose virtual network or owner isn't known."""

    def __init__(self) -> None:
        self._devices: dict[str, Known] = {}
        self._ids: defaultdict[str, dict[str, str]] = defaultdict(dict)
        """By tenant and name."""
        self.names_changed = True
        """Whether any device's names are others; for whoever sets it to False."""
        self._users: dict[tuple[str, str], tuple[str, ...]] = {}
        self._user_names: dict[str, tuple[str, str]] = {}
        self._owned: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._sources: dict[str, tuple[RouteSource, ...]] = {}
        self.waiting: set[str] = set()

    def apply(
        self,
        changed: Iterable[registry_service_pb2.Resource],
        removed: Iterable[registry_service_pb2.Tombstone],
    ) -> set[str]:
        """One transaction; returns the ids of the devices that aren't what they were. Names may swap within it."""
        touched: set[str] = set()
        changed = list(changed)
        devices: dict[str, Known | None] = {}
        for tombstone in removed:
            if tombstone.kind == _DEVICE:
                devices[tombstone.id] = self._devices.get(tombstone.id)
            self._forget(tombstone.kind, tombstone.id, touched)
        for resource in changed:
            kind = resource.WhichOneof("resource")
            if kind == "device":
                identity = resource.device.metadata.id
                devices.setdefault(identity, self._devices.get(identity))
                self._forget(_DEVICE, identity, touched)
            elif kind == "user":
                self._forget(_USER, resource.user.metadata.id, touched)
        for resource in changed:
            kind = resource.WhichOneof("resource")
            if kind == "device":
                self._add_device(_known(resource.device), touched)
            elif kind == "user":
                self._add_user(resource.user, touched)
        self.names_changed |= any(_named(self._devices.get(key)) != _named(old) for key, old in devices.items())
        return touched

    def all(self) -> Iterable[Known]:
        """Every device."""
        return self._devices.values()

    def of_tenant(self, tenant_id: str) -> set[str]:
        """Ids of the tenant's devices that leave their virtual network to the tenant's default."""
        return {
            identity
            for identity, device in self._devices.items()
            if device.tenant_id == tenant_id and not device.virtual_network
        }

    def find(self, tenant_id: str, name: str) -> str | None:
        """A device's id by its name."""
        return self._ids[tenant_id].get(name) if tenant_id in self._ids else None

    def destination(self, identity: str) -> DestinationDevice | None:
        """A device as rules see it at the other end; None where it, or its owner, isn't known."""
        device = self._devices.get(identity)
        if device is None:
            return None
        owner: tuple[str, ...] | None = ()
        if device.user:
            owner = self._users.get((device.tenant_id, device.user))
        if owner is None:
            return None
        groups = tuple(sorted({*device.groups, *owner}))
        return DestinationDevice(device.id, device.name, device.user, groups)

    def refresh(self, identities: Iterable[str], network_id: Callable[[str, str], str | None]) -> None:
        """Make the sources of these devices anew. `network_id` gives a virtual network's id by tenant id and name, an empty name the
        default's."""
        for identity in list(identities):
            self._sources.pop(identity, None)
            self.waiting.discard(identity)
            device, destination = self._devices.get(identity), self.destination(identity)
            if device is None:
                continue
            network = network_id(device.tenant_id, device.virtual_network)
            if network is None or destination is None:
                self.waiting.add(identity)
                continue
            self._sources[identity] = tuple(
                RouteSource(
                    network,
                    RouteEntry("", f"device/{device.name}", str(ip_network(text)), "device", device=destination),
                )
                for text in device.addresses
            )

    def sources(self, taken: Container[Place]) -> list[RouteSource]:
        """Every device's own addresses, but those that a route is written for."""
        return [source for sources in self._sources.values() for source in sources if source.place not in taken]

    def _forget(self, kind: int, identity: str, touched: set[str]) -> None:
        if kind == _DEVICE and identity in self._devices:
            device = self._devices.pop(identity)
            touched.add(identity)
            self._ids[device.tenant_id].pop(device.name, None)
            if not self._ids[device.tenant_id]:
                del self._ids[device.tenant_id]
            owner = device.tenant_id, device.user
            if owner in self._owned:
                self._owned[owner].discard(identity)
                if not self._owned[owner]:
                    del self._owned[owner]
        elif kind == _USER and identity in self._user_names:
            name = self._user_names.pop(identity)
            self._users.pop(name, None)
            touched |= self._owned.get(name, set())

    def _add_device(self, device: Known, touched: set[str]) -> None:
        self._devices[device.id] = device
        self._ids[device.tenant_id][device.name] = device.id
        if device.user:
            self._owned[device.tenant_id, device.user].add(device.id)
        touched.add(device.id)

    def _add_user(self, user: User, touched: set[str]) -> None:
        name = user.metadata.tenant_id, user.metadata.name
        self._user_names[user.metadata.id] = name
        self._users[name] = tuple(user.groups)
        touched |= self._owned.get(name, set())
