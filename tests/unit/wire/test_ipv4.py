"""IPv4 headers there and back; the table of bad ones is in test_packet.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import ipv4
from tests.unit.wire.samples import C4, S4, ip4

addresses = st.binary(min_size=4, max_size=4)


@given(addresses, addresses, st.integers(0, 255), st.integers(0, 9000), st.integers(0, 255), st.integers(0, 255))
def test_built_headers_are_read(source: bytes, to: bytes, protocol: int, size: int, ttl: int, tos: int) -> None:
    data = ipv4.build(source, to, protocol, size, ttl=ttl, traffic_class=tos, identification=9)
    head = ipv4.parse(data + bytes(size), 0, 20 + size)
    assert head == ipv4.Ipv4(20, tos, 20 + size, 9, True, False, 0, ttl, protocol, source, to)


def test_all_fields() -> None:
    data = b"##" + ip4(6, bytes(30), options=b"\x01" * 4, fragment=0x2003, ttl=9)
    assert ipv4.parse(data, 2, len(data) - 2) == ipv4.Ipv4(24, 0, 54, 7, False, True, 24, 9, 6, C4, S4)


def test_a_quoted_packet_may_be_cut_short() -> None:
    data = ip4(6, bytes(1000))[:28]
    assert ipv4.parse(data, 0, 28, quoted=True).total_length == 1020
