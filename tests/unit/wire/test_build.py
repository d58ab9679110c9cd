"""Answers by table: when there is one, what it says, and that it is a valid packet itself."""

from __future__ import annotations

import pytest

from falkirk.wire import build, tcp
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import Packet, parse, verify
from tests.unit.wire.samples import C4, C6, S4, S6, icmp4, icmp6, ip4, ip6, tcp4, tcp6, udp
from tests.unit.wire.samples import tcp as segment

GATEWAY4 = bytes([100, 96, 0, 1])
GATEWAY6 = bytes.fromhex("fd000000000000010000000000000001")


def read(data: bytes) -> Packet:
    packet = parse(data, 0, len(data))
    assert packet.total_length == len(data)
    verify(data, packet)
    return packet


@pytest.mark.parametrize("make", [tcp4, tcp6])
@pytest.mark.parametrize(
    ("flags", "payload", "sequence", "acknowledgment", "answer"),
    [
        # RFC 9293 3.10.7.1: an ACK says where the sender expects the reset ...
        (tcp.ACK, b"abc", 2000, 0, tcp.RST),
        (tcp.SYN | tcp.ACK, b"", 2000, 0, tcp.RST),
        # ... and without one everything that was sent is acknowledged, SYN and FIN included.
        (tcp.SYN, b"", 0, 1001, tcp.RST | tcp.ACK),
        (tcp.SYN | tcp.FIN, b"abc", 0, 1005, tcp.RST | tcp.ACK),
        (0, b"abc", 0, 1003, tcp.RST | tcp.ACK),
    ],
)
def test_reset(make, flags: int, payload: bytes, sequence: int, acknowledgment: int, answer: int) -> None:  # type: ignore[no-untyped-def]
    data = make(flags=flags, payload=payload)
    packet = parse(data, 0, len(data))
    answered = build.reset(packet)
    assert answered is not None
    got = read(answered)
    assert (got.source, got.destination) == (packet.destination, packet.source)
    assert (got.source_port, got.destination_port) == (443, 40000)
    assert (got.sequence, got.acknowledgment, got.flags) == (sequence, acknowledgment, answer)
    assert (got.ttl, got.window, got.payload_length) == (64, 0, 0)


def test_reset_wraps_around() -> None:
    data = tcp4(flags=tcp.SYN, sequence=0xFFFFFFFF)
    answered = build.reset(parse(data, 0, len(data)))
    assert answered is not None
    assert read(answered).acknowledgment == 0


@pytest.mark.parametrize("data", [tcp4(flags=tcp.RST), tcp6(flags=tcp.RST | tcp.ACK), ip4(17, udp(C4, S4))])
def test_no_reset_for_a_reset_or_another_protocol(data: bytes) -> None:
    assert build.reset(parse(data, 0, len(data))) is None


@pytest.mark.parametrize(
    ("why", "code4", "type6", "code6"),
    [
        (Unreachable.NET, 0, 1, 0),
        (Unreachable.HOST, 1, 1, 3),
        (Unreachable.PROTOCOL, 2, 4, 1),
        (Unreachable.PORT, 3, 1, 4),
        (Unreachable.PROHIBITED, 13, 1, 1),
    ],
)
def test_unreachable(why: Unreachable, code4: int, type6: int, code6: int) -> None:
    four, six = b"##" + tcp4(payload=b"x" * 3000), b"##" + tcp6(payload=b"x" * 3000)
    answer4 = build.unreachable(four, parse(four, 2, len(four) - 2), why, GATEWAY4)
    answer6 = build.unreachable(six, parse(six, 2, len(six) - 2), why, GATEWAY6)
    assert answer4 is not None
    assert answer6 is not None
    got4, got6 = read(answer4), read(answer6)
    assert (got4.icmp_type, got4.icmp_code, got4.source, got4.destination) == (3, code4, GATEWAY4, C4)
    assert (got6.icmp_type, got6.icmp_code, got6.source, got6.destination) == (type6, code6, GATEWAY6, C6)
    assert (len(answer4), len(answer6)) == (576, 1280)
    assert answer4[28:] == four[2 : 2 + 548]
    assert answer6[48:] == six[2 : 2 + 1232]
    assert answer4[24:28] == bytes(4)
    assert answer6[44:48] == (6 if why is Unreachable.PROTOCOL else 0).to_bytes(4, "big")


def test_a_short_packet_is_quoted_whole() -> None:
    data = tcp4()
    answer = build.unreachable(data + b"padding", parse(data, 0, len(data)), Unreachable.PORT, GATEWAY4)
    assert answer is not None
    assert answer[28:] == data


@pytest.mark.parametrize(
    ("extensions", "first", "pointer"),
    [
        (b"", None, 6),
        (bytes([135, 0]) + bytes(6), 60, 40),
        (bytes([44, 0]) + bytes(6) + bytes([135]) + bytes(7), 60, 48),
    ],
)
def test_the_pointer_of_an_unknown_next_header(extensions: bytes, first: int | None, pointer: int) -> None:
    data = ip6(135, b"", extensions=extensions, first=first)
    answer = build.unreachable(data, parse(data, 0, len(data)), Unreachable.PROTOCOL, GATEWAY6)
    assert answer is not None
    assert int.from_bytes(answer[44:48], "big") == pointer


def test_time_exceeded_and_too_big() -> None:
    four, six = tcp4(), tcp6()
    packet4, packet6 = parse(four, 0, len(four)), parse(six, 0, len(six))
    rows = [
        (build.time_exceeded(four, packet4, GATEWAY4), 11, 0, 0),
        (build.time_exceeded(six, packet6, GATEWAY6), 3, 0, 0),
        (build.too_big(four, packet4, 1400, GATEWAY4), 3, 4, 1400),
        (build.too_big(six, packet6, 70000, GATEWAY6), 2, 0, 70000),
    ]
    for answer, kind, code, rest in rows:
        assert answer is not None
        got = read(answer)
        assert (got.icmp_type, got.icmp_code) == (kind, code)
        assert int.from_bytes(answer[got.payload_offset - 4 : got.payload_offset], "big") == rest


MULTICAST6 = bytes.fromhex("ff020000000000000000000000000001")


@pytest.mark.parametrize(
    "data",
    [
        ip4(1, icmp4(3)),
        ip4(1, icmp4(11)),
        ip4(1, icmp4(5)),
        ip4(17, b"middle", fragment=1),
        ip4(17, udp(C4, S4), destination=bytes([224, 0, 0, 1])),
        ip4(17, udp(C4, S4), destination=bytes([255] * 4)),
        ip4(17, udp(C4, S4), source=bytes(4)),
        ip4(17, udp(C4, S4), source=bytes([127, 0, 0, 1])),
        ip4(17, udp(C4, S4), source=bytes([239, 0, 0, 1])),
        ip4(17, udp(C4, S4), source=bytes([255] * 4)),
        ip6(58, icmp6(1)),
        ip6(58, icmp6(137)),
        ip6(17, b"middle", extensions=bytes([17, 0, 0, 8, 0, 0, 0, 1]), first=44),
        ip6(17, udp(C6, S6), destination=MULTICAST6),
        ip6(17, udp(C6, S6), source=MULTICAST6),
        ip6(17, udp(C6, S6), source=bytes(16)),
        ip6(17, udp(C6, S6), source=bytes(15) + b"\x01"),
    ],
)
def test_never_an_error_about(data: bytes) -> None:
    packet = parse(data, 0, len(data), fragments=True)
    source = GATEWAY4 if packet.version == 4 else GATEWAY6
    assert build.unreachable(data, packet, Unreachable.PORT, source) is None
    assert build.time_exceeded(data, packet, source) is None


@pytest.mark.parametrize(
    "data", [ip4(1, icmp4(8)), ip6(58, icmp6(128)), ip4(17, udp(C4, S4, length=999), fragment=0x2000)]
)
def test_errors_about_echoes_and_first_fragments(data: bytes) -> None:
    packet = parse(data, 0, len(data), fragments=True)
    source = GATEWAY4 if packet.version == 4 else GATEWAY6
    assert build.unreachable(data, packet, Unreachable.HOST, source) is not None


@pytest.mark.parametrize(
    "data",
    [
        ip4(6, segment(C4, S4), destination=bytes([224, 0, 0, 1])),
        ip4(6, segment(C4, S4), source=bytes(4)),
        ip4(6, segment(C4, S4), source=bytes([255] * 4)),
        ip6(6, segment(C6, S6), destination=MULTICAST6),
        ip6(6, segment(C6, S6), source=bytes(16)),
    ],
)
def test_no_reset_to_or_from_many(data: bytes) -> None:
    assert build.reset(parse(data, 0, len(data))) is None


def test_too_big_may_be_about_multicast() -> None:
    data = ip6(17, udp(C6, S6), destination=MULTICAST6)
    assert build.too_big(data, parse(data, 0, len(data)), 1280, GATEWAY6) is not None


def test_segment_of_one_s_own() -> None:
    data = build.segment(S6, C6, 443, 40000, 5, 6, tcp.RST | tcp.ACK, window=1)
    got = read(data)
    assert (got.source, got.sequence, got.acknowledgment, got.flags, got.window) == (S6, 5, 6, 0x14, 1)
    assert segment(S6, C6, sport=443, dport=40000, sequence=5, acknowledgment=6, flags=0x14, window=1) == data[40:]
