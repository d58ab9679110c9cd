"""Keys of both directions, what an ICMP error points at, and how large a packet is on the wire."""

from __future__ import annotations

import pytest

from falkirk.flow.keys import key_of
from falkirk.flow.passages import (
    key_of_packet,
    key_of_quoted,
    may_be_cut,
    plain,
    reply_key,
    size_on_the_wire,
    unreachable_of,
)
from falkirk.wire import build, icmp, ipv4, vnet
from falkirk.wire.build import icmp_packet
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse
from falkirk.wire.translate import quoted
from tests.unit.wire import samples

A4, B4 = bytes([100, 96, 0, 2]), bytes([100, 96, 0, 3])
A6, B6 = bytes(15) + b"\2", bytes(15) + b"\3"
UDP = b"\x9c\x40\x00\x35\x00\x08\x00\x00"
ESP = bytes(16)


def echo(kind: int, source: bytes, destination: bytes, identifier: int = 7) -> bytes:
    return icmp_packet(bytearray(icmp.build(kind, 0, identifier << 16 | 1)), source, destination)


def key(packet: bytes) -> bytes | None:
    return key_of_packet(parse(packet, 0, len(packet)))


@pytest.mark.parametrize(
    ("there", "back", "protocol", "ports"),
    [
        (samples.ip4(17, UDP, source=A4, destination=B4), samples.ip4(17, UDP[2:4] + UDP[:2] + UDP[4:], source=B4, destination=A4), 17, (40000, 53)),
        (samples.ip4(50, ESP, source=A4, destination=B4), samples.ip4(50, ESP, source=B4, destination=A4), 50, (0, 0)),
        (echo(8, A4, B4), echo(0, B4, A4), 1, (7, 0)),
        (echo(128, A6, B6), echo(129, B6, A6), 58, (7, 0)),
    ],
)  # fmt: skip
def test_a_reply_has_the_key_of_the_other_way(there: bytes, back: bytes, protocol: int, ports: tuple[int, int]) -> None:
    source, destination = (A4, B4) if there[0] >> 4 == 4 else (A6, B6)
    up = key(there)
    assert up == key_of(protocol, source, destination, *ports)
    assert up is not None
    assert key(back) == reply_key(up)
    assert reply_key(reply_key(up)) == up


def test_an_echo_of_the_other_side_is_no_reply() -> None:
    up = key(echo(8, A4, B4))
    assert up is not None
    assert key(echo(8, B4, A4)) not in (up, reply_key(up))


PLAIN = [
    samples.ip4(17, UDP, source=A4, destination=B4),
    samples.ip4(50, ESP, source=A4, destination=B4),
    samples.ip4(6, samples.tcp(A4, B4), source=A4, destination=B4),
    samples.ip6(6, samples.tcp(A6, B6), source=A6, destination=B6),
    samples.ip6(17, UDP, source=A6, destination=B6),
    samples.ip6(132, ESP, source=A6, destination=B6),
    echo(8, A4, B4),
    echo(0, A4, B4),
    echo(128, A6, B6),
    echo(129, A6, B6),
]


def plainly(packet: bytes) -> tuple[bytes, int] | None:
    buffer = bytearray(bytes(10) + packet + bytes(64))
    return plain(buffer, memoryview(buffer), 10 + len(packet))


@pytest.mark.parametrize("packet", PLAIN)
def test_the_quick_look_sees_what_the_parser_sees(packet: bytes) -> None:
    assert plainly(packet) == (key(packet), 30 if packet[0] >> 4 == 4 else 50)


@pytest.mark.parametrize(
    "packet",
    [
        samples.ip4(17, UDP, source=A4, destination=B4, options=b"\1\1\1\0"),
        samples.ip4(17, UDP, source=A4, destination=B4, fragment=0x2000),
        samples.ip4(17, UDP, source=A4, destination=B4, fragment=1),
        samples.ip4(17, UDP, source=A4, destination=B4, ttl=1),
        samples.ip4(17, UDP, source=A4, destination=B4, total=29),
        samples.ip4(17, UDP[:5] + b"\x09\0\0", source=A4, destination=B4),
        samples.ip4(6, bytes(20), source=A4, destination=B4),
        samples.ip4(6, bytes(12) + b"\xf0" + bytes(7), source=A4, destination=B4),
        samples.ip4(50, bytes(7), source=A4, destination=B4),
        samples.ip6(60, b"\x11\0" + bytes(6) + UDP, source=A6, destination=B6),
        samples.ip4(17, UDP, source=A4, destination=B4)[:11]
        + b"\0"
        + samples.ip4(17, UDP, source=A4, destination=B4)[12:],
        echo(13, A4, B4),
        echo(3, A4, B4),
        b"\x55" + bytes(60),
    ],
)
def test_what_is_not_plain_needs_a_closer_look(packet: bytes) -> None:
    assert plainly(packet) is None


@pytest.mark.parametrize("kind", [13, 17, 9, 5])
def test_other_icmp_has_no_key(kind: int) -> None:
    assert key(echo(kind, A4, B4)) is None


@pytest.mark.parametrize("there", [samples.ip4(17, UDP, source=A4, destination=B4), echo(8, A4, B4), echo(0, A4, B4), samples.ip4(50, ESP, source=A4, destination=B4), echo(128, A6, B6)])  # fmt: skip
def test_an_error_points_at_what_answers_the_packet_that_it_quotes(there: bytes) -> None:
    source = B4 if there[0] >> 4 == 4 else B6
    error = build.unreachable(there, parse(there, 0, len(there)), Unreachable.HOST, source)
    assert error is not None
    packet = parse(error, 0, len(error))
    up = key(there)
    assert up is not None
    assert key_of_quoted(error, packet, quoted(error, packet)) == reply_key(up)


def test_an_error_about_other_icmp_points_at_nothing() -> None:
    there = echo(13, A4, B4)
    error = build.unreachable(there, parse(there, 0, len(there)), Unreachable.HOST, B4)
    assert error is not None
    packet = parse(error, 0, len(error))
    assert key_of_quoted(error, packet, quoted(error, packet)) is None


@pytest.mark.parametrize(
    ("header", "length", "size"),
    [
        (vnet.ZERO, 1500, 1500),
        (vnet.Header(1, 0, 0, 0, 20, 16).pack(), 1500, 1500),
        (vnet.Header(1, vnet.GSO_TCPV4, 52, 1448, 20, 16).pack(), 60000, 1500),
        (vnet.Header(1, vnet.GSO_TCPV4, 52, 1448, 20, 16).pack(), 1000, 1000),
        (vnet.Header(1, 5, 28, 1400, 20, 6).pack(), 60000, 1428),
    ],
)
def test_the_size_on_the_wire_is_that_of_a_segment(header: bytes, length: int, size: int) -> None:
    packet = bytearray(header + bytes(length))
    packet[10] = 0x45
    packet[30 + 12] = 8 << 4
    assert size_on_the_wire(packet, len(packet)) == size


@pytest.mark.parametrize("there", [samples.ip4(17, UDP, source=A4, destination=B4), samples.ip4(50, ESP, source=A4, destination=B4), echo(8, A4, B4), echo(128, A6, B6)])  # fmt: skip
@pytest.mark.parametrize("kind", [Unreachable.HOST, Unreachable.PROHIBITED])
def test_an_error_of_which_only_the_key_is_known_points_at_the_same(there: bytes, kind: Unreachable) -> None:
    up = key(there)
    assert up is not None
    here, other = (A4, B4) if there[0] >> 4 == 4 else (A6, B6)
    error = icmp_packet(unreachable_of(up, kind), other, here)
    packet = parse(error, 0, len(error))
    assert (packet.icmp_type, packet.icmp_code) == ((3, kind.value[0]) if here is A4 else kind.value[1:])
    assert key_of_quoted(error, packet, quoted(error, packet)) == reply_key(up)


def test_only_ipv4_without_df_may_be_cut() -> None:
    df = bytearray(10) + ipv4.build(A4, B4, 50, 0)
    clear = bytearray(df)
    clear[16] = 0
    six = bytearray(10) + echo(128, A6, B6)
    assert [may_be_cut(packet) for packet in (df, clear, six)] == [False, True, False]
