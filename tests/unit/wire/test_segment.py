"""Super-packets cut up: compared with the packets that a sender without offloads would have made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire.packet import parse, verify
from falkirk.wire.segment import segments
from falkirk.wire.vnet import Header, validate
from tests.unit.wire import samples
from tests.unit.wire.samples import ACK, C4, C6, CWR, FIN, PSH, S4, S6, ip4, ip6, tcp, tcp4, tcp6, udp

OPTIONS = bytes.fromhex("0101080a0000000100000002")
ROUTING = bytes([6, 0, 4, 0, 0, 0, 0, 0])


def expected(payload: bytes, size: int, flags: int, sequence: int, *, six: bool) -> list[bytes]:
    made = []
    parts = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    for index, part in enumerate(parts):
        mask = 0xFF
        if index:
            mask &= ~CWR
        if index < len(parts) - 1:
            mask &= ~(FIN | PSH)
        here = (sequence + index * size) & 0xFFFFFFFF
        source, destination = (C6, S6) if six else (C4, S4)
        segment = tcp(source, destination, sequence=here, flags=flags & mask, payload=part, options=OPTIONS)
        made.append(ip6(6, segment) if six else ip4(6, segment, identification=(0xFFFE + index) & 0xFFFF))
    return made


@given(
    st.binary(max_size=64),
    st.integers(0, 12000),
    st.sampled_from([536, 537, 1448, 1460]),
    st.sampled_from([ACK, ACK | PSH, ACK | FIN, ACK | PSH | FIN | CWR]),
    st.sampled_from([1000, 0xFFFFFFFF, 0xFFFFFC00]),
    st.booleans(),
    st.integers(0, 3),
)
def test_equals_what_a_sender_would_send(
    seed: bytes, length: int, size: int, flags: int, sequence: int, six: bool, at: int
) -> None:
    payload = ((seed + b"\x5a") * (length // (len(seed) + 1) + 1))[:length]
    make = tcp6 if six else tcp4
    super_packet = make(payload=payload, flags=flags, sequence=sequence, options=OPTIONS, partial=True)
    if not six:
        super_packet = ip4(6, super_packet[20:], identification=0xFFFE)
    header = Header(1, 4 if six else 1, 0, size, 40 if six else 20, 16)
    data = memoryview(bytes(at) + super_packet)
    normal = validate(header, parse(data, at, len(super_packet)), 1500)
    assert segments(normal, data, at, len(super_packet)) == expected(payload, size, flags, sequence, six=six)


def test_behind_an_extension_header() -> None:
    segment = tcp(C6, S6, payload=bytes(2000), partial=True)
    data = ip6(6, segment, extensions=ROUTING, first=43)
    made = segments(validate(Header(1, 4, 0, 900, 48, 16), parse(data, 0, len(data)), 1500), data, 0, len(data))
    parsed = [parse(part, 0, len(part)) for part in made]
    assert [p.payload_length for p in parsed] == [900, 900, 200]
    for part, packet in zip(made, parsed, strict=True):
        verify(part, packet)
        assert packet.total_length == len(part)


def test_a_lying_partial_checksum_does_no_harm() -> None:
    data = bytearray(tcp4(payload=bytes(2000), partial=True))
    data[36:38] = b"\xab\xcd"
    for part in segments(Header(1, 1, 40, 1000, 20, 16), data, 0, len(data)):
        verify(part, parse(part, 0, len(part)))


@pytest.mark.parametrize("make", [tcp4, tcp6])
def test_plain_packets(make) -> None:  # type: ignore[no-untyped-def]
    whole = make(payload=b"abc")
    assert segments(Header(), whole, 0, len(whole)) == [whole]
    partial = make(payload=b"abc", partial=True)
    upper = 20 if make is tcp4 else 40
    assert segments(Header(1, 0, upper + 20, 0, upper, 16), partial, 0, len(partial)) == [whole]


def test_a_udp_checksum_is_never_zero() -> None:
    whole = udp(C4, S4, b"\0\0")
    payload = int.from_bytes(whole[6:8], "big").to_bytes(2, "big")
    data = bytearray(ip4(17, udp(C4, S4, payload)))
    data[26:28] = samples.slow_sum(samples.pseudo(C4, S4, 17, 10)).to_bytes(2, "big")
    (made,) = segments(Header(1, 0, 28, 0, 20, 6), data, 0, len(data))
    assert made[26:28] == b"\xff\xff"
    verify(made, parse(made, 0, len(made)))


@pytest.mark.parametrize("hint", [0, 40, 66, 4096])
def test_the_kernels_hdr_len_is_only_a_hint(hint: int) -> None:
    data = tcp4(payload=bytes(1000), partial=True, options=OPTIONS)
    made = segments(Header(1, 1, hint, 600, 20, 16), data, 0, len(data))
    assert [parse(part, 0, len(part)).payload_length for part in made] == [600, 400]


@given(
    st.binary(min_size=1, max_size=64), st.integers(1, 20000), st.sampled_from([536, 537, 1391, 1448]), st.booleans()
)
def test_datagrams_equal_what_a_sender_would_send(seed: bytes, more: int, size: int, six: bool) -> None:
    length = size + more
    payload = (seed * (length // len(seed) + 1))[:length]
    source, destination = (C6, S6) if six else (C4, S4)
    whole = udp(source, destination, payload)
    data = ip6(17, whole) if six else ip4(17, whole, identification=0xFFFD)
    made = segments(Header(1, 5, 0, size, 40 if six else 20, 6), data, 0, len(data))
    wanted = []
    for index, at in enumerate(range(0, length, size)):
        part = udp(source, destination, payload[at : at + size])
        wanted.append(ip6(17, part) if six else ip4(17, part, identification=(0xFFFD + index) & 0xFFFF))
    assert made == wanted


def test_segments_share_no_memory_with_what_they_were_cut_from() -> None:
    data = bytearray(tcp4(payload=bytes(20000), partial=True))
    made = segments(Header(1, 1, 40, 1000, 20, 16), data, 0, len(data))
    before = [bytes(part) for part in made]
    data[:] = b"\xff" * len(data)
    assert made == before
