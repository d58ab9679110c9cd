"""What the on-ramp knows of tenants, users, devices and virtual networks. PURE.

The parent turns registry resources into rows; a `Change` is one transaction of the registry (or, with `full` set, the whole
state). Rows refer to their tenant by id and to users and virtual networks by name, as the registry renders them: a
transaction that renames something carries the rows that refer to it too.

Limits: a change is applied in one go, about 2 µs a row; a full state is built aside in another `Tables`, a piece at a
time, so the loop that does it is never held up for long. A device takes about 0.6 kB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from falkirk.wire.sharing import share


class TenantRow(msgspec.Struct, frozen=True, array_like=True, tag="t", gc=False):
    """A tenant."""

    id: str
    name: str
    max_flows: int = 0


class UserRow(msgspec.Struct, frozen=True, array_like=True, tag="u", gc=False):
    """A user."""

    id: str
    tenant_id: str
    name: str
    groups: tuple[str, ...] = ()
    disabled: bool = False


class NetworkRow(msgspec.Struct, frozen=True, array_like=True, tag="n", gc=False):
    """A virtual network."""

    id: str
    tenant_id: str
    name: str
    is_default: bool = False


class DeviceRow(msgspec.Struct, frozen=True, array_like=True, tag="d", gc=False):
    """A device; `addresses` are packed, `user` and `virtual_network` are names (empty: none, the tenant's default)."""

    id: str
    tenant_id: str
    name: str
    user: str = ""
    groups: tuple[str, ...] = ()
    addresses: tuple[bytes, ...] = ()
    virtual_network: str = ""
    posture: dict[str, str] = {}
    disabled: bool = False
    max_flows: int = 0
    public_key: bytes = b""
    """Of WireGuard, 32 bytes; empty where it has none."""
    why: str = ""
    """Why it is disabled, behind its name; empty: because somebody said so."""
    ends_ns: int = 0
    """When it ends, in nanoseconds since 1970; 0: never."""


Row = TenantRow | UserRow | NetworkRow | DeviceRow
ROWS_A_CHUNK: Final = 100
_SHARED: Final = ("tenant_id", "user", "groups", "virtual_network", "posture", "why")
"""What a device's row may have in common with others (`falkirk.wire.sharing`)."""


class Touched(msgspec.Struct):
    """Whose tunnels a change may concern: devices, and tenants with all their devices."""

    devices: set[str] = msgspec.field(default_factory=set)
    tenants: set[str] = msgspec.field(default_factory=set)


class Tables:
    """All rows, by id, and by tenant and name."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        """By id; ids are UUIDs, so one space holds all kinds."""
        self._tenants: dict[str, TenantRow] = {}
        self._users: dict[tuple[str, str], UserRow] = {}
        self._networks: dict[tuple[str, str], NetworkRow] = {}
        self._devices: defaultdict[str, dict[str, DeviceRow]] = defaultdict(dict)
        """By tenant and name: a tuple of both would be 56 bytes a device."""
        self._defaults: dict[str, NetworkRow] = {}
        self._keys: dict[bytes, DeviceRow] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def tenant(self, name: str) -> TenantRow | None:
        """By name."""
        return self._tenants.get(name)

    def tenant_by_id(self, tenant_id: str) -> TenantRow | None:
        """By id."""
        row = self.rows.get(tenant_id)
        return row if isinstance(row, TenantRow) else None

    def device(self, tenant_id: str, name: str) -> DeviceRow | None:
        """By name within a tenant."""
        return self._devices[tenant_id].get(name) if tenant_id in self._devices else None

    def device_by_id(self, device_id: str) -> DeviceRow | None:
        """By id."""
        row = self.rows.get(device_id)
        return row if isinstance(row, DeviceRow) else None

    def device_by_key(self, public_key: bytes) -> DeviceRow | None:
        """By its WireGuard public key, of whichever tenant."""
        return self._keys.get(public_key)

    def user(self, tenant_id: str, name: str) -> UserRow | None:
        """By name within a tenant."""
        return self._users.get((tenant_id, name))

    def network(self, tenant_id: str, name: str) -> NetworkRow | None:
        """By name within a tenant; an empty name gives the tenant's default."""
        return self._networks.get((tenant_id, name)) if name else self._defaults.get(tenant_id)

    def network_by_id(self, network_id: str) -> NetworkRow | None:
        """By id."""
        row = self.rows.get(network_id)
        return row if isinstance(row, NetworkRow) else None

    def apply(self, changed: Iterable[Row], removed: Iterable[str] = ()) -> Touched:
        """One transaction: everything or (where it raises) an error of the caller's. Names may swap within it."""
        touched = Touched()
        new = list(changed)
        for row_id in (*removed, *(row.id for row in new)):
            old = self.rows.pop(row_id, None)
            if old is not None:
                self._unlink(old)
                _touch(touched, old)
        for row in new:
            self.rows[row.id] = row
            self._link(row)
            _touch(touched, row)
        return touched

    def _link(self, row: Row) -> None:
        match row:
            case TenantRow():
                self._tenants[row.name] = row
            case UserRow():
                self._users[row.tenant_id, row.name] = row
            case DeviceRow():
                share(row, _SHARED)
                self._devices[row.tenant_id][row.name] = row
                if row.public_key:
                    self._keys[row.public_key] = row
            case NetworkRow():
                self._networks[row.tenant_id, row.name] = row
                if row.is_default:
                    self._defaults[row.tenant_id] = row

    def _unlink(self, row: Row) -> None:
        match row:
            case TenantRow():
                self._tenants.pop(row.name, None)
            case UserRow():
                self._users.pop((row.tenant_id, row.name), None)
            case DeviceRow():
                self._devices[row.tenant_id].pop(row.name, None)
                if not self._devices[row.tenant_id]:
                    del self._devices[row.tenant_id]
                self._keys.pop(row.public_key, None)
            case NetworkRow():
                self._networks.pop((row.tenant_id, row.name), None)
                if row.is_default:
                    self._defaults.pop(row.tenant_id, None)


def _touch(touched: Touched, row: Row) -> None:
    match row:
        case TenantRow():
            touched.tenants.add(row.id)
        case DeviceRow():
            touched.devices.add(row.id)
        case UserRow() | NetworkRow():
            touched.tenants.add(row.tenant_id)


def chunks(rows: Iterable[Row]) -> Iterator[tuple[Row, ...]]:
    """Rows in portions that fit a control datagram for any reasonable row."""
    portion: list[Row] = []
    for row in rows:
        portion.append(row)
        if len(portion) == ROWS_A_CHUNK:
            yield tuple(portion)
            portion = []
    if portion:
        yield tuple(portion)
