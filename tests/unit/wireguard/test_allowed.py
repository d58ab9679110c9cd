"""Allowed sources against the standard library's networks."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wireguard.allowed import Allowed


def _prefix(text: str) -> tuple[bytes, int]:
    network = ipaddress.ip_network(text)
    return network.network_address.packed, network.prefixlen


@pytest.mark.parametrize(
    ("prefixes", "address", "held"),
    [
        ((), "10.0.0.1", False),
        (("10.0.0.1/32",), "10.0.0.1", True),
        (("10.0.0.1/32",), "10.0.0.2", False),
        (("10.0.0.0/24", "10.2.0.0/16"), "10.2.3.4", True),
        (("10.0.0.0/24", "10.2.0.0/16"), "10.1.3.4", False),
        (("0.0.0.0/0",), "255.255.255.255", True),
        # Every IPv4 address isn't any IPv6 one, nor the other way round.
        (("0.0.0.0/0",), "::", False),
        (("::/0",), "0.0.0.0", False),
        (("fd00::/8", "::1/128"), "fd12::1", True),
        (("fd00::/8", "::1/128"), "::1", True),
        (("fd00::/8", "::1/128"), "fe80::1", False),
    ],
)
def test_table(prefixes: tuple[str, ...], address: str, held: bool) -> None:
    assert Allowed(map(_prefix, prefixes)).holds(ipaddress.ip_address(address).packed) is held


@given(st.lists(st.ip_addresses(v=4), max_size=3), st.integers(0, 32), st.ip_addresses(v=4))
def test_against_ipaddress(starts: list[ipaddress.IPv4Address], length: int, address: ipaddress.IPv4Address) -> None:
    networks = [ipaddress.ip_network((start, length), strict=False) for start in starts]
    held = any(address in network for network in networks)
    assert Allowed((start.packed, length) for start in starts).holds(address.packed) is held


@pytest.mark.parametrize(
    ("address", "length"), [(b"", 0), (bytes(5), 8), (bytes(4), 33), (bytes(16), 129), (bytes(4), -1)]
)
def test_what_is_no_prefix_is_refused(address: bytes, length: int) -> None:
    with pytest.raises(ValueError, match="no prefix"):
        Allowed([(address, length)])
