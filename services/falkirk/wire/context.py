"""Whom a tunnel speaks for, as every packet process holds it.

The on-ramp makes a `TunnelContext` at admission; it travels with the tunnel's descriptor. Where the registry changes what it says of a
device, the on-ramp makes another one in its place (`falkirk.wire.handover.Recontext`). Decisions and limits go by ids.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from falkirk.wire.sharing import share


class Framing(StrEnum):
    """How packets are framed on a connected tunnel."""

    RAW = "raw"
    """One or several whole IP packets in a datagram."""
    VNET = "vnet"
    """One packet or super-packet behind a 10-byte virtio-net header."""


class Transport(StrEnum):
    """What carries a connected tunnel's packets."""

    SOCKET = "socket"
    """The SEQPACKET connection itself, a datagram at a time."""
    DEVICE = "device"
    """The producer's own TUN device, whose descriptor it hands over once it is admitted: no process of its own has to move packets."""
    TRUNK = "trunk"
    """The pair that an on-ramp worker shares with a flow worker, beside others (`falkirk.wire.trunk`): devices that come by WireGuard. No producer asks for it."""


class TunnelContext(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Identity of a tunnel; `addresses` are packed (4 or 16 bytes) and are the only ones that it may speak from."""

    tenant_id: str
    tenant: str
    device_id: str
    device: str
    virtual_network_id: str
    virtual_network: str
    addresses: tuple[bytes, ...]
    user_id: str = ""
    user: str = ""
    groups: tuple[str, ...] = ()
    posture: dict[str, str] = {}
    attributes: dict[str, str] = {}
    device_max_flows: int = 0
    """Flows that the device may have at once; 0 takes the node's default."""
    tenant_max_flows: int = 0
    """Flows that the tenant may have at once on this node; 0 takes the node's default."""
    packed: bool = False
    """A `raw` tunnel whose producer takes several packets in a datagram, as the flow tracker does from everyone."""


_SHARED: Final = (
    "tenant_id",
    "tenant",
    "virtual_network_id",
    "virtual_network",
    "user_id",
    "user",
    "groups",
    "posture",
    "attributes",
)


def shared(context: TunnelContext) -> TunnelContext:
    """The same context, which has been decoded and is to be kept: what it has in common with others is held once (`falkirk.wire.sharing`)."""
    share(context, _SHARED)
    return context
