"""What the registry fills in or does by itself: pools, addresses, the default virtual network.

A field that is left to the registry may be empty in any request: at creation it is filled, and at an update what was
filled stays. So a manifest that leaves it out can be applied again and again without a change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.api.registry.v1.route_service_pb2 import Route
from falkirk.api.registry.v1.tenant_service_pb2 import Tenant
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.api.registry.v1.virtual_network_service_pb2 import VirtualNetwork
from falkirk.api.registry.v1.zone_service_pb2 import Zone
from falkirk.decide import resolver
from falkirk.registry import kinds, pools
from falkirk.registry.kinds import BY_NAME, Value
from falkirk.registry.refusal import Reason, Refused

if TYPE_CHECKING:
    from falkirk.registry.engine import Engine

DEFAULT_NETWORK = "default"
"""The name of the virtual network that comes with a tenant."""


def fill(engine: Engine, value: Value, stored: Value | None) -> None:
    """Fill in what a request left to the registry. Raises `Refused` where a pool is exhausted."""
    if isinstance(value, Tenant):
        assert stored is None or isinstance(stored, Tenant)
        if not value.device_pool4:
            value.device_pool4 = stored.device_pool4 if stored else pools.DEFAULT_POOL4
        if not value.device_pool6:
            value.device_pool6 = stored.device_pool6 if stored else pools.ula(engine.surroundings.random(5))
    elif isinstance(value, Device) and not value.addresses:
        assert stored is None or isinstance(stored, Device)
        value.addresses.extend(stored.addresses if stored else _take_addresses(engine, value.metadata.tenant_id))
    elif isinstance(value, Device):
        assert stored is None or isinstance(stored, Device)
        _check_addresses(engine, value, stored.addresses if stored else ())
    elif isinstance(value, Route | Zone) and not value.virtual_network:
        assert stored is None or isinstance(stored, Route | Zone)
        value.virtual_network = (
            stored.virtual_network if stored else _default_network(engine, value.metadata.tenant_id).metadata.name
        )
    elif isinstance(value, VirtualNetwork) and isinstance(stored, VirtualNetwork) and stored.is_default:
        # The mark moves by setting it on another one; a tenant is never without.
        value.is_default = True


def after_write(engine: Engine, value: Value, stored: Value | None) -> None:
    """What else a write brings about in the same transaction."""
    if isinstance(value, Tenant) and stored is None:
        network = VirtualNetwork(is_default=True)
        network.metadata.name = DEFAULT_NETWORK
        network.metadata.tenant, network.metadata.tenant_id = value.metadata.name, value.metadata.id
        engine.put(BY_NAME["virtual_network"], network, None)
    elif (
        isinstance(value, VirtualNetwork)
        and value.is_default
        and not (isinstance(stored, VirtualNetwork) and stored.is_default)
    ):
        _unmark_others(engine, value)


def check_delete(stored: Value) -> None:
    """Refuse to remove a default virtual network."""
    if isinstance(stored, VirtualNetwork) and stored.is_default:
        tenant, name = stored.metadata.tenant, stored.metadata.name
        raise Refused(
            Reason.IS_DEFAULT,
            f"virtual network {name} is the default of tenant {tenant}; make another one the default first",
            kind="virtual_network",
            name=name,
        )


def before_delete(engine: Engine, stored: Value) -> None:
    """Take along what goes with a resource: a tenant's default virtual network, enrolment tokens, what is kept beside a device."""
    key = stored.metadata.id
    if isinstance(stored, Device):
        engine.connection.execute("DELETE FROM enrolled WHERE device_id = ?", (key,))
        engine.connection.execute("DELETE FROM proved WHERE device_id = ?", (key,))
    elif isinstance(stored, User):
        engine.connection.execute("DELETE FROM enrolment_token WHERE user_id = ?", (key,))
        engine.connection.execute("DELETE FROM subject WHERE user_id = ?", (key,))
    elif isinstance(stored, Tenant):
        engine.connection.execute("DELETE FROM enrolment_token WHERE tenant_id = ?", (key,))
        engine.connection.execute("DELETE FROM subject WHERE tenant_id = ?", (key,))
        engine.remove(BY_NAME["virtual_network"], _default_network(engine, stored.metadata.id))
        engine.connection.execute("DELETE FROM pool WHERE tenant_id = ?", (stored.metadata.id,))


def discount(counts: dict[str, int]) -> None:
    """Leave the default virtual network out of a tenant's contents: it came with the tenant and goes with it."""
    counts["virtual_networks"] -= 1
    if not counts["virtual_networks"]:
        del counts["virtual_networks"]


def _unmark_others(engine: Engine, value: VirtualNetwork) -> None:
    kind = BY_NAME["virtual_network"]
    rows = engine.connection.execute(
        "SELECT body FROM resource WHERE tenant_id = ? AND kind = ? AND id != ?",
        (value.metadata.tenant_id, kind.number, value.metadata.id),
    ).fetchall()
    for (body,) in rows:
        other = kinds.parse(kind, body)
        assert isinstance(other, VirtualNetwork)
        if other.is_default:
            other.is_default = False
            engine.resave(kind, other)


def _default_network(engine: Engine, tenant_id: str) -> VirtualNetwork:
    (body,) = engine.connection.execute(
        "SELECT body FROM claim JOIN resource ON resource.id = claim.holder WHERE scope = ? AND key = ''",
        (kinds.default_scope(tenant_id),),
    ).fetchone()
    network = kinds.parse(BY_NAME["virtual_network"], body)
    assert isinstance(network, VirtualNetwork)
    return network


def _tenant(engine: Engine, tenant_id: str) -> Tenant:
    (body,) = engine.connection.execute("SELECT body FROM resource WHERE id = ?", (tenant_id,)).fetchone()
    tenant = kinds.parse(BY_NAME["tenant"], body)
    assert isinstance(tenant, Tenant)
    return tenant


def _check_addresses(engine: Engine, device: Device, had: Iterable[str]) -> None:
    """Refuse the resolver's address where it is asked for anew; a device that has it since before keeps it."""
    tenant = _tenant(engine, device.metadata.tenant_id)
    reserved = set(resolver.addresses(tenant.device_pool4, tenant.device_pool6)).difference(had)
    for position, address in enumerate(device.addresses):
        if address in reserved:
            raise Refused(
                Reason.ADDRESS_TAKEN,
                f"{address} is the address of tenant {tenant.metadata.name}'s resolver; choose another one",
                field=f"addresses[{position}]",
                address=address,
            )


def _take_addresses(engine: Engine, tenant_id: str) -> list[str]:
    tenant = _tenant(engine, tenant_id)
    return [_take(engine, tenant, 4, tenant.device_pool4), _take(engine, tenant, 6, tenant.device_pool6)]


def _take(engine: Engine, tenant: Tenant, version: int, pool: str) -> str:
    """The next free address of a pool. One claim at a time is asked for, so a full pool costs one pass over it."""
    key = tenant.metadata.id
    row = engine.connection.execute(
        "SELECT cursor FROM pool WHERE tenant_id = ? AND version = ?", (key, version)
    ).fetchone()
    for index in pools.indexes(pool, row[0] if row else 0):
        address = pools.at(pool, index)
        taken = engine.connection.execute(
            "SELECT 1 FROM claim WHERE scope = ? AND key = ?", (f"address:{key}", address)
        ).fetchone()
        if taken is None:
            engine.connection.execute(
                "INSERT OR REPLACE INTO pool (tenant_id, version, cursor) VALUES (?, ?, ?)", (key, version, index)
            )
            return address
    raise Refused(
        Reason.POOL_EXHAUSTED,
        f"all {pools.capacity(pool)} addresses of {pool} are taken; give the tenant a larger device_pool{version}",
        field="addresses",
        pool=pool,
    )
