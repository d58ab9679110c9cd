"""Headers in front of payloads: compared with packets built by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import vnet
from falkirk.wire.datagram import Heads, rebuild
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse, split, verify
from falkirk.wire.segment import segments
from tests.unit.wire.samples import C4, C6, S4, S6, ip4, ip6, pseudo, slow_checksum, udp

ENDS = {4: (S4, C4), 6: (S6, C6)}


def by_hand(family: int, payload: bytes, ttl: int, traffic_class: int) -> bytes:
    source, destination = ENDS[family]
    size = 8 + len(payload)
    head = struct.pack(">HHHH", 53, 5353, size, 0)
    check = slow_checksum(pseudo(source, destination, 17, size) + head + payload) or 0xFFFF
    udp = head[:6] + check.to_bytes(2, "big") + payload
    if family == 6:
        return struct.pack(">IHBB", 6 << 28 | traffic_class << 20, size, 17, ttl) + source + destination + udp
    ip = struct.pack(">BBHHHBBH", 0x45, traffic_class, 20 + size, 0, 0x4000, ttl, 17, 0) + source + destination
    return ip[:10] + slow_checksum(ip).to_bytes(2, "big") + ip[12:] + udp


@given(st.sampled_from([4, 6]), st.binary(max_size=1500), st.integers(1, 255), st.integers(0, 255))
def test_a_packet_is_what_it_is_by_hand(family: int, payload: bytes, ttl: int, traffic_class: int) -> None:
    heads = Heads(*ENDS[family], 53, 5353)
    buf = bytearray(b"." * (3 + heads.size) + payload)
    heads.put(buf, 3, len(payload), ttl, traffic_class)
    assert bytes(buf[3:]) == by_hand(family, payload, ttl, traffic_class)


@pytest.mark.parametrize("family", [4, 6])
def test_a_sum_of_zero_is_sent_as_all_ones(family: int) -> None:
    heads = Heads(*ENDS[family], 53, 5353)
    room = bytes(heads.size)
    for word in range(0x10000):
        buf = bytearray(room + word.to_bytes(2, "big"))
        heads.put(buf, 0, 2, 64, 0)
        if buf[heads.size - 2 : heads.size] == b"\xff\xff":
            break
    else:
        pytest.fail("no payload came to zero")
    verify(buf, parse(buf, 0, len(buf)))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("length", [1, 1000, 1001, 4096, 65507 - 20])
def test_a_super_packet_stands_for_the_packets_of_its_train(family: int, length: int) -> None:
    heads = Heads(*ENDS[family], 53, 5353)
    payload = bytes(range(256)) * 256
    payload = payload[:length]
    buf = bytearray(10 + heads.size) + payload
    heads.put(buf, 10, length, 60, 2, partial=True)
    heads.put_vnet(buf, 0, 1000 if length > 1000 else 0)
    header = vnet.unpack(buf, 0, len(buf))
    packet = parse(buf, 10, len(buf) - 10)
    assert vnet.validate(header, packet, 1500) == header
    made = segments(header, buf, 10, len(buf) - 10)
    train = heads.packed(memoryview(payload), 1000, 60, 2)
    plain = [bytes(train[at : at + size]) for at, size in split(train, len(train))]
    assert [part[heads.size :] for part in plain] == [payload[at : at + 1000] for at in range(0, length, 1000)]
    for one, other in zip(made, plain, strict=True):
        verify(one, parse(one, 0, len(one)))
        verify(other, parse(other, 0, len(other)))
        # The identification counts in a super-packet's segments, as the kernel's do.
        assert one[heads.size - 8 :] == other[heads.size - 8 :]


def test_what_may_be_fragmented_has_an_identification() -> None:
    heads = Heads(*ENDS[4], 53, 5353)
    buf = bytearray(heads.size + 4)
    heads.put(buf, 0, 4, 64, 0, identification=77)
    packet = parse(buf, 0, len(buf))
    assert (packet.identification, packet.dont_fragment) == (77, False)


# taken apart and built anew

PLAIN = {
    4: (ip4(17, udp(C4, S4, b"abc"), fragment=0x4000), 20),
    6: (ip6(17, udp(C6, S6, b"abc")), 40),
}
ODD = {
    "options": (ip4(17, udp(C4, S4, b"abc"), options=b"\x94\x04\0\0"), 24),
    "extension": (ip6(17, udp(C6, S6, b"abc"), extensions=b"\x11\0" + bytes(6), first=60), 48),
    "trailer4": (ip4(17, udp(C4, S4, b"abc") + b"behind"), 20),
    "trailer6": (ip6(17, udp(C6, S6, b"abc") + b"behind"), 40),
    "none": (ip4(17, udp(C4, S4, b"abc")[:6] + b"\0\0abc"), 20),
}


def built(packet: bytes, upper: int, header: bytes = vnet.ZERO) -> bytes:
    """Behind its virtio-net header."""
    source, destination = (C4, S4) if packet[0] >> 4 == 4 else (C6, S6)
    ports = int.from_bytes(packet[upper : upper + 2], "big"), int.from_bytes(packet[upper + 2 : upper + 4], "big")
    buf = bytearray(header + packet)
    end = rebuild(buf, 10, 10 + upper, len(buf), Heads(source, destination, *ports))
    return bytes(buf[:end])


@pytest.mark.parametrize("family", [4, 6])
def test_a_plain_packet_is_built_anew_as_it_was(family: int) -> None:
    packet, upper = PLAIN[family]
    again = built(packet, upper)[10:]
    # An atomic packet's identification means nothing (RFC 6864 4.1).
    expected = ip4(17, udp(C4, S4, b"abc"), fragment=0x4000, identification=0) if family == 4 else packet
    assert again == expected


@pytest.mark.parametrize("name", list(ODD))
def test_only_the_payload_gets_through(name: str) -> None:
    packet, upper = ODD[name]
    again = built(packet, upper)[10:]
    assert len(again) == (28 if packet[0] >> 4 == 4 else 48) + 3
    parsed = parse(again, 0, len(again))
    verify(again, parsed)
    assert again[-3:] == b"abc"
    assert (parsed.ttl, parsed.dont_fragment) == (64, True)
    assert again[-5:-3] != b"\0\0"


def test_what_may_be_fragmented_still_may() -> None:
    again = built(ip4(17, udp(C4, S4, b"abc"), fragment=0, identification=99), 20)[10:]
    parsed = parse(again, 0, len(again))
    assert (parsed.identification, parsed.dont_fragment) == (99, False)


@pytest.mark.parametrize(
    ("packet", "upper", "reason"),
    [
        (ip4(17, udp(C4, S4, b"abc", length=7)), 20, "bad_udp_length"),
        (ip4(17, udp(C4, S4, b"abc", length=12)), 20, "bad_udp_length"),
        (ip4(17, udp(C4, S4, b"abc")[:-1] + b"!"), 20, "bad_l4_checksum"),
        (ip6(17, udp(C6, S6, b"abc")[:6] + b"\0\0abc"), 40, "bad_l4_checksum"),
    ],
)
def test_what_is_wrong_is_not_built_anew(packet: bytes, upper: int, reason: str) -> None:
    with pytest.raises(MalformedPacket, match=reason):
        built(packet, upper)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("gso_size", [0, 1000])
def test_a_super_packet_stays_one(family: int, gso_size: int) -> None:
    heads = Heads(*ENDS[family], 53, 5353)
    payload = bytes(range(256)) * 10
    buf = bytearray(10 + heads.size) + payload
    heads.put(buf, 10, len(payload), 60, 0xB8, partial=True)
    heads.put_vnet(buf, 0, gso_size)
    before = bytes(buf)
    assert rebuild(buf, 10, 10 + heads.size - 8, len(buf), heads) == len(buf)
    assert bytes(buf) == before
