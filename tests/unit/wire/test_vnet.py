"""What a vnet header may say about a packet, by table, and that the packet loop's check is the same rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import vnet
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse
from falkirk.wire.vnet import Header
from tests.unit.wire.samples import C4, C6, S4, S6, icmp4, ip4, ip6, tcp4, tcp6, udp

MTU = 1500
TCP4 = tcp4(payload=b"x" * 3000, options=b"\x01" * 12)
TCP6 = tcp6(payload=b"x" * 3000)
UDP4 = ip4(17, udp(C4, S4))
USO4 = ip4(17, udp(C4, S4, b"x" * 3000))
USO6 = ip6(17, udp(C6, S6, b"x" * 3000))
ICMP4 = ip4(1, icmp4(8))
FRAGMENT4 = ip4(17, udp(C4, S4), fragment=0x2000)

GOOD = [
    (TCP4, Header(), Header()),
    (TCP4, Header(2, 0, 9, 9, 9, 9), Header()),
    (TCP4, Header(1, 0, 0, 0, 20, 16), Header(1, 0, 52, 0, 20, 16)),
    (TCP4, Header(3, 1, 7, 1448, 20, 16), Header(1, 1, 52, 1448, 20, 16)),
    (TCP4, Header(1, 0x81, 0, 536, 20, 16), Header(1, 0x81, 52, 536, 20, 16)),
    (TCP6, Header(1, 4, 0, 1500, 40, 16), Header(1, 4, 60, 1500, 40, 16)),
    (UDP4, Header(1, 0, 0, 0, 20, 6), Header(1, 0, 28, 0, 20, 6)),
    (USO4, Header(1, 5, 0, 1472, 20, 6), Header(1, 5, 28, 1472, 20, 6)),
    (USO4, Header(3, 5, 9, 24, 20, 6), Header(1, 5, 28, 24, 20, 6)),
    (USO6, Header(1, 5, 0, 1452, 40, 6), Header(1, 5, 48, 1452, 40, 6)),
    (ICMP4, Header(), Header()),
]
BAD = [
    (TCP4, Header(4), "vnet_flags"),
    (TCP4, Header(0x81, 0, 0, 0, 20, 16), "vnet_flags"),
    (TCP4, Header(1, 0, 0, 0, 21, 16), "vnet_checksum"),
    (TCP4, Header(1, 0, 0, 0, 20, 6), "vnet_checksum"),
    (TCP4, Header(0, 1, 52, 1448), "vnet_checksum"),
    (TCP4, Header(1, 4, 52, 1448, 20, 16), "vnet_gso_type"),
    (TCP4, Header(1, 0x80, 52, 1448, 20, 16), "vnet_gso_type"),
    (TCP4, Header(1, 5, 52, 1448, 20, 16), "vnet_gso_type"),
    (TCP4, Header(1, 1, 52, 535, 20, 16), "vnet_gso_size"),
    (TCP4, Header(1, 1, 52, 1501, 20, 16), "vnet_gso_size"),
    (TCP6, Header(1, 1, 60, 1440, 40, 16), "vnet_gso_type"),
    (UDP4, Header(1, 0, 0, 0, 20, 16), "vnet_checksum"),
    (UDP4, Header(1, 3, 0, 1448, 20, 6), "vnet_gso_type"),
    (UDP4, Header(1, 1, 0, 1448, 20, 6), "vnet_gso_type"),
    (TCP4, Header(1, 5, 0, 1448, 20, 16), "vnet_gso_type"),
    (USO4, Header(1, 0x85, 0, 1448, 20, 6), "vnet_gso_type"),
    (USO4, Header(0, 5, 0, 1448), "vnet_checksum"),
    (USO4, Header(1, 5, 0, 1448, 20, 16), "vnet_checksum"),
    (USO4, Header(1, 5, 0, 1473, 20, 6), "vnet_gso_size"),
    (USO6, Header(1, 5, 0, 1453, 40, 6), "vnet_gso_size"),
    (USO4, Header(1, 5, 0, 23, 20, 6), "vnet_gso_size"),
    (USO4, Header(1, 5, 0, 0, 20, 6), "vnet_gso_size"),
    (ICMP4, Header(1, 0, 0, 0, 20, 2), "vnet_checksum"),
    (FRAGMENT4, Header(1, 0, 0, 0, 20, 6), "vnet_checksum"),
]


@pytest.mark.parametrize(("packet", "header", "normal"), GOOD)
def test_good_headers_become_normal(packet: bytes, header: Header, normal: Header) -> None:
    assert vnet.validate(header, parse(packet, 0, len(packet)), MTU) == normal


@pytest.mark.parametrize(("packet", "header", "reason"), BAD)
def test_lying_headers_are_refused(packet: bytes, header: Header, reason: str) -> None:
    with pytest.raises(MalformedPacket) as caught:
        vnet.validate(header, parse(packet, 0, len(packet), fragments=True), MTU)
    assert caught.value.reason == reason


@given(
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 0x81]) | st.integers(0, 255),
    st.sampled_from([0, 1, 4, 0x81, 0x84, 0x80]) | st.integers(0, 255),
    st.sampled_from([0, 535, 536, 1448, 1500, 1501, 65535]),
    st.sampled_from([0, 20, 34, 40]),
    st.sampled_from([0, 6, 16]),
)
def test_the_loop_decides_as_validate_does(six: bool, flags: int, gso: int, size: int, start: int, at: int) -> None:
    packet = TCP6 if six else TCP4
    header = Header(flags, gso, 999, size, start, at)
    try:
        expected: Header | str = vnet.validate(header, parse(packet, 0, len(packet)), MTU)
    except MalformedPacket as error:
        expected = error.reason
    buf = bytearray(b"...." + header.pack() + packet)
    admit = vnet.admit_tcp6 if six else vnet.admit_tcp4
    try:
        left = admit(buf, 4, len(buf), 40 if six else 20, MTU)
        found: Header | str = vnet.unpack(buf, 4, 10)
        assert isinstance(expected, Header)
        assert left == expected.flags
    except MalformedPacket as error:
        found = error.reason
    if isinstance(expected, str) and isinstance(found, str):
        return
    assert found == expected


def test_too_short_for_a_header() -> None:
    with pytest.raises(MalformedPacket, match="vnet_too_short"):
        vnet.unpack(bytes(9), 0, 9)


def test_round_trip_and_the_flag() -> None:
    header = Header(1, 1, 52, 1448, 20, 16)
    assert vnet.unpack(header.pack(), 0, 10) == header
    assert header.partial
    assert not Header().partial


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize(
    ("change", "end", "reason"),
    [
        (None, -1, "bad_total_length"),
        (None, 1, "bad_total_length"),
        (None, -2990, "bad_total_length"),
        (None, -3010, "truncated_l4"),
        (0x40, 0, "bad_tcp_offset"),
    ],
)
def test_lengths_that_the_loop_must_not_trust(six: bool, change: int | None, end: int, reason: str) -> None:
    packet = tcp6(payload=b"x" * 3000) if six else tcp4(payload=b"x" * 3000)
    upper = 40 if six else 20
    buf = bytearray(vnet.ZERO + packet + b"....")
    if change is not None:
        buf[10 + upper + 12] = change
    admit = vnet.admit_tcp6 if six else vnet.admit_tcp4
    with pytest.raises(MalformedPacket) as caught:
        admit(buf, 0, 10 + len(packet) + end, upper, MTU)
    assert caught.value.reason == reason


@pytest.mark.parametrize("make", [tcp4, tcp6])
def test_a_tcp_header_longer_than_its_packet(make) -> None:  # type: ignore[no-untyped-def]
    packet = make()
    upper = len(packet) - 20
    buf = bytearray(vnet.ZERO + packet)
    buf[10 + upper + 12] = 0x60
    admit = vnet.admit_tcp6 if make is tcp6 else vnet.admit_tcp4
    with pytest.raises(MalformedPacket, match="bad_tcp_offset"):
        admit(buf, 0, len(buf), upper, MTU)
