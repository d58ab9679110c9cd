"""Settings of the on-ramp."""

from __future__ import annotations

import os
from ipaddress import ip_address

from falkirk.onramp.admission import ANY
from falkirk.runtime.settings import Section
from falkirk.wire.endpoint import host_and_port


class TunnelGrant(Section, frozen=True, kw_only=True):
    """Which tenants a uid may speak for on connected tunnels."""

    uid: int
    """The producer's uid, as the kernel tells it (SO_PEERCRED)."""
    tenants: tuple[str, ...] = (ANY,)
    """Tenants by name; "*" is every tenant."""
    devices: bool = False
    """Whether it may hand a TUN device over instead of sending packets itself. What is written to that device passes through the network
    stack of its owner's namespace, on the packet worker's time: for programs that are trusted with that."""


class WireGuardSettings(Section, frozen=True, kw_only=True):
    """The UDP port to which WireGuard clients come."""

    port: int = 0
    """The port, of all addresses unless `address` says one; 51820 is the usual one. 0: no WireGuard."""
    address: str = ""
    """The address to listen at; empty is every one, of both families."""
    endpoints: tuple[str, ...] = ()
    """HOST:PORT by which devices reach this node, as they are told; the first is the best. Not set: they must be told by other means."""
    mtu: int = 1420
    """Largest IP packet inside, in bytes: what the way outside takes, less 80; 1280 to 65455."""
    private_key_file: str = ""
    """Where the node's private key is; made at the first start where it isn't there. Empty: onramp/wireguard.key in the data directory."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError("wireguard.port must lie between 0 and 65535")
        if not 1280 <= self.mtu <= 65455:
            raise ValueError("wireguard.mtu must lie between 1280 and 65455")
        if self.address:
            ip_address(self.address)
        for endpoint in self.endpoints:
            host_and_port(endpoint)


class Settings(Section, frozen=True, kw_only=True):
    """Section `onramp`."""

    wireguard: WireGuardSettings = WireGuardSettings()
    """Where WireGuard clients come in."""

    tunnels: tuple[TunnelGrant, ...] | None = None
    """Who may open connected tunnels. Not set: the on-ramp's own uid and 0, for every tenant."""
    tunnel_mode: int = 0o666
    """Permission bits of tunnel.sock; who may connect is decided by uid all the same."""
    context_parser: str = "json"
    """Format of the first datagram: json, protobuf, or the name of an entry point in falkirk.context_parsers."""
    mtu: int = 1500
    """Largest IP packet of a tunnel in bytes, told to producers; 1280 (RFC 8200 5) to 65535."""
    context_timeout_ms: int = 5000
    """How long a producer may be silent after it has connected, in milliseconds."""
    adopt_timeout_ms: int = 5000
    """How long an admitted tunnel may wait for its flow worker, in milliseconds."""
    max_pending: int = 1024
    """Connections that haven't sent their context, all uids together."""
    max_pending_per_uid: int = 128
    """Connections of one uid that haven't sent their context; uids without a grant count as one."""
    max_tunnels: int = 10_000
    """Tunnels of this node, all workers together. Each takes a descriptor here and one in its flow worker."""
    max_tunnels_per_device: int = 64
    """Tunnels that a device may have at once; with several workers the one by WireGuard may come on top."""

    def __post_init__(self) -> None:
        if not 1280 <= self.mtu <= 65535:
            raise ValueError("mtu must lie between 1280 and 65535")
        if not 0 <= self.tunnel_mode <= 0o777:
            raise ValueError("tunnel_mode must lie between 0 and 0o777")
        for name in (
            "context_timeout_ms",
            "adopt_timeout_ms",
            "max_pending",
            "max_pending_per_uid",
            "max_tunnels",
            "max_tunnels_per_device",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    def device_uids(self) -> tuple[int, ...]:
        """Uids that may hand a device over, the default filled in."""
        if self.tunnels is None:
            return tuple(uid for uid, _ in self.grants())
        return tuple(grant.uid for grant in self.tunnels if grant.devices)

    def grants(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """(uid, tenants), the default filled in."""
        if self.tunnels is None:
            return tuple((uid, (ANY,)) for uid in sorted({0, os.getuid()}))
        return tuple((grant.uid, grant.tenants) for grant in self.tunnels)
