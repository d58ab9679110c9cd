"""pcapng as two independent readers see it: dpkt and scapy."""

from __future__ import annotations

import io

import dpkt
from scapy.utils import RawPcapNgReader

from falkirk.wire import pcapng

TIME = 1_700_000_000_123_456_789
PACKETS = [bytes([0x45]) + bytes(at % 251 for at in range(size)) for size in (19, 20, 21, 22, 65_534)]


def written() -> bytes:
    head = pcapng.header("falkirk", [("tunnel", "as devices send them"), ("namespace", "behind the NAT")], 0)
    blocks = [
        pcapng.packet(
            number % 2, TIME + number, data, len(data) + number, inbound=number % 2 == 0, comment=f"packet {number} §"
        )
        for number, data in enumerate(PACKETS)
    ]
    return head + b"".join(blocks)


def test_dpkt_reads_packets_and_times() -> None:
    reader = dpkt.pcapng.Reader(io.BytesIO(written()))
    assert reader.datalink() == dpkt.pcap.DLT_RAW or reader.datalink() == pcapng.LINKTYPE_RAW
    found = list(reader)
    assert [data for _, data in found] == PACKETS
    assert all(abs(float(time) - TIME / 1e9) < 1e-3 for time, _ in found)


def test_scapy_reads_what_is_said_of_each() -> None:
    reader = RawPcapNgReader(io.BytesIO(written()))
    found = list(reader)
    assert [data for data, _ in found] == PACKETS
    for number, (_, said) in enumerate(found):
        assert said.linktype == pcapng.LINKTYPE_RAW
        assert (
            said.ifname == (b"tunnel", b"namespace")[number % 2].decode()
            or said.ifname
            == (
                b"tunnel",
                b"namespace",
            )[number % 2]
        )
        assert said.tshigh << 32 | said.tslow == TIME + number
        assert said.wirelen == len(PACKETS[number]) + number
        assert said.direction == (pcapng.INBOUND, pcapng.OUTBOUND)[number % 2]
        assert said.comments == [f"packet {number} §".encode()]


def test_what_was_lost_is_told_with_the_next_packet() -> None:
    assert pcapng._option(pcapng.EPB_DROPCOUNT, (7).to_bytes(8, "little")) in pcapng.packet(
        0, TIME, b"E", 1, inbound=True, lost=7
    )
    assert b"\x04\x00\x08\x00" not in pcapng.packet(0, TIME, b"E", 1, inbound=True)


def test_a_comment_never_outgrows_its_field() -> None:
    block = pcapng.packet(0, TIME, b"E", 1, inbound=True, comment="x" * 100_000)
    assert int.from_bytes(block[4:8], "little") == len(block)
