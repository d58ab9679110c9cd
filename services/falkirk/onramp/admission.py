"""Who may enter, and as whom. PURE.

`admit` turns (uid, request) into a `TunnelContext` or a `Refusal`; `review` tells what a context that was admitted earlier has become: the one
that would be given now, or the reason why there would be none. The on-ramp's worker and `OnrampService.Explain` both call it.

A uid that may not speak for a tenant learns nothing about it: the check comes before the first look at the tables. Grants name
tenants, so a renamed tenant needs its grants changed.

A change of names, limits, user, groups or posture changes the context of open tunnels; one of addresses or of the virtual network closes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Final

import msgspec

from falkirk.onramp.context import Code, ContextRequest, Refusal, shown
from falkirk.onramp.tables import DeviceRow, NetworkRow, Tables, TenantRow
from falkirk.wire.context import Transport, TunnelContext
from falkirk.wire.sharing import facts, words

ANY: Final = "*"
_FIXED: Final = ("device_id", "virtual_network_id", "addresses")
"""What a tunnel has for life: its producer was told its addresses, and its packets belong to that network."""


class Grants:
    """Which uid may speak for which tenants."""

    def __init__(self, by_uid: Iterable[tuple[int, Iterable[str]]], devices: Iterable[int] = ()) -> None:
        """Several entries of one uid add up; the tenant "*" is every tenant. `devices`: uids that may hand a device over."""
        self._devices = frozenset(devices)
        self._by_uid: dict[int, frozenset[str]] = {}
        for uid, tenants in by_uid:
            self._by_uid[uid] = self._by_uid.get(uid, frozenset()) | frozenset(tenants)

    def knows(self, uid: int) -> bool:
        """May this uid connect at all?"""
        return uid in self._by_uid

    def check_uid(self, uid: int) -> None:
        """Raises Refusal where the uid may not connect at all."""
        if uid not in self._by_uid:
            raise Refusal(Code.UID_FORBIDDEN, f"uid {uid} may not open tunnels here; see the setting onramp.tunnels")

    def check(self, uid: int, tenant: str, transport: Transport = Transport.SOCKET) -> None:
        """Raises Refusal where the uid may not speak for a tenant of this name, or not by this transport."""
        self.check_uid(uid)
        granted = self._by_uid[uid]
        if ANY not in granted and tenant not in granted:
            raise Refusal(Code.TENANT_FORBIDDEN, f"uid {uid} may not speak for tenant {shown(tenant)}")
        if transport is Transport.DEVICE and uid not in self._devices:
            raise Refusal(
                Code.TRANSPORT_FORBIDDEN,
                f"uid {uid} may not hand a device over; see the setting onramp.tunnels[].devices",
            )


class Admission(msgspec.Struct, frozen=True, gc=False):
    """A context, and whether its virtual network was asked for by name (then a new selection doesn't concern it)."""

    context: TunnelContext
    pinned: bool


def admit(tables: Tables, request: ContextRequest) -> Admission:
    """The context that the request gets. `Grants.check` comes first, and isn't made here. Raises Refusal."""
    tenant = tables.tenant(request.tenant)
    if tenant is None:
        raise Refusal(Code.UNKNOWN_TENANT, f"there is no tenant {shown(request.tenant)}")
    device = tables.device(tenant.id, request.device)
    if device is None:
        raise Refusal(Code.UNKNOWN_DEVICE, f"tenant {tenant.name} has no device {shown(request.device)}")
    network = _network(tables, tenant, request.virtual_network or device.virtual_network)
    context = _context(tables, tenant, device, network, request.attributes, packed=request.packed)
    return Admission(context, bool(request.virtual_network))


def admit_device(tables: Tables, device: DeviceRow) -> Admission:
    """The context that a device gets whose key has been proved; rules see `app.attributes.onramp` as "wireguard". Raises Refusal."""
    tenant = tables.tenant_by_id(device.tenant_id)
    if tenant is None:
        raise Refusal(Code.UNKNOWN_TENANT, f"the tenant of device {device.name} isn't known")
    network = _network(tables, tenant, device.virtual_network)
    return Admission(_context(tables, tenant, device, network, {"onramp": "wireguard"}, packed=True), False)


def _network(tables: Tables, tenant: TenantRow, name: str) -> NetworkRow:
    """A tenant's network; an empty name is its default. Raises Refusal."""
    network = tables.network(tenant.id, name)
    if network is None:
        raise Refusal(
            Code.UNKNOWN_VIRTUAL_NETWORK, f"tenant {tenant.name} has no virtual network {shown(name or 'default')}"
        )
    return network


def review(tables: Tables, admission: Admission) -> Admission | str:
    """The admission as it is now (the same object where nothing has changed), or why the tunnel must be closed."""
    held = admission.context
    tenant = tables.tenant_by_id(held.tenant_id)
    if tenant is None:
        return "tenant_removed"
    device = tables.device_by_id(held.device_id)
    if device is None or device.tenant_id != tenant.id:
        return "device_removed"
    if admission.pinned:
        network = tables.network_by_id(held.virtual_network_id)
    else:
        network = tables.network(tenant.id, device.virtual_network)
    if network is None or network.tenant_id != tenant.id:
        return "virtual_network_removed"
    try:
        now = _context(tables, tenant, device, network, held.attributes, packed=held.packed)
    except Refusal as refusal:
        return refusal.code.lower()
    if any(getattr(now, field) != getattr(held, field) for field in _FIXED):
        return "context_changed"
    return admission if now == held else Admission(now, admission.pinned)


def resumed(tables: Tables, context: TunnelContext) -> Admission:
    """An admission of which only the context is known: taken for pinned where it isn't what the device has selected."""
    device = tables.device_by_id(context.device_id)
    selected = tables.network(context.tenant_id, device.virtual_network) if device else None
    return Admission(context, selected is None or selected.id != context.virtual_network_id)


def _context(
    tables: Tables,
    tenant: TenantRow,
    device: DeviceRow,
    network: NetworkRow,
    attributes: Mapping[str, str],
    *,
    packed: bool = False,
) -> TunnelContext:
    if device.disabled:
        raise Refusal(Code.DEVICE_DISABLED, f"device {device.name} {device.why or 'is disabled'}")
    user = tables.user(tenant.id, device.user) if device.user else None
    if user is not None and user.disabled:
        raise Refusal(Code.USER_DISABLED, f"user {user.name} of device {device.name} is disabled")
    if device.user and user is None:
        raise Refusal(Code.USER_DISABLED, f"user {device.user} of device {device.name} isn't known")
    return TunnelContext(
        tenant_id=tenant.id,
        tenant=tenant.name,
        device_id=device.id,
        device=device.name,
        virtual_network_id=network.id,
        virtual_network=network.name,
        addresses=device.addresses,
        user_id=user.id if user else "",
        user=user.name if user else "",
        groups=words(tuple(sorted({*device.groups, *(user.groups if user else ())}))),
        posture=device.posture,
        attributes=facts(dict(attributes)),
        device_max_flows=device.max_flows,
        tenant_max_flows=tenant.max_flows,
        packed=packed,
    )


def greeting(tunnel: int, context: TunnelContext, mtu: int, framing: str, transport: str = Transport.SOCKET) -> bytes:
    """The datagram that tells the producer that it was admitted."""
    addresses = [str(ip_address(address)) for address in context.addresses]
    admitted = {"tunnel_id": tunnel, "addresses": addresses, "mtu": mtu, "framing": framing}
    if transport != Transport.SOCKET:
        admitted["transport"] = transport
    return msgspec.json.encode({"admitted": admitted})
