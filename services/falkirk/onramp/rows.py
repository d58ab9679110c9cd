"""Registry resources as rows of the admission tables.

Limit: an address that isn't one (the registry refuses them) is left out: the device then may not speak from it.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable
from ipaddress import ip_address

import msgspec

from falkirk.api.registry.v1 import registry_service_pb2
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, TenantRow, UserRow


def rows(resources: Iterable[registry_service_pb2.Resource], now_ns: int) -> list[Row]:
    """One row a resource; kinds without rows are left out. `now_ns` (since 1970) tells which devices have ended."""
    return [row for resource in resources if (row := _row(resource, now_ns)) is not None]


def expired(row: DeviceRow) -> DeviceRow:
    """The row of a device that has ended."""
    return row if row.disabled else msgspec.structs.replace(row, disabled=True, why="has expired")


def _row(resource: registry_service_pb2.Resource, now_ns: int) -> Row | None:
    match resource.WhichOneof("resource"):
        case "tenant":
            tenant = resource.tenant
            return TenantRow(tenant.metadata.id, tenant.metadata.name, tenant.max_flows)
        case "user":
            user = resource.user
            return UserRow(
                user.metadata.id, user.metadata.tenant_id, user.metadata.name, tuple(user.groups), user.disabled
            )
        case "virtual_network":
            network = resource.virtual_network
            return NetworkRow(
                network.metadata.id, network.metadata.tenant_id, network.metadata.name, network.is_default
            )
        case "device":
            device = resource.device
            ends_ns = device.expire_time.ToNanoseconds() if device.HasField("expire_time") else 0
            row = DeviceRow(
                # The replica has it too.
                id=sys.intern(device.metadata.id),
                tenant_id=device.metadata.tenant_id,
                name=device.metadata.name,
                user=device.user,
                groups=tuple(device.groups),
                addresses=tuple(packed for text in device.addresses if (packed := _packed(text))),
                virtual_network=device.virtual_network,
                posture=dict(device.posture),
                disabled=device.disabled or device.pending,
                why="waits for approval" if device.pending and not device.disabled else "",
                ends_ns=ends_ns,
                max_flows=device.max_flows,
                public_key=base64.b64decode(device.public_key),
            )
            return expired(row) if 0 < ends_ns <= now_ns else row
        case _:
            return None


def _packed(address: str) -> bytes:
    try:
        return ip_address(address).packed
    except ValueError:
        return b""
