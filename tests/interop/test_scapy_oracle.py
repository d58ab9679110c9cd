"""scapy as an independent oracle: it must read what Falkirk writes, and compute the same checksums.

scapy fills a checksum in where the field is deleted; so `remade` is what scapy would have sent, and equality with our bytes
says that lengths, checksums and all other fields agree.
"""

from __future__ import annotations

import logging

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)

import pytest  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror  # noqa: E402
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Packet as Scapy  # noqa: E402
from scapy.packet import Raw  # noqa: E402
from scapy.utils import checksum as scapy_checksum  # noqa: E402

from falkirk.wire import build, checksum  # noqa: E402
from falkirk.wire.icmp import Unreachable  # noqa: E402
from falkirk.wire.nat import pair, rewrite4, rewrite6  # noqa: E402
from falkirk.wire.packet import parse, verify  # noqa: E402
from falkirk.wire.segment import segments  # noqa: E402
from falkirk.wire.translate import quoted, translate  # noqa: E402
from falkirk.wire.vnet import Header, validate  # noqa: E402

C4, S4, A4, D4 = "100.96.0.2", "93.184.216.34", "10.0.1.16", "10.0.0.1"
C6, S6, A6, D6 = "fd00:0:0:1::2", "2001:67c:2e8:22::c100:696", "fd66:616c:6b69:726b::110", "fd66:616c:6b69:726b::1"
FEW = settings(max_examples=60, deadline=None)


def packed(address: str) -> bytes:
    layer = IPv6(src=address) if ":" in address else IP(src=address)
    raw = bytes(layer)
    return raw[8:24] if ":" in address else raw[12:16]


UP4, DOWN4 = pair((packed(C4), 40000), (packed(S4), 443), (packed(A4), 40000), (packed(D4), 1024))
UP6, DOWN6 = pair((packed(C6), 40000), (packed(S6), 443), (packed(A6), 40000), (packed(D6), 1024))


def ip(six: bool, source: str, destination: str, **fields: object) -> Scapy:
    hops = fields.pop("hops", 64)
    if six:
        return IPv6(src=source, dst=destination, hlim=hops, **fields)
    return IP(src=source, dst=destination, ttl=hops, flags="DF", **fields)


def remade(data: bytes) -> bytes:
    """scapy's own idea of the packet: read, computed fields deleted, written again."""
    packet = IPv6(data) if data[0] >> 4 == 6 else IP(data)
    for kind, fields in (
        (IP, ("len", "chksum", "ihl")),
        (IPv6, ("plen",)),
        (TCP, ("chksum",)),
        (UDP, ("chksum", "len")),
        (ICMP, ("chksum",)),
        (ICMPv6DestUnreach, ("cksum",)),
        (ICMPv6PacketTooBig, ("cksum",)),
        (ICMPv6TimeExceeded, ("cksum",)),
    ):
        if kind in packet:
            for field in fields:
                delattr(packet[kind], field)
    return bytes(packet)


@FEW
@given(st.binary(max_size=3000))
def test_checksum(data: bytes) -> None:
    data = b"\x45" + data
    assert checksum.checksum(data) == scapy_checksum(data)


segment_fields = st.fixed_dictionaries(
    {
        "sport": st.integers(1, 65535),
        "dport": st.integers(1, 65535),
        "seq": st.integers(0, 2**32 - 1),
        "ack": st.integers(0, 2**32 - 1),
        "flags": st.integers(0, 255),
        "window": st.integers(0, 65535),
        "options": st.sampled_from([[], [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 2)), ("WScale", 7)]]),
    }
)


@FEW
@given(segment_fields, st.binary(max_size=60), st.booleans(), st.integers(1, 255))
def test_parse_tcp(fields: dict[str, object], payload: bytes, six: bool, hops: int) -> None:
    layers = ip(six, C6 if six else C4, S6 if six else S4, hops=hops) / TCP(**fields) / Raw(payload)
    data = bytes(layers)
    packet = parse(data, 0, len(data))
    verify(data, packet)
    assert (packet.source_port, packet.destination_port) == (fields["sport"], fields["dport"])
    assert (packet.sequence, packet.acknowledgment) == (fields["seq"], fields["ack"])
    assert (packet.flags, packet.window, packet.ttl) == (fields["flags"], fields["window"], hops)
    assert data[packet.payload_offset :] == payload


def test_parse_extension_headers() -> None:
    layers = (
        IPv6(src=C6, dst=S6)
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrRouting(type=4, segleft=0)
        / IPv6ExtHdrFragment(offset=0, m=0, id=5)
        / TCP(sport=1, dport=2)
    )
    data = bytes(layers)
    packet = parse(data, 0, len(data))
    verify(data, packet)
    assert (packet.source_port, packet.destination_port, packet.identification) == (1, 2, 5)
    assert packet.header_length == len(data) - 20


@pytest.mark.parametrize("six", [False, True])
def test_parse_udp_and_echo(six: bool) -> None:
    source, destination = (C6, S6) if six else (C4, S4)
    data = bytes(ip(six, source, destination) / UDP(sport=5, dport=53) / b"question")
    packet = parse(data, 0, len(data))
    verify(data, packet)
    assert (packet.source_port, packet.destination_port, packet.payload_length) == (5, 53, 8)
    if not six:
        data = bytes(IP(src=C4, dst=S4) / ICMP(id=77, seq=3) / b"ping")
        packet = parse(data, 0, len(data))
        verify(data, packet)
        assert (packet.identifier, packet.sequence) == (77, 3)


@FEW
@given(segment_fields, st.binary(max_size=100), st.booleans(), st.integers(2, 255))
def test_rewritten_packets(fields: dict[str, object], payload: bytes, six: bool, hops: int) -> None:
    fields = fields | {"sport": 40000, "dport": 443}
    source, destination = (C6, S6) if six else (C4, S4)
    buf = bytearray(bytes(ip(six, source, destination, hops=hops) / TCP(**fields) / Raw(payload)))
    assert (rewrite6(buf, 0, UP6, False) if six else rewrite4(buf, 0, UP4, False)) is True
    source, destination = (A6, D6) if six else (A4, D4)
    fields = fields | {"dport": 1024}
    assert bytes(buf) == bytes(ip(six, source, destination, hops=hops - 1) / TCP(**fields) / Raw(payload))


@FEW
@given(segment_fields, st.booleans(), st.binary(max_size=30))
def test_resets(fields: dict[str, object], six: bool, payload: bytes) -> None:
    source, destination = (C6, S6) if six else (C4, S4)
    data = bytes(ip(six, source, destination) / TCP(**fields) / Raw(payload))
    answer = build.reset(parse(data, 0, len(data)))
    flags = TCP(data[40 if six else 20 :]).flags
    if "R" in flags:
        assert answer is None
        return
    assert answer is not None
    assert answer == remade(answer)
    got = (IPv6(answer) if six else IP(answer))[TCP]
    assert (got.sport, got.dport) == (fields["dport"], fields["sport"])
    if "A" in flags:
        assert (got.seq, got.flags) == (fields["ack"], "R")
    else:
        length = len(payload) + ("S" in flags) + ("F" in flags)
        assert (got.ack, got.seq, got.flags) == ((TCP(data[40 if six else 20 :]).seq + length) % 2**32, 0, "RA")


@pytest.mark.parametrize("size", [0, 1, 3000])
def test_icmp_errors(size: int) -> None:
    four = bytes(IP(src=C4, dst=S4) / TCP(sport=40000, dport=443) / Raw(bytes(size)))
    six = bytes(IPv6(src=C6, dst=S6) / TCP(sport=40000, dport=443) / Raw(bytes(size)))
    packet4, packet6 = parse(four, 0, len(four)), parse(six, 0, len(six))
    gateway4, gateway6 = packed("100.96.0.1"), packed("fd00::1")
    answers = [
        build.unreachable(four, packet4, Unreachable.HOST, gateway4),
        build.time_exceeded(four, packet4, gateway4),
        build.too_big(four, packet4, 1300, gateway4),
        build.unreachable(six, packet6, Unreachable.HOST, gateway6),
        build.time_exceeded(six, packet6, gateway6),
        build.too_big(six, packet6, 1300, gateway6),
    ]
    for answer in answers:
        assert answer is not None
        assert answer == remade(answer)
        read = IPv6(answer) if answer[0] >> 4 == 6 else IP(answer)
        inner = read[IPerror6] if answer[0] >> 4 == 6 else read[IPerror]
        assert (read.dst, inner.dst) in {(C4, S4), (C6, S6)}
        assert inner[TCPerror].dport == 443
    assert IP(answers[2])[ICMP].nexthopmtu == 1300
    assert IPv6(answers[5])[ICMPv6PacketTooBig].mtu == 1300


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_translated_errors(six: bool, down: bool) -> None:
    """The error that one side makes, carried across, is the error that scapy makes with the other side's addresses."""
    client, server, slot, device = (C6, S6, A6, D6) if six else (C4, S4, A4, D4)

    def error(inner_from: tuple[str, int], inner_to: tuple[str, int], source: str, hops: int) -> bytes:
        inner = ip(six, *(a for a, _ in (inner_from, inner_to))) / TCP(sport=inner_from[1], dport=inner_to[1])
        message = ICMPv6PacketTooBig(mtu=1280) if six else ICMP(type=3, code=4, nexthopmtu=1280)
        outer = ip(six, source, inner_from[0], hops=hops, **({} if six else {"id": 0}))
        return bytes(outer / message / Raw(bytes(inner / Raw(bytes(1300)))))

    router = "fd00::99" if six else "100.96.9.9"
    at_client, at_slot = ((server, 443), (client, 40000)), ((device, 1024), (slot, 40000))
    if down:
        before, after = error(*at_slot[::-1], device, 64), error(*at_client[::-1], server, 63)
        rewrite = DOWN6 if six else DOWN4
    else:
        before, after = error(*at_client, router, 64), error(*at_slot, slot, 63)
        rewrite = UP6 if six else UP4
    packet = parse(before, 0, len(before))
    made = translate(before, packet, quoted(before, packet), rewrite)
    assert made == after
    assert made is not None
    assert made == remade(made)


@FEW
@given(st.integers(1, 9000), st.booleans(), st.sampled_from([536, 1448]), st.sampled_from(["A", "PA", "FPAC"]))
def test_segments(length: int, six: bool, size: int, flags: str) -> None:
    source, destination = (C6, S6) if six else (C4, S4)
    payload = bytes(index * 7 & 0xFF for index in range(length))
    options = [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))]
    data = bytes(
        ip(six, source, destination) / TCP(sport=1, dport=2, seq=2**32 - 500, flags=flags, options=options) / payload
    )
    upper = 40 if six else 20
    header = validate(Header(1, 4 if six else 1, 0, size, upper, 16), parse(data, 0, len(data)), 1500)
    made = list(map(bytes, segments(header, data, 0, len(data))))
    assert all(part == remade(part) for part in made)
    read = [(IPv6(part) if six else IP(part))[TCP] for part in made]
    assert b"".join(bytes(part.payload) for part in read) == payload
    assert [part.seq for part in read] == [(2**32 - 500 + index * size) % 2**32 for index in range(len(made))]
    assert all(len(part.payload) == size for part in read[:-1])
