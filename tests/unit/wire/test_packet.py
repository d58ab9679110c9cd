"""The parser by table: every reason, every protocol, and that no bytes at all make it fail otherwise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire.malformed import REASONS, MalformedPacket, PeerError
from falkirk.wire.packet import Packet, parse, split, verify
from tests.unit.wire import samples
from tests.unit.wire.samples import C4, C6, S4, S6, icmp4, icmp6, ip4, ip6, tcp, tcp4, tcp6, udp

PAD = bytes.fromhex("010400000000")


def hop(following: int, size: int = 8) -> bytes:
    """A hop-by-hop or destination options header of `size` bytes, all padding."""
    return bytes([following, size // 8 - 1]) + bytes(size - 2)


def routing(following: int, kind: int, left: int) -> bytes:
    return bytes([following, 0, kind, left, 0, 0, 0, 0])


def fragment(following: int, word: int) -> bytes:
    return bytes([following, 0]) + word.to_bytes(2, "big") + (77).to_bytes(4, "big")


def broken_sum(packet: bytes, at: int) -> bytes:
    return packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]


SEGMENT6 = tcp(C6, S6)
BAD: list[tuple[str, bytes, str]] = [
    ("empty", b"", "too_short"),
    ("v4 cut", tcp4()[:19], "too_short"),
    ("v6 cut", tcp6()[:39], "too_short"),
    ("version 5", b"\x55" + bytes(60), "bad_version"),
    ("a context", b'{"v":1,"tenant":"acme"}' + bytes(60), "bad_version"),
    ("v4 header of 16", ip4(6, tcp(C4, S4), header_length=16), "bad_header_length"),
    ("v4 header past the end", ip4(6, b"", header_length=24), "bad_header_length"),
    ("v4 total of 0", ip4(6, tcp(C4, S4), total=0), "bad_total_length"),
    ("v4 total below header", ip4(6, tcp(C4, S4), total=19), "bad_total_length"),
    ("v4 total past the end", ip4(6, tcp(C4, S4), total=41), "bad_total_length"),
    ("v6 length past the end", ip6(6, SEGMENT6, length=21), "bad_total_length"),
    ("v4 checksum", broken_sum(tcp4(), 10), "bad_ip_checksum"),
    ("v4 ttl changed under way", broken_sum(tcp4(), 8), "bad_ip_checksum"),
    ("option cut", ip4(6, tcp(C4, S4), options=b"\x01\x01\x01\x44"), "bad_ip_options"),
    ("option too long", ip4(6, tcp(C4, S4), options=b"\x44\x05\x01\x01"), "bad_ip_options"),
    ("option of length 0", ip4(6, tcp(C4, S4), options=b"\x44\x00\x01\x01"), "bad_ip_options"),
    ("loose source route", ip4(6, tcp(C4, S4), options=b"\x83\x03\x04\x00"), "source_route"),
    ("strict source route", ip4(6, tcp(C4, S4), options=b"\x01\x89\x03\x04"), "source_route"),
    ("routing type 0", ip6(6, SEGMENT6, extensions=routing(6, 0, 0), first=43), "source_route"),
    ("segments left", ip6(6, SEGMENT6, extensions=routing(6, 4, 1), first=43), "source_route"),
    ("hop-by-hop later", ip6(6, SEGMENT6, extensions=hop(0) + hop(6), first=60), "bad_extension_header"),
    ("extension cut", ip6(6, b"", extensions=b"\x06\x00\x00\x00", first=60), "bad_extension_header"),
    ("extension past the end", ip6(6, b"", extensions=b"\x06\x09" + bytes(10), first=60), "bad_extension_header"),
    (
        "two fragment headers",
        ip6(6, SEGMENT6, extensions=fragment(44, 0) + fragment(6, 0), first=44),
        "bad_extension_header",
    ),
    ("nine extensions", ip6(6, SEGMENT6, extensions=hop(60) * 8 + hop(6), first=60), "bad_extension_header"),
    ("long extensions", ip6(6, SEGMENT6, extensions=hop(6, 520), first=60), "bad_extension_header"),
    ("v4 first fragment", ip4(6, tcp(C4, S4), fragment=0x2000), "fragment"),
    ("v4 later fragment", ip4(6, tcp(C4, S4), fragment=0x0001), "fragment"),
    ("v6 first fragment", ip6(6, SEGMENT6, extensions=fragment(6, 1), first=44), "fragment"),
    ("v6 later fragment", ip6(6, SEGMENT6, extensions=fragment(6, 8), first=44), "fragment"),
    ("no tcp", ip4(6, b""), "truncated_l4"),
    ("tcp cut", ip4(6, tcp(C4, S4)[:19]), "truncated_l4"),
    ("udp cut", ip4(17, udp(C4, S4)[:7]), "truncated_l4"),
    ("icmp cut", ip4(1, icmp4(8)[:7]), "truncated_l4"),
    ("tcp cut, behind padding", ip4(6, tcp(C4, S4), total=39), "truncated_l4"),
    ("tcp offset of 16", ip4(6, tcp(C4, S4)[:12] + b"\x40" + tcp(C4, S4)[13:]), "bad_tcp_offset"),
    ("tcp offset past the end", ip4(6, tcp(C4, S4)[:12] + b"\x60" + tcp(C4, S4)[13:]), "bad_tcp_offset"),
    ("udp length of 7", ip4(17, udp(C4, S4, length=7)), "bad_udp_length"),
    ("udp length past the end", ip4(17, udp(C4, S4, length=17)), "bad_udp_length"),
]


@pytest.mark.parametrize(("data", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_packets(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedPacket) as caught:
        parse(bytearray(b"###" + data), 3, len(data))
    assert caught.value.reason == reason
    assert isinstance(caught.value, PeerError)


def test_reasons_are_a_closed_set() -> None:
    assert {row[2] for row in BAD} <= set(REASONS)
    assert len(set(REASONS)) == len(REASONS)


def test_tcp4() -> None:
    data = b"###" + tcp4(flags=samples.SYN, payload=b"fast open", options=b"\x02\x04\x05\xb4") + b"padding"
    packet = parse(memoryview(data), 3, len(data) - 3)
    assert packet == Packet(
        version=4,
        at=3,
        total_length=53,
        header_length=20,
        protocol=6,
        source=C4,
        destination=S4,
        ttl=64,
        traffic_class=0,
        dont_fragment=True,
        identification=7,
        payload_offset=44,
        source_port=40000,
        destination_port=443,
        sequence=1000,
        acknowledgment=2000,
        flags=samples.SYN,
        window=512,
    )
    assert (packet.payload_length, packet.segment_length, packet.is_icmp_error) == (9, 10, False)


def test_tcp6_behind_every_extension_that_is_walked() -> None:
    extensions = hop(60) + hop(43, 16) + routing(44, 4, 0) + fragment(6, 0)
    data = ip6(6, tcp(C6, S6, flags=samples.FIN | samples.ACK), extensions=extensions, first=0, ttl=3)
    packet = parse(data, 0, len(data))
    assert (packet.version, packet.header_length, packet.protocol, packet.ttl) == (6, 80, 6, 3)
    assert (packet.source, packet.destination, packet.destination_port) == (C6, S6, 443)
    assert (packet.payload_length, packet.segment_length, packet.dont_fragment) == (0, 1, True)
    verify(data, packet)


@pytest.mark.parametrize("options", [b"", b"\x01\x01\x01\x00", b"\x07\x04\x04\x00", b"\x00\x83\x00\x00"])
def test_ipv4_options_that_do_no_harm(options: bytes) -> None:
    data = ip4(6, tcp(C4, S4), options=options)
    packet = parse(data, 0, len(data))
    assert packet.header_length == 20 + len(options)
    verify(data, packet)


@pytest.mark.parametrize(
    ("data", "kind", "error", "identifier"),
    [
        (ip4(1, icmp4(8)), 8, False, 5),
        (ip4(1, icmp4(0)), 0, False, 5),
        (ip4(1, icmp4(3, 4)), 3, True, 0),
        (ip4(1, icmp4(5)), 5, True, 0),
        (ip4(1, icmp4(13)), 13, False, 0),
        (ip6(58, icmp6(128)), 128, False, 5),
        (ip6(58, icmp6(2)), 2, True, 0),
        (ip6(58, icmp6(100)), 100, True, 0),
        (ip6(58, icmp6(137)), 137, True, 0),
        (ip6(58, icmp6(135)), 135, False, 0),
    ],
)
def test_icmp(data: bytes, kind: int, error: bool, identifier: int) -> None:
    packet = parse(data, 0, len(data))
    assert (packet.icmp_type, packet.is_icmp_error, packet.identifier) == (kind, error, identifier)
    assert packet.sequence == (9 if identifier else 0)
    verify(data, packet)


def test_icmp_of_the_other_family_is_just_a_protocol() -> None:
    data = ip4(58, icmp6(128))
    assert parse(data, 0, len(data)).icmp_type == -1
    verify(data, parse(data, 0, len(data)))


def test_fragments_when_asked_for() -> None:
    later = ip4(17, b"middle", fragment=0x2002)
    packet = parse(later, 0, len(later), fragments=True)
    assert (packet.fragment_offset, packet.more_fragments, packet.source_port) == (16, True, 0)
    first = ip4(17, udp(C4, S4, length=2000), fragment=0x2000)
    packet = parse(first, 0, len(first), fragments=True)
    assert (packet.fragment_offset, packet.more_fragments, packet.destination_port) == (0, True, 53)
    verify(first, packet)
    six = ip6(17, b"middle", extensions=fragment(17, 8 | 1), first=44)
    packet = parse(six, 0, len(six), fragments=True)
    assert (packet.fragment_offset, packet.more_fragments, packet.identification) == (8, True, 77)


GOOD = [
    tcp4(payload=b"odd"),
    tcp6(payload=b"odd"),
    ip4(17, udp(C4, S4)),
    ip6(17, udp(C6, S6)),
    ip4(1, icmp4(8)),
    ip6(58, icmp6(128)),
]


@pytest.mark.parametrize("data", GOOD)
def test_verify(data: bytes) -> None:
    packet = parse(data, 0, len(data))
    verify(data, packet)
    with pytest.raises(MalformedPacket, match="bad_l4_checksum"):
        verify(broken_sum(data, len(data) - 1), packet)


def test_udp_without_a_checksum() -> None:
    none4 = ip4(17, udp(C4, S4)[:6] + b"\0\0" + b"question")
    verify(none4, parse(none4, 0, len(none4)))
    none6 = ip6(17, udp(C6, S6)[:6] + b"\0\0" + b"question")
    with pytest.raises(MalformedPacket, match="bad_l4_checksum"):
        verify(none6, parse(none6, 0, len(none6)))


def test_split() -> None:
    parts = [tcp4(payload=b"abc"), tcp6(), ip4(1, icmp4(8)), tcp4()]
    data = b"##" + b"".join(parts)
    found = list(split(data, len(data), 2))
    assert [data[at : at + size] for at, size in found] == parts
    assert list(split(b"", 0)) == []


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"\x45\x00\x00\x00" + bytes(40), "bad_total_length"),
        (b"\x45\x00\x00\x13" + bytes(40), "bad_total_length"),
        (b"\x45\x00\x00\x40" + bytes(40), "bad_total_length"),
        (b"\x60\x00\x00\x00\x00\x10" + bytes(40), "bad_total_length"),
        (b"\x45\x00", "too_short"),
        (b"\x60" + bytes(38), "too_short"),
        (b"\x00" * 60, "bad_version"),
    ],
)
def test_split_stops_at_what_has_no_length(tail: bytes, reason: str) -> None:
    good = tcp4()
    data = good + tail
    assert split_until_bad(data) == ([(0, len(good))], reason)


mutations = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4)


@given(
    st.sampled_from([*GOOD, ip6(6, SEGMENT6, extensions=hop(43) + routing(6, 4, 0), first=0)]), mutations, st.booleans()
)
def test_mutations_parse_or_are_malformed(data: bytes, changes: list[tuple[int, int]], mend: bool) -> None:
    changed = bytearray(data)
    for at, value in changes:
        changed[at % len(changed)] = value
    if mend and changed[0] >> 4 == 4:
        changed[10:12] = b"\0\0"
        size = (changed[0] & 15) << 2
        changed[10:12] = samples.slow_checksum(bytes(changed[:size])).to_bytes(2, "big")
    check_any(bytes(changed))


@given(st.binary(max_size=80), st.sampled_from([b"", b"\x45\x00", b"\x60"]))
def test_any_bytes(data: bytes, start: bytes) -> None:
    check_any(start + data)


def check_any(data: bytes) -> None:
    """Whatever it is: a packet within its bounds, or a known reason; splitting ends."""
    assert len(split_until_bad(data)[0]) <= len(data) // 20 + 1
    packet: Packet | None = None
    reason = ""
    try:
        packet = parse(data, 0, len(data), fragments=True)
        verify(data, packet)
    except MalformedPacket as error:
        reason = error.reason
    assert reason in ("", *REASONS)
    if packet is not None:
        assert packet.header_length <= packet.payload_offset <= packet.total_length <= len(data)


def split_until_bad(data: bytes) -> tuple[list[tuple[int, int]], str]:
    """What `split` yields, and the reason that it stopped for."""
    found: list[tuple[int, int]] = []
    parts = split(data, len(data))
    try:
        while part := next(parts, None):
            found.append(part)
    except MalformedPacket as error:
        return found, error.reason
    return found, ""
