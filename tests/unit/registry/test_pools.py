"""Addresses from pools."""

from __future__ import annotations

import itertools
from ipaddress import ip_address, ip_network

import pytest

from falkirk.registry import pools


def test_an_ipv4_pool_leaves_network_gateway_and_broadcast_out() -> None:
    given = [pools.at("10.0.0.0/29", index) for index in pools.indexes("10.0.0.0/29", 0)]
    assert given == [f"10.0.0.{host}" for host in range(2, 7)]
    assert pools.capacity("10.0.0.0/29") == len(given)


def test_the_search_goes_on_behind_the_cursor_and_starts_over() -> None:
    assert list(pools.indexes("10.0.0.0/29", 4)) == [5, 6, 2, 3, 4]
    assert list(pools.indexes("10.0.0.0/29", 6)) == [2, 3, 4, 5, 6]
    # A pool that was made smaller leaves its cursor behind its end.
    assert list(pools.indexes("10.0.0.0/29", 900)) == [2, 3, 4, 5, 6]


def test_an_ipv6_pool_is_as_good_as_endless() -> None:
    first = itertools.islice(pools.indexes("fd01:203:405::/64", 0), 2)
    assert [pools.at("fd01:203:405::/64", index) for index in first] == ["fd01:203:405::2", "fd01:203:405::3"]
    assert pools.capacity("fd01:203:405::/64") > 1 << 47


def test_every_ipv6_address_lies_in_its_pool() -> None:
    pool = "fd01:203:405::/64"
    assert ip_address(pools.at(pool, pools.last(pool))) in ip_network(pool)


def test_the_default_pool_lies_in_the_shared_address_space() -> None:
    assert ip_network(pools.DEFAULT_POOL4).subnet_of(ip_network("100.64.0.0/10"))  # type: ignore[arg-type]
    assert pools.at(pools.DEFAULT_POOL4, pools.FIRST) == "100.96.0.2"


def test_a_unique_local_prefix_is_made_of_forty_random_bits() -> None:
    assert pools.ula(bytes([1, 2, 3, 4, 5])) == "fd01:203:405::/64"
    with pytest.raises(ValueError, match="40 bits"):
        pools.ula(b"\1")
