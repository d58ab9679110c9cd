"""Where a tenant's resolver is."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from falkirk.decide import resolver
from falkirk.registry import pools


@pytest.mark.parametrize(
    ("pool", "address"),
    [
        (pools.DEFAULT_POOL4, "100.96.0.53"),
        ("10.0.0.0/26", "10.0.0.53"),
        # 30 hosts: 53 isn't one of them.
        ("10.0.0.64/27", "10.0.0.65"),
        ("10.0.0.0/29", "10.0.0.1"),
        ("fd01:203:405::/64", "fd01:203:405::53"),
    ],
)
def test_its_address_lies_in_the_pool(pool: str, address: str) -> None:
    assert resolver.address(pool) == address
    assert ip_address(address) in ip_network(pool)


@pytest.mark.parametrize("pool", [pools.DEFAULT_POOL4, "10.0.0.0/26", "10.0.0.0/27", "10.0.0.0/29"])
def test_no_device_is_given_its_address(pool: str) -> None:
    small = 1 << 9
    given = {pools.at(pool, number) for number, _ in zip(pools.indexes(pool, 0), range(small), strict=False)}
    assert resolver.address(pool) not in given
    # Nobody else lost one to it, and the capacity that a full pool names is what it gave.
    assert len(given) == min(pools.capacity(pool), small)


def test_of_two_pools_each_gives_one() -> None:
    assert resolver.addresses("10.0.0.0/24", "fd01::/64") == ("10.0.0.53", "fd01::53")
    assert resolver.addresses("10.0.0.0/24", "") == ("10.0.0.53",)


def test_devices_are_below_their_tenant() -> None:
    assert resolver.search_domain("acme") == "acme.falkirk"
