"""Where a tenant's resolver is, and what the names of its devices are. PURE: registry, router, flow and clients agree by this.

Every tenant has a resolver on one virtual address of each of its two device pools, in each of its virtual networks: host number 53
(100.96.0.53, and ::53 in hexadecimal notation of the IPv6 prefix), so that it can be guessed and remembered. A pool that is too small for that
(an IPv4 prefix longer than /26) gives the host number 1, which the pools keep for a gateway.

Devices are named DEVICE.TENANT.falkirk; the search domain is TENANT.falkirk. Nothing below `falkirk.` is ever asked of the world
(RFC 6761 section 4 lets a private resolver own a name like this; it isn't delegated in the root).
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Final

import msgspec

DOMAIN: Final = "falkirk"
"""All tenants' names end in it."""
PORT: Final = 53
"""RFC 1035 4.2: UDP and TCP."""
INDEX4: Final = 53
"""The resolver's host number in an IPv4 pool."""
INDEX6: Final = 0x53
"""The same in an IPv6 pool, where it reads ::53."""
_GATEWAY: Final = 1


class Query(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a resolver is asked, as rules see it."""

    name: str = ""
    """In lower case and without the last dot; "" for a flow of which no question is known."""
    type: str = ""
    """Such as "AAAA"; "TYPE65280" for one without a name (RFC 3597 section 5)."""


NO_QUERY: Final = Query()
"""A flow as such, not a question in it."""


def index(pool: str) -> int:
    """The resolver's host number in a pool (a prefix in text). Raises ValueError for what isn't a prefix."""
    network = ip_network(pool)
    if network.version == 6:
        return INDEX6
    return INDEX4 if network.num_addresses - 2 >= INDEX4 else _GATEWAY


def address(pool: str) -> str:
    """The resolver's address in a pool, in canonical text. Raises ValueError for what isn't a prefix."""
    return str(ip_network(pool).network_address + index(pool))


def addresses(*pools: str) -> tuple[str, ...]:
    """The resolver's addresses in pools of which some may be empty: what a device is given as its DNS servers."""
    return tuple(address(pool) for pool in pools if pool)


def endpoint(text: str) -> tuple[str, int]:
    """Address and port of a resolver: "10.1.0.2", "10.1.0.2:5353", "fd00::1" or "[fd00::1]:5353". Raises ValueError."""
    host, port = text, str(PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]:")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} isn't an address, or an address and a port")
    return str(ip_address(host)), int(port)


def search_domain(tenant: str) -> str:
    """The domain of a tenant's devices, without a last dot."""
    return f"{tenant}.{DOMAIN}"
