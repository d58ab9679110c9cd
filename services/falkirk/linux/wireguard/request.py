"""What an interface is told: a JSON file, root's own, that holds its private key. Bytes are base64."""

from __future__ import annotations

import ipaddress
from typing import Final

import msgspec

from falkirk.wire.endpoint import host_and_port

DEFAULT_INTERFACE: Final = "falkirk0"
DEFAULT_MTU: Final = 1420
"""1,500 less what IPv6, UDP and WireGuard add (80)."""
MINIMUM_MTU: Final = 1280
"""RFC 8200 5."""


class PeerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node to have a session with."""

    public_key: bytes
    endpoints: tuple[str, ...] = ()
    """host:port or [v6]:port, in the order in which they are tried."""
    allowed: tuple[str, ...] = ()
    """Prefixes that are reached through it, and that its packets come from."""
    preshared: bytes = bytes(32)
    keepalive_s: float = 25.0
    """The longest silence to it, in seconds; 0: any."""
    patience_s: float = 4.0
    """Seconds without an answer after which the next endpoint is tried; one that can't even be sent to is left at once."""


class InterfaceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An interface with its peers."""

    private_key: bytes
    addresses: tuple[str, ...]
    """Its own, such as 100.96.0.7/32."""
    peers: tuple[PeerRequest, ...]
    name: str = DEFAULT_INTERFACE
    mtu: int = DEFAULT_MTU
    listen_port: int = 0
    """UDP; 0: any."""
    dns: tuple[str, ...] = ()
    """Resolvers' addresses; none: DNS stays as it is."""
    search: tuple[str, ...] = ()
    """Domains that short names are looked up in."""
    control: str = ""
    """Path of the control socket; empty: none."""


def decode(data: bytes) -> InterfaceRequest:
    """Raises ValueError, which says what is wrong and where; no secret is in it."""
    try:
        request = msgspec.json.decode(data, type=InterfaceRequest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not an interface's description: {error}") from None
    if len(request.private_key) != 32:
        raise ValueError("private_key: must have 32 bytes")
    if not 1 <= len(request.name.encode()) <= 15:
        raise ValueError(f"name: {request.name!r} isn't of 1 to 15 bytes")
    if not MINIMUM_MTU <= request.mtu <= 65_000:
        raise ValueError(f"mtu: {request.mtu} isn't from {MINIMUM_MTU} to 65000")
    for address in request.addresses:
        ipaddress.ip_interface(address)
    for address in request.dns:
        ipaddress.ip_address(address)
    for number, peer in enumerate(request.peers):
        if len(peer.public_key) != 32 or len(peer.preshared) != 32:
            raise ValueError(f"peers[{number}]: a public and a preshared key must have 32 bytes")
        for prefix in peer.allowed:
            ipaddress.ip_network(prefix)
        for endpoint in peer.endpoints:
            host_and_port(endpoint)
    return request


def encode(request: InterfaceRequest) -> bytes:
    """JSON of it, keys included."""
    return msgspec.json.format(msgspec.json.encode(request), indent=2)
