"""A tunnel's context, and a destination's device, as protos and back: the services that speak of tunnels translate it alike."""

from __future__ import annotations

import ipaddress

from falkirk.api.net.v1 import net_pb2
from falkirk.decide.destination import DestinationDevice
from falkirk.wire.context import TunnelContext


def context_proto(context: TunnelContext) -> net_pb2.TunnelContext:
    """A tunnel's context."""
    return net_pb2.TunnelContext(
        tenant_id=context.tenant_id,
        tenant=context.tenant,
        device_id=context.device_id,
        device=context.device,
        user_id=context.user_id,
        user=context.user,
        groups=context.groups,
        virtual_network_id=context.virtual_network_id,
        virtual_network=context.virtual_network,
        posture=context.posture,
        attributes=context.attributes,
        addresses=[str(ipaddress.ip_address(address)) for address in context.addresses],
    )


def destination_proto(device: DestinationDevice) -> net_pb2.DestinationDevice:
    """The device that a destination leads to."""
    return net_pb2.DestinationDevice(
        device_id=device.device_id, device=device.device, user=device.user, groups=device.groups
    )


def destination_of_proto(device: net_pb2.DestinationDevice) -> DestinationDevice:
    """The other way."""
    return DestinationDevice(device.device_id, device.device, device.user, tuple(device.groups))


def context_of_proto(context: net_pb2.TunnelContext) -> TunnelContext:
    """The other way. Raises ValueError where an address isn't one."""
    return TunnelContext(
        tenant_id=context.tenant_id,
        tenant=context.tenant,
        device_id=context.device_id,
        device=context.device,
        virtual_network_id=context.virtual_network_id,
        virtual_network=context.virtual_network,
        addresses=tuple(ipaddress.ip_address(address).packed for address in context.addresses),
        user_id=context.user_id,
        user=context.user,
        groups=tuple(context.groups),
        posture=dict(context.posture),
        attributes=dict(context.attributes),
    )
