"""When cookies are asked for, and how much an address may ask."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from falkirk.wireguard.guard import (
    ADDRESS_BURST,
    ADDRESSES,
    COOKIES_PER_SECOND,
    LOAD_SECONDS,
    Bucket,
    Guard,
    let_in,
    network,
)


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = Bucket(10, 5)
    assert [bucket.take(100.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [bucket.take(100.2) for _ in range(3)] == [True, True, False]
    assert not bucket.full(100.2)
    assert bucket.full(100.8)


def test_load_begins_beyond_the_rate_and_ends_a_second_after() -> None:
    guard = Guard(100)
    assert not any(guard.loaded(1.0) for _ in range(100))
    assert not guard.under_load(1.0)
    assert guard.loaded(1.0)
    assert guard.under_load(1.5)
    assert guard.loaded(1.9)
    assert not guard.under_load(1.0 + LOAD_SECONDS + 1e-6)


def test_load_can_be_said() -> None:
    guard = Guard(100)
    guard.forced = True
    assert guard.loaded(0.0)
    guard.forced = False
    assert not guard.loaded(0.0)


def test_a_rate_of_zero_is_always_loaded() -> None:
    assert all(Guard(0).loaded(now) for now in (0.0, 10.0, 1e9))


def test_an_address_has_an_allowance_and_its_ports_share_it() -> None:
    guard = Guard()
    said = [guard.may_ask(("192.0.2.1", port), 0.0) for port in range(10)]
    assert said.count(True) == ADDRESS_BURST
    assert guard.may_ask(("192.0.2.2", 1), 0.0)
    assert guard.may_ask(("192.0.2.1", 1), 0.05)


def test_an_ipv6_network_shares_one() -> None:
    guard = Guard()
    said = [guard.may_ask((f"2001:db8:1:2::{host:x}", 1, 0, 0), 0.0) for host in range(10)]
    assert said.count(True) == ADDRESS_BURST
    assert guard.may_ask(("2001:db8:1:3::1", 1, 0, 0), 0.0)


def test_more_addresses_than_are_remembered_share_one_until_others_are_forgotten() -> None:
    guard = Guard()
    for number in range(ADDRESSES):
        assert guard.may_ask((str(ipaddress.IPv4Address(number)), 1), 0.0)
    said = [guard.may_ask((str(ipaddress.IPv4Address(ADDRESSES + number)), 1), 0.0) for number in range(10)]
    assert said.count(True) == ADDRESS_BURST
    assert guard.may_ask((str(ipaddress.IPv4Address(1 << 20)), 1), 10.0)
    # And those of before were forgotten, so there is room for as many again.
    assert all(guard.may_ask((str(ipaddress.IPv4Address((1 << 21) + number)), 1), 10.0) for number in range(100))


@given(st.ip_addresses(v=6))
def test_a_network_is_the_first_64_bits(address: ipaddress.IPv6Address) -> None:
    groups = address.exploded.split(":")[:4]
    assert [int(group, 16) for group in network(str(address)).split(":")] == [int(group, 16) for group in groups]
    assert network(f"{address}%eth0") == network(str(address))


def test_ipv4_addresses_of_a_socket_of_both_families_are_told_apart() -> None:
    assert network("::ffff:192.0.2.1") == network("192.0.2.1") != network("::ffff:192.0.2.2")


def test_of_a_flood_as_much_is_let_in_as_is_replied_to() -> None:
    most = int(COOKIES_PER_SECOND)
    # Nothing is kept out before it is twice as much.
    assert let_in(2 * most, 0, 1.0) == let_in(0, 0, 1.0) == 1
    assert let_in(3 * most, 0, 1.0) == let_in(most, 2 * most, 1.0) == 1 / 3
    # However often it is looked; and a flood that ends takes the sieve away.
    assert let_in(most // 10, 9 * most // 10, 0.1) == 0.1
    assert let_in(most // 10, most // 20, 0.1) == 1
