"""Packets made of words: parsed, verified, and read by scapy."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from falkirk.wire.packet import parse, verify
from falkirk.wire.probe import completed, probe
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6

ENDS = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("length", [0, 100, 1501, 65_000])
@pytest.mark.parametrize("protocol", [6, 17, 1, 132])
def test_a_probe_is_a_whole_packet(protocol: int, family: int, length: int) -> None:
    if protocol == 1 and family == 6:
        protocol = 58
    data = probe(protocol, *ENDS[family], 40000, 53, ttl=9, flags=18, length=length, dont_fragment=False)
    packet = parse(data, 0, len(data))
    verify(data, packet)
    assert (packet.protocol, packet.source, packet.destination, packet.ttl) == (protocol, *ENDS[family], 9)
    assert len(data) == max(length, packet.payload_offset)
    assert packet.dont_fragment is (family == 6)
    if protocol in (6, 17):
        assert (packet.source_port, packet.destination_port) == (40000, 53)
    if protocol == 6:
        assert packet.flags == 18
    if protocol in (1, 58):
        assert (packet.identifier, packet.icmp_code) == (40000, 0)


@pytest.mark.parametrize("head", [IP(src="100.96.0.2", dst="203.0.113.5"), IPv6(src="fd00::2", dst="2001:db8::5")])
@pytest.mark.parametrize("upper", [TCP(sport=1, dport=2, options=[("MSS", 1400)]), UDP(sport=1, dport=2)])
def test_what_was_captured_before_its_checksums_gets_them(head: IP, upper: TCP) -> None:
    right = bytes(head / upper / b"payload")
    wrong = bytearray(right)
    if right[0] >> 4 == 4:
        wrong[10:12] = b"\0\0"
    at = len(right) - 7 - len(bytes(upper)) + (16 if isinstance(upper, TCP) else 6)
    wrong[at : at + 2] = b"\x12\x34"
    assert completed(bytes(wrong)) == right
    assert completed(right) == right


@pytest.mark.parametrize("data", [b"", b"\x45", b"\x60" + bytes(20), bytes(60)])
def test_what_cannot_be_read_stays(data: bytes) -> None:
    assert completed(data) == data


def test_a_fragment_keeps_its_bytes() -> None:
    data = bytearray(probe(17, DEVICE4, SERVER4, 1, 2, length=100, dont_fragment=False))
    data[6] = 0x20
    done = completed(bytes(data))
    assert parse(done, 0, len(done), fragments=True).more_fragments
    assert done[20:] == data[20:]
