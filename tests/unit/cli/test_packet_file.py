"""Capture files of every link layer that is read, made by scapy."""

from __future__ import annotations

from pathlib import Path

import dpkt
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, CookedLinux, Dot1Q, Ether
from scapy.utils import PcapNgWriter, PcapWriter

from falkirk.cli.packet_file import packets
from falkirk.wire import pcapng

FOUR = IP(src="100.96.0.2", dst="203.0.113.5") / UDP(sport=1, dport=53) / b"q"
SIX = IPv6(src="fd00::2", dst="2001:db8::5") / UDP(sport=1, dport=53) / b"q"


def written(path: Path, linktype: int, *frames: object, ng: bool = False) -> Path:
    writer = PcapNgWriter(str(path)) if ng else PcapWriter(str(path), linktype=linktype)
    for frame in frames:
        writer.write(frame)
    writer.close()
    return path


@pytest.mark.parametrize("ng", [False, True])
def test_ethernet_with_tags_and_padding(tmp_path: Path, ng: bool) -> None:
    """A short packet's padding isn't part of it, and what isn't IP is left out."""
    frames = (
        Ether() / FOUR / b"",
        bytes(Ether() / FOUR) + bytes(18),
        Ether() / ARP(),
        Ether() / Dot1Q(vlan=7) / SIX,
    )
    path = written(tmp_path / "x", 1, *(Ether(bytes(frame)) for frame in frames), ng=ng)
    assert [data for _, data in packets(path)] == [bytes(FOUR), bytes(FOUR), bytes(SIX)]


@pytest.mark.parametrize(
    ("linktype", "head"),
    [
        (101, b""),
        (12, b""),
        (228, b""),
        (0, b"\x02\0\0\0"),
        (108, b"\0\0\0\x02"),
        (113, bytes(CookedLinux(proto=0x0800))),
        (276, b"\x08\0" + bytes(18)),
    ],
)
def test_other_link_layers(tmp_path: Path, linktype: int, head: bytes) -> None:
    with (tmp_path / "x").open("wb") as file:
        dpkt.pcap.Writer(file, linktype=linktype).writepkt(head + bytes(FOUR))
    assert [data for _, data in packets(tmp_path / "x")] == [bytes(FOUR)]


def test_what_falkirk_captures(tmp_path: Path) -> None:
    path = tmp_path / "x"
    block = pcapng.packet(0, 1_700_000_000_500_000_000, bytes(SIX), len(SIX), inbound=True, comment="flow=1")
    path.write_bytes(pcapng.header("falkirk", [("tunnel", "")], 0) + block)
    ((time, data),) = packets(path)
    assert (time, data) == (1_700_000_000.5, bytes(SIX))


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\xd4\xc3\xb2\xa1"])
def test_what_is_no_capture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="neither pcap nor pcapng"):
        list(packets(tmp_path / "x"))


def test_a_link_layer_that_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x", 105, bytes(FOUR))
    with pytest.raises(ValueError, match="link type 105"):
        list(packets(path))


def test_a_packet_that_was_cut_is_given_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "x", 101, bytes(FOUR)[:24])
    assert [data for _, data in packets(path)] == [bytes(FOUR)[:24]]
