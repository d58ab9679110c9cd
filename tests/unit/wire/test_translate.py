"""ICMP errors across the NAT: each table row is an error on one side and the same error on the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import build
from falkirk.wire.icmp import Unreachable
from falkirk.wire.malformed import REASONS, MalformedPacket
from falkirk.wire.nat import pair, rewrite4, rewrite6
from falkirk.wire.packet import parse, verify
from falkirk.wire.translate import quoted, translate
from tests.unit.wire.samples import A4, A6, C4, C6, D4, D6, S4, S6, icmp4, icmp6, ip4, ip6, tcp, udp

ROUTER4 = bytes([100, 96, 7, 7])
ROUTER6 = bytes.fromhex("fd000000000000010000000000000707")
UP4, DOWN4 = pair((C4, 40000), (S4, 443), (A4, 40000), (D4, 1024))
UP6, DOWN6 = pair((C6, 40000), (S6, 443), (A6, 40000), (D6, 1024))


def flow_packet(
    source: bytes, destination: bytes, sport: int, dport: int, *, hops: int = 60, size: int = 1400
) -> bytes:
    segment = tcp(source, destination, sport=sport, dport=dport, payload=bytes(range(256)) * (size // 256 + 1))
    make = ip4 if len(source) == 4 else ip6
    return make(6, segment, source=source, destination=destination, ttl=hops)


def error(quote: bytes, source: bytes, to: bytes, code: tuple[int, int], rest: int, ttl: int = 64) -> bytes:
    if len(source) == 4:
        return ip4(1, icmp4(*code, rest, quote), source=source, destination=to, ttl=ttl, identification=0)
    return ip6(58, icmp6(*code, rest, quote, source, to), source=source, destination=to, ttl=ttl)


@pytest.mark.parametrize("cut", [28, 40, 548])
@pytest.mark.parametrize(("code", "rest"), [((3, 4), 1280), ((3, 1), 0), ((11, 0), 0), ((12, 0), 0x05000000)])
def test_up_ipv4(cut: int, code: tuple[int, int], rest: int) -> None:
    """A router on the client's side says that what the client should have got is too big; the namespace's TCP must know."""
    at_client = flow_packet(S4, C4, 443, 40000)
    at_slot = flow_packet(D4, A4, 1024, 40000)
    data = b"##" + error(at_client[:cut], ROUTER4, S4, code, rest) + b"padding"
    packet = parse(data, 2, len(data) - 2)
    quote = quoted(data, packet)
    assert (quote.source, quote.destination, quote.source_port, quote.destination_port) == (S4, C4, 443, 40000)
    assert (quote.protocol, quote.sequence) == (6, 1000)
    assert translate(data, packet, quote, UP4) == error(at_slot[:cut], A4, D4, code, rest, ttl=63)


@pytest.mark.parametrize("cut", [48, 60, 1232])
@pytest.mark.parametrize(("code", "rest"), [((2, 0), 1280), ((1, 3), 0), ((3, 0), 0), ((4, 0), 40)])
def test_up_ipv6(cut: int, code: tuple[int, int], rest: int) -> None:
    at_client = flow_packet(S6, C6, 443, 40000, size=2000)
    at_slot = flow_packet(D6, A6, 1024, 40000, size=2000)
    data = error(at_client[:cut], ROUTER6, S6, code, rest)
    packet = parse(data, 0, len(data))
    quote = quoted(data, packet)
    assert (quote.source, quote.destination, quote.source_port, quote.destination_port) == (S6, C6, 443, 40000)
    assert translate(data, packet, quote, UP6) == error(at_slot[:cut], A6, D6, code, rest, ttl=63)


@pytest.mark.parametrize("source", [None, ROUTER4])
def test_down_ipv4(source: bytes | None) -> None:
    """The namespace's kernel complains about the client's packet; the client gets it about what it sent itself."""
    at_slot = flow_packet(A4, D4, 40000, 1024)
    at_client = flow_packet(C4, S4, 40000, 443)
    data = error(at_slot[:500], D4, A4, (3, 3), 0)
    packet = parse(data, 0, len(data))
    quote = quoted(data, packet)
    assert (quote.source, quote.source_port) == (A4, 40000)
    expected = error(at_client[:500], source or S4, C4, (3, 3), 0, ttl=63)
    assert translate(data, packet, quote, DOWN4, source) == expected


@pytest.mark.parametrize("source", [None, ROUTER6])
def test_down_ipv6(source: bytes | None) -> None:
    at_slot = flow_packet(A6, D6, 40000, 1024)
    at_client = flow_packet(C6, S6, 40000, 443)
    data = error(at_slot, D6, A6, (1, 4), 0)
    packet = parse(data, 0, len(data))
    assert translate(data, packet, quoted(data, packet), DOWN6, source) == error(
        at_client, source or S6, C6, (1, 4), 0, ttl=63
    )


def test_a_packet_through_the_nat_and_its_error_back() -> None:
    """What comes back quotes what the client sent, but for the hop that it lost."""
    sent = flow_packet(C4, S4, 40000, 443, hops=9, size=300)
    buf = bytearray(sent)
    rewrite4(buf, 0, UP4, False)
    answer = build.unreachable(buf, parse(buf, 0, len(buf)), Unreachable.HOST, D4)
    assert answer is not None
    packet = parse(answer, 0, len(answer))
    back = translate(answer, packet, quoted(answer, packet), DOWN4)
    assert back is not None
    assert back[28:] == flow_packet(C4, S4, 40000, 443, hops=8, size=300)[: len(back) - 28]
    verify(back, parse(back, 0, len(back)))

    sent6 = bytearray(flow_packet(S6, C6, 443, 40000, hops=9))
    before = bytearray(flow_packet(D6, A6, 1024, 40000, hops=10))
    rewrite6(before, 0, DOWN6, False)
    assert before == sent6


def test_options_in_the_quotation_and_in_the_outer_header() -> None:
    """RFC 5508 REQ-3 b: past the options of the quoted packet."""
    nops = b"\x01" * 8
    payload = bytes(1300)
    quote4 = ip4(6, tcp(S4, C4, sport=443, dport=40000, payload=payload), source=S4, destination=C4, options=nops)
    data = ip4(1, icmp4(3, 4, 1280, quote4), source=ROUTER4, destination=S4, options=nops)
    packet = parse(data, 0, len(data))
    inner = ip4(6, tcp(D4, A4, sport=1024, dport=40000, payload=payload), source=D4, destination=A4, options=nops)
    assert translate(data, packet, quoted(data, packet), UP4) == error(inner, A4, D4, (3, 4), 1280, ttl=63)


def test_extensions_behind_the_quotation_stay() -> None:
    """RFC 4884: padded to 128 bytes, then an extension; the ICMP length field is part of what stays."""
    extension = bytes.fromhex("2000dfff00080101deadbeef")
    rest = 32 << 16
    at_client = flow_packet(S4, C4, 443, 40000)[:128]
    data = error(at_client + extension, ROUTER4, S4, (11, 0), rest)
    packet = parse(data, 0, len(data))
    expected = error(flow_packet(D4, A4, 1024, 40000)[:128] + extension, A4, D4, (11, 0), rest, ttl=63)
    assert translate(data, packet, quoted(data, packet), UP4) == expected


def test_no_hop_left() -> None:
    data = error(flow_packet(S4, C4, 443, 40000), ROUTER4, S4, (3, 4), 1280, ttl=1)
    packet = parse(data, 0, len(data))
    assert translate(data, packet, quoted(data, packet), UP4) is None


def test_a_quoted_udp_packet_is_read() -> None:
    data = ip4(1, icmp4(3, 3, 0, ip4(17, udp(C4, S4))))
    quote = quoted(data, parse(data, 0, len(data)))
    assert (quote.protocol, quote.source_port, quote.destination_port, quote.sequence) == (17, 5353, 53, 0)


QUOTE = flow_packet(S4, C4, 443, 40000)
BAD_SUM = error(QUOTE, ROUTER4, S4, (3, 4), 1280)
BAD_SUM = BAD_SUM[:-1] + bytes([BAD_SUM[-1] ^ 1])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (ip4(1, icmp4(8)), "icmp_not_error"),
        (ip4(1, icmp4(5, 0, 0, QUOTE)), "icmp_not_error"),
        (ip4(1, icmp4(4, 0, 0, QUOTE)), "icmp_not_error"),
        (ip6(58, icmp6(137, 0, 0, flow_packet(S6, C6, 443, 40000))), "icmp_not_error"),
        (BAD_SUM, "bad_l4_checksum"),
        (ip4(1, icmp4(3, 4, 1280, b"")), "bad_icmp_quote"),
        (ip4(1, icmp4(3, 4, 1280, QUOTE[:27])), "bad_icmp_quote"),
        (ip4(1, icmp4(3, 4, 1280, QUOTE[:8] + b"\x01" + QUOTE[9:])), "bad_icmp_quote"),
        (ip4(1, icmp4(3, 4, 1280, flow_packet(S6, C6, 443, 40000))), "bad_icmp_quote"),
        (ip4(1, icmp4(3, 4, 1280, ip4(6, b"middle of it", fragment=2))), "bad_icmp_quote"),
        (ip6(58, icmp6(2, 0, 1280, flow_packet(S6, C6, 443, 40000)[:47])), "bad_icmp_quote"),
        (ip6(58, icmp6(2, 0, 1280, QUOTE)), "bad_icmp_quote"),
        (ip4(1, icmp4(3, 4, 67, QUOTE)), "icmp_mtu"),
        (ip4(1, icmp4(3, 4, len(QUOTE), QUOTE)), "icmp_mtu"),
        (ip6(58, icmp6(2, 0, 1279, flow_packet(S6, C6, 443, 40000))), "icmp_mtu"),
    ],
)
def test_what_is_not_carried(data: bytes, reason: str) -> None:
    packet = parse(data, 0, len(data))
    with pytest.raises(MalformedPacket) as caught:
        quoted(data, packet)
    assert caught.value.reason == reason


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=4), st.booleans())
def test_mutated_quotations(changes: list[tuple[int, int]], six: bool) -> None:
    """Whatever is quoted: a known reason, or a valid packet to the device."""
    quote = bytearray(flow_packet(S6, C6, 443, 40000) if six else QUOTE)
    for at, value in changes:
        quote[at % 60] = value
    data = error(bytes(quote), ROUTER6 if six else ROUTER4, S6 if six else S4, (2, 0) if six else (3, 4), 1280)
    packet = parse(data, 0, len(data))
    try:
        made = translate(data, packet, quoted(data, packet), UP6 if six else UP4)
    except MalformedPacket as bad:
        assert bad.reason in REASONS  # noqa: PT017
        return
    assert made is not None
    got = parse(made, 0, len(made))
    verify(made, got)
    assert got.destination == (D6 if six else D4)
