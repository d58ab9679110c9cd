"""Rewritten packets must be the packets that the other side would have sent, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire.nat import Rewrite, pair, rewrite4, rewrite6
from tests.unit.wire.samples import A4, A6, C4, C6, D4, D6, S4, S6, ip4, ip6, tcp

ports = st.integers(1, 65535)
addresses4 = st.binary(min_size=4, max_size=4)
addresses6 = st.binary(min_size=16, max_size=16)
NOPS = b"\x01" * 4
ATOMIC_FRAGMENT = bytes.fromhex("0600000000000001")


@given(
    st.lists(addresses4, min_size=4, max_size=4),
    st.lists(ports, min_size=4, max_size=4),
    st.binary(max_size=100),
    st.booleans(),
    st.integers(2, 255),
    st.sampled_from([b"", NOPS]),
    st.integers(0, 3),
)
def test_ipv4(
    who: list[bytes], port: list[int], payload: bytes, partial: bool, ttl: int, options: bytes, at: int
) -> None:
    def packet(source: bytes, destination: bytes, sport: int, dport: int, hops: int) -> bytes:
        segment = tcp(source, destination, sport=sport, dport=dport, payload=payload, partial=partial)
        return ip4(6, segment, source=source, destination=destination, ttl=hops, options=options)

    rewrite = Rewrite(who[0], who[1], port[0], port[1], who[2], who[3], port[2], port[3])
    buf = bytearray(at) + packet(who[0], who[1], port[0], port[1], ttl)
    assert rewrite4(buf, at, rewrite, partial)
    assert same(bytes(buf[at:]), packet(who[2], who[3], port[2], port[3], ttl - 1), 20 + len(options), partial)


@given(
    st.lists(addresses6, min_size=4, max_size=4),
    st.lists(ports, min_size=4, max_size=4),
    st.binary(max_size=100),
    st.booleans(),
    st.integers(2, 255),
    st.sampled_from([b"", ATOMIC_FRAGMENT]),
)
def test_ipv6(who: list[bytes], port: list[int], payload: bytes, partial: bool, ttl: int, extensions: bytes) -> None:
    def packet(source: bytes, destination: bytes, sport: int, dport: int, hops: int) -> bytes:
        segment = tcp(source, destination, sport=sport, dport=dport, payload=payload, partial=partial)
        first = 44 if extensions else None
        return ip6(6, segment, source=source, destination=destination, ttl=hops, extensions=extensions, first=first)

    rewrite = Rewrite(who[0], who[1], port[0], port[1], who[2], who[3], port[2], port[3])
    buf = memoryview(bytearray(packet(who[0], who[1], port[0], port[1], ttl)))
    assert rewrite6(buf, 0, rewrite, partial, 40 + len(extensions))
    assert same(bytes(buf), packet(who[2], who[3], port[2], port[3], ttl - 1), 40 + len(extensions), partial)


def same(got: bytes, expected: bytes, upper: int, partial: bool) -> bool:
    """Equal; a partial sum may be either representation of zero."""
    field = slice(upper + 16, upper + 18)
    if partial and expected[field] == b"\xff\xff":
        expected = expected[: field.start] + b"\0\0" + expected[field.stop :]
    return got == expected


@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize("options", [b"", NOPS])
def test_no_hop_left_writes_nothing(ttl: int, options: bytes) -> None:
    up4, _ = pair((C4, 40000), (S4, 443), (A4, 40000), (D4, 1024))
    up6, _ = pair((C6, 40000), (S6, 443), (A6, 40000), (D6, 1024))
    four = bytearray(ip4(6, tcp(C4, S4), ttl=ttl, options=options))
    six = bytearray(ip6(6, tcp(C6, S6), ttl=ttl))
    before = bytes(four), bytes(six)
    assert not rewrite4(four, 0, up4, False)
    assert not rewrite6(six, 0, up6, False)
    assert (bytes(four), bytes(six)) == before


def test_down_undoes_up_but_for_the_hops() -> None:
    up, down = pair((C4, 40000), (S4, 443), (A4, 40000), (D4, 1024))
    buf = bytearray(ip4(6, tcp(C4, S4, payload=b"x"), ttl=9))
    rewrite4(buf, 0, up, False)
    answer = ip4(6, tcp(D4, A4, sport=1024, dport=40000, payload=b"y"), source=D4, destination=A4)
    back = bytearray(answer)
    assert rewrite4(back, 0, down, False)
    assert bytes(buf) == ip4(6, tcp(A4, D4, dport=1024, payload=b"x"), source=A4, destination=D4, ttl=8)
    assert bytes(back) == ip4(6, tcp(S4, C4, sport=443, dport=40000, payload=b"y"), source=S4, destination=C4, ttl=63)


def test_mixed_families_are_refused() -> None:
    with pytest.raises(ValueError, match="addresses"):
        Rewrite(C4, S4, 1, 2, A6, D6, 1, 2)
