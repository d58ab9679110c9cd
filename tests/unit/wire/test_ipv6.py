"""IPv6 headers there and back; the table of bad ones is in test_packet.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import ipv6
from tests.unit.wire.samples import C6, S6, ip6

addresses = st.binary(min_size=16, max_size=16)
HOP = bytes([60, 0]) + bytes(6)
LONG = bytes([6, 2]) + bytes(22)


@given(
    addresses, addresses, st.sampled_from([6, 17, 58]), st.integers(0, 9000), st.integers(0, 255), st.integers(0, 255)
)
def test_built_headers_are_read(source: bytes, to: bytes, protocol: int, size: int, hops: int, tos: int) -> None:
    data = ipv6.build(source, to, protocol, size, hop_limit=hops, traffic_class=tos)
    head = ipv6.parse(data + bytes(size), 0, 40 + size)
    assert head == ipv6.Ipv6(40, tos, 0, 40 + size, hops, protocol, source, to)


@pytest.mark.parametrize(
    ("extensions", "first", "header_length", "protocol"),
    [
        (HOP + LONG, 0, 72, 6),
        (bytes([59, 0]) + bytes(6), 60, 48, 59),
        (bytes([51, 0]) + bytes(6), 60, 48, 51),
        (b"", 50, 40, 50),
        (b"", 135, 40, 135),
    ],
)
def test_how_far_the_walk_goes(extensions: bytes, first: int, header_length: int, protocol: int) -> None:
    data = ip6(6, bytes(20), extensions=extensions, first=first)
    head = ipv6.parse(data, 0, len(data))
    assert (head.header_length, head.protocol, head.source, head.destination) == (header_length, protocol, C6, S6)


def test_class_and_flow_label() -> None:
    data = bytes.fromhex("6ab12345") + ip6(6, bytes(20))[4:]
    head = ipv6.parse(data, 0, len(data))
    assert (head.traffic_class, head.flow_label) == (0xAB, 0x12345)


def test_a_quoted_packet_may_be_cut_short() -> None:
    data = ip6(6, bytes(1000))[:48]
    assert ipv6.parse(data, 0, 48, quoted=True).total_length == 1040
