"""Headers in front of payloads: compared with packets built by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire import vnet
from falkirk.wire.datagram import Heads
from falkirk.wire.packet import parse, split, verify
from falkirk.wire.segment import segments
from tests.unit.wire.samples import C4, C6, S4, S6, pseudo, slow_checksum

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
