"""Addresses for devices, taken from a tenant's two pools in turn. PURE.

An address is a prefix and an index, the host part as a number. Index 0 is the prefix itself (in IPv6 the subnet-router
anycast address, RFC 4291 section 2.6.1), index 1 is kept for a gateway, the tenant's resolver has one of its own
(`falkirk.decide.resolver`), and the last one of an IPv4 pool is its broadcast address. Indexes are handed out upwards from the last one, so that a freed address rests as long as possible
before another device speaks from it; at the end of the pool the search starts over. Limit: 2^48 indexes of an IPv6 pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv6Address, ip_network

from falkirk.decide import resolver

FIRST = 2
"""The first index that a device may have."""
DEFAULT_POOL4 = "100.96.0.0/12"
"""The shared address space (RFC 6598) above what carriers usually hand out."""

_LIMIT6 = 1 << 48


def last(pool: str) -> int:
    """The last index that a device may have."""
    network = ip_network(pool)
    return network.num_addresses - 2 if network.version == 4 else _LIMIT6


def capacity(pool: str) -> int:
    """Devices that fit into a pool."""
    return last(pool) - FIRST + 1 - (resolver.index(pool) >= FIRST)


def indexes(pool: str, cursor: int) -> Iterator[int]:
    """Every index once, in the order in which to try them, where `cursor` was the last one given."""
    end = last(pool)
    start = cursor + 1 if FIRST <= cursor + 1 <= end else FIRST
    reserved = resolver.index(pool)
    for places in (range(start, end + 1), range(FIRST, start)):
        for index in places:
            if index != reserved:
                yield index


def at(pool: str, index: int) -> str:
    """The address of an index, in canonical text."""
    return str(ip_network(pool).network_address + index)


def ula(random: bytes) -> str:
    """A /64 of a new unique local prefix from 5 random bytes: fd, 40-bit global id, subnet 0 (RFC 4193 section 3.1)."""
    if len(random) != 5:
        raise ValueError("a global id has 40 bits")
    return f"{IPv6Address(bytes([0xFD]) + random + bytes(10))}/64"
