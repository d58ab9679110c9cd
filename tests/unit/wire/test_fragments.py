"""One fragment by itself, packets out of fragments and back, each against bytes written by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire.fragments import Piece, assemble, cut, piece
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse, verify
from tests.unit.wire import samples
from tests.unit.wire.samples import C4, C6, S4, S6

MORE = 0x2000
DF = 0x4000


def fragment6(
    offset: int, more: bool, data: bytes, *, protocol: int = 17, number: int = 7, before: bytes = b""
) -> bytes:
    """`before` are per-fragment headers; the last of them must say 44."""
    head = struct.pack(">BBHI", protocol, 0, offset | more, number)
    return samples.ip6(protocol, data, extensions=before + head, first=0 if before else 44)


def fragment4(offset: int, more: bool, data: bytes, *, protocol: int = 17, **fields: object) -> bytes:
    word = (MORE if more else 0) | offset >> 3
    return samples.ip4(protocol, data, fragment=word, **fields)  # type: ignore[arg-type]


def read(packet: bytes) -> Piece:
    """Behind something else, as it lies behind a virtio-net header."""
    padded = bytes(10) + packet
    return piece(padded, parse(padded, 10, len(packet), fragments=True))


def test_what_an_ipv4_fragment_is_a_piece_of() -> None:
    packet = fragment4(1480, True, bytes(range(24)), identification=0x1234, options=b"\x94\x04\0\0")
    got = read(packet)
    assert got == Piece(C4 + S4 + b"\x11\x12\x34", 1480, 1504, True, packet, 24, 0)
    assert got.data == bytes(range(24))


def test_what_an_ipv6_fragment_is_a_piece_of() -> None:
    packet = fragment6(1448, False, b"end", number=0x12345678)
    got = read(packet)
    assert got == Piece(C6 + S6 + b"\x12\x34\x56\x78", 1448, 1451, False, packet, 48, 6)
    assert got.data == b"end"


def test_ipv4_fragments_of_another_protocol_belong_elsewhere_and_ipv6_ones_do_not() -> None:
    assert read(fragment4(8, False, b"x", protocol=17)).key != read(fragment4(8, False, b"x", protocol=1)).key
    assert read(fragment6(8, False, b"x", protocol=17)).key == read(fragment6(8, False, b"x", protocol=58)).key


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (fragment4(8, True, bytes(9)), "fragment_length"),
        (fragment4(8, True, b""), "fragment_length"),
        (fragment4(8, False, b""), "fragment_length"),
        (fragment6(8, True, bytes(9)), "fragment_length"),
        (fragment6(8, False, b""), "fragment_length"),
        # 65,528 + 20 of the header: the ping of death.
        (fragment4(65512, False, bytes(4)), "fragment_too_long"),
        (fragment4(65504, False, bytes(12), options=bytes(4)), "fragment_too_long"),
        (fragment6(65528, False, bytes(8)), "fragment_too_long"),
        (fragment6(65512, False, bytes(24), before=b"\x2c\0\x01\x04\0\0\0\0"), "fragment_too_long"),
        # RFC 3128: TCP's flags at offset 8, its checksum at 16.
        (fragment4(8, True, bytes(8), protocol=6), "fragment_tiny"),
        (fragment4(16, True, bytes(8), protocol=6), "fragment_tiny"),
        (fragment6(8, True, bytes(8), protocol=6), "fragment_tiny"),
        # RFC 1858, RFC 7112: the first one without the whole of the upper layer's header.
        (fragment4(0, True, bytes(16), protocol=6), "fragment_tiny"),
        (fragment4(0, True, samples.tcp(C4, S4, options=bytes(12))[:24], protocol=6), "fragment_tiny"),
        (fragment6(0, True, bytes(16), protocol=6), "fragment_tiny"),
        (fragment6(0, True, b"\x11\x01" + bytes(6), protocol=60), "bad_extension_header"),
        # Nor one fragment header inside another.
        (fragment6(0, True, struct.pack(">BBHI", 17, 0, 1, 9) + bytes(8), protocol=44), "bad_extension_header"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"ipv{value[0] >> 4}",
)
def test_fragments_that_nobody_needs_to_make(packet: bytes, reason: str) -> None:
    with pytest.raises(MalformedPacket, match=reason):
        read(packet)


@pytest.mark.parametrize(
    "packet",
    [
        fragment4(65512, False, bytes(3)),
        fragment6(65528, False, bytes(7)),
        fragment4(24, True, bytes(8), protocol=6),
        fragment4(8, True, bytes(8), protocol=17),
        fragment4(0, True, samples.tcp(C4, S4, payload=bytes(4)), protocol=6),
        fragment6(0, True, samples.tcp(C6, S6, payload=bytes(4)), protocol=6),
    ],
    ids=lambda packet: f"ipv{packet[0] >> 4}",
)
def test_fragments_at_the_edge_of_what_is_right(packet: bytes) -> None:
    assert read(packet).packet == packet


def test_an_atomic_fragment_is_no_fragment() -> None:
    packet = fragment6(0, False, samples.udp(C6, S6))
    parsed = parse(packet, 0, len(packet))
    assert (parsed.is_fragment, parsed.protocol, parsed.header_length) == (False, 17, 48)


def test_an_ipv4_packet_of_its_pieces() -> None:
    body = samples.udp(C4, S4, bytes(range(40)))
    options = b"\x94\x04\0\0"
    pieces = [
        read(fragment4(0, True, body[:24], options=options, ttl=60)),
        read(fragment4(24, True, body[24:40], ttl=61)),
        read(fragment4(40, False, body[40:], ttl=62)),
    ]
    whole = assemble(pieces)
    assert whole == samples.ip4(17, body, options=options, ttl=60, fragment=0)
    verify(whole, parse(whole, 0, len(whole)))


def test_an_ipv6_packet_of_its_pieces() -> None:
    body = samples.udp(C6, S6, bytes(range(40)))
    before = b"\x2c\0\x01\x04\0\0\0\0"
    # RFC 8200 4.5: the first fragment's next header counts.
    pieces = [
        read(fragment6(0, True, body[:24], before=before)),
        read(fragment6(24, False, body[24:], before=before, protocol=58)),
    ]
    whole = assemble(pieces)
    assert whole == samples.ip6(17, body, extensions=b"\x11" + before[1:], first=0)
    verify(whole, parse(whole, 0, len(whole)))


def test_an_ipv4_packet_that_does_not_fit_behind_the_first_ones_header() -> None:
    pieces = [
        read(fragment4(0, True, bytes(32752), options=bytes(40), protocol=50)),
        read(fragment4(32752, True, bytes(32752), protocol=50)),
        read(fragment4(65504, False, bytes(11), protocol=50)),
    ]
    with pytest.raises(MalformedPacket, match="fragment_too_long"):
        assemble(pieces)


NOT_CAPABLE, ECT1, ECT0, CE = 0, 1, 2, 3


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("marks", "whole"),
    [
        ((NOT_CAPABLE, NOT_CAPABLE), NOT_CAPABLE),
        ((ECT0, ECT0), ECT0),
        ((ECT0, CE), CE),
        ((CE, ECT1), CE),
        ((CE, CE), CE),
        ((NOT_CAPABLE, ECT0), NOT_CAPABLE),
        ((CE, NOT_CAPABLE), None),
        ((NOT_CAPABLE, CE), None),
    ],
)
def test_congestion_told_to_one_fragment(version: int, marks: tuple[int, int], whole: int | None) -> None:
    pieces = []
    for mark, packet in zip(
        marks,
        (
            (fragment4(0, True, bytes(8)), fragment4(8, False, bytes(8)))
            if version == 4
            else (fragment6(0, True, bytes(8)), fragment6(8, False, bytes(8)))
        ),
        strict=True,
    ):
        marked = bytearray(packet)
        marked[1] |= mark if version == 4 else mark << 4
        pieces.append(Piece(b"", 0, 8, True, bytes(marked), 20 if version == 4 else 48, 6))
    if whole is None:
        with pytest.raises(MalformedPacket, match="fragment_ecn"):
            assemble(pieces)
        return
    made = assemble(pieces)
    assert (made[1] & 3 if version == 4 else made[1] >> 4 & 3) == whole


def test_what_fits_is_not_cut() -> None:
    packet = samples.ip4(17, bytes(80), fragment=0)
    assert cut(packet, 100) == [packet]
    assert len(cut(packet, 99)) == 2


def test_ipv4_cut_by_hand() -> None:
    body = bytes(range(60))
    # Router alert has the copy bit, timestamp hasn't.
    options = b"\x94\x04\0\0" + b"\x44\x08\x05\0" + bytes(4)
    packet = samples.ip4(17, body, options=options, fragment=0, identification=0xBEEF)
    copied = b"\x94\x04\0\0"
    assert cut(packet, 60) == [
        fragment4(0, True, body[:24], options=options, identification=0xBEEF),
        fragment4(24, True, body[24:56], options=copied, identification=0xBEEF),
        fragment4(56, False, body[56:], options=copied, identification=0xBEEF),
    ]


def test_ipv4_options_are_padded_where_some_are_left_out() -> None:
    options = b"\x01\x83\x03\x04" + b"\x07\x04\x04\0"
    packet = samples.ip4(17, bytes(40), options=options, fragment=0)
    second = cut(packet, 52)[1]
    assert second[20:24] == b"\x83\x03\x04\0"
    assert second[0] == 0x46


def test_a_fragment_cut_again_stays_where_it_was() -> None:
    packet = fragment4(80, True, bytes(range(48)), identification=5)
    assert cut(packet, 44) == [
        fragment4(80, True, bytes(range(24)), identification=5),
        fragment4(104, True, bytes(range(24, 48)), identification=5),
    ]


def test_an_own_identification_takes_df_off() -> None:
    packet = samples.ip4(17, bytes(48), fragment=DF, identification=0)
    assert cut(packet, 44, 0x10007) == [
        fragment4(0, True, bytes(24), identification=7),
        fragment4(24, False, bytes(24), identification=7),
    ]


def test_ipv6_cut_by_hand() -> None:
    body = bytes(range(60))
    packet = samples.ip6(17, body)
    assert cut(packet, 80, 0xDEADBEEF) == [
        fragment6(0, True, body[:32], number=0xDEADBEEF),
        fragment6(32, False, body[32:], number=0xDEADBEEF),
    ]


def test_ipv6_headers_for_routers_are_in_every_fragment_and_those_for_the_end_are_not() -> None:
    hop_by_hop = b"\x3c\0\x01\x04\0\0\0\0"
    to_routers = b"\x2b\0\x01\x04\0\0\0\0"
    routing = b"\x3c\0\x04\0\0\0\0\0"
    to_end = b"\x11\0\x01\x04\0\0\0\0"
    body = bytes(range(64))
    packet = samples.ip6(17, body, extensions=hop_by_hop + to_routers + routing + to_end, first=0)
    first, second = cut(packet, 40 + 24 + 8 + 48, 9)
    head = hop_by_hop + to_routers + b"\x2c" + routing[1:]
    assert first == samples.ip6(17, to_end + body[:40], extensions=head + struct.pack(">BBHI", 60, 0, 1, 9), first=0)
    assert second == samples.ip6(17, body[40:], extensions=head + struct.pack(">BBHI", 60, 0, 48, 9), first=0)
    assert assemble([read(first), read(second)]) == packet
    # Without a routing header those for the end may come right behind hop-by-hop options.
    packet = samples.ip6(17, body, extensions=hop_by_hop + to_end, first=0)
    assert cut(packet, 100, 9)[1][40:48] == b"\x2c" + hop_by_hop[1:]
    assert cut(packet, 100, 9)[0][48] == 60


def test_nothing_fits_a_link_of_no_size() -> None:
    with pytest.raises(ValueError, match="27"):
        cut(samples.ip4(17, bytes(48), fragment=0), 27)
    with pytest.raises(ValueError, match="identification"):
        cut(samples.ip6(17, bytes(80)), 80)


@given(
    version=st.sampled_from((4, 6)),
    size=st.integers(0, 9000),
    mtu=st.integers(96, 2000),
    options=st.sampled_from((b"", b"\x94\x04\0\0", b"\x44\x04\x05\0\x94\x04\0\0")),
    smaller=st.integers(96, 700),
)
def test_cut_and_put_together_again(version: int, size: int, mtu: int, options: bytes, smaller: int) -> None:
    body = samples.udp(C4 if version == 4 else C6, S4 if version == 4 else S6, bytes(size))
    if version == 4:
        packet = samples.ip4(17, body, options=options, fragment=0)
    else:
        packet = samples.ip6(
            17, body, extensions=b"\x11\0" + bytes(6) if options else b"", first=0 if options else None
        )
    parts = cut(packet, mtu, 77 if version == 6 else None)
    if version == 4:
        # Another router on the way cuts them again.
        parts = [each for part in parts for each in cut(part, smaller)]
    assert all(len(part) <= mtu for part in parts)
    if len(parts) == 1:
        assert parts == [packet]
        return
    for part in parts[:-1]:
        assert parse(part, 0, len(part), fragments=True).more_fragments
    assert assemble([read(part) for part in parts]) == packet
