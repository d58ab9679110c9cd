"""Packets out of a tunnel, taken apart and checked. Every one that comes is held against scapy's own idea of it.

`plain` undoes a virtio-net header (virtio 1.2, 5.1.6): a partial checksum must be the pseudo-header's sum at the place that the header
names, and is completed; a super-packet is cut into what the wire would carry. `seen` reads a plain packet into the fields that scripts
compare. Both raise AssertionError where a packet is wrong.
"""

from __future__ import annotations

import logging
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)

from scapy.layers.inet import ICMP, IP, TCP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402

from tests.packets.craft import ICMP4, ICMP6, TCP_FLAGS, checksum, cut_up, pseudo  # noqa: E402

VNET = struct.Struct("=BBHHHH")


@dataclass
class Seen:
    """One packet."""

    data: bytes
    family: str
    kind: str
    """tcp, udp, icmp, or the protocol's number."""
    source: str
    destination: str
    source_port: int = 0
    destination_port: int = 0
    flags: str = ""
    sequence: int = 0
    fields: dict[str, int | str | None] = field(default_factory=dict)
    """By the name that scripts have for them; what isn't there is absent."""
    payload: bytes = b""
    """The upper layer's; of an ICMP error what it quotes."""

    def __str__(self) -> str:
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items() if value is not None)
        ports = f" {self.source_port}>{self.destination_port}" if self.source_port or self.destination_port else ""
        what = f"{self.flags} {self.sequence}" if self.kind == "tcp" else self.kind
        return f"{what} {fields} ({self.source}>{self.destination}{ports}) {self.payload[:24]!r}"


def plain(data: bytes) -> list[bytes]:
    """The wire's packets of a datagram on a `vnet` tunnel."""
    flags, gso_type, _, gso_size, start, offset = VNET.unpack_from(data)
    packet = bytearray(data[VNET.size :])
    four = packet[0] >> 4 == 4
    assert flags in (0, 1, 2), f"virtio-net flags {flags}"
    if flags & 1:
        addresses = (packet[12:16], packet[16:20]) if four else (packet[8:24], packet[24:40])
        protocol = packet[9] if four else packet[6]
        assert start == ((packet[0] & 15) * 4 if four else 40), f"csum_start {start}"
        assert (protocol, offset) in ((6, 16), (17, 6)), f"csum_offset {offset} of protocol {protocol}"
        held = int.from_bytes(packet[start + offset : start + offset + 2], "big")
        wanted = pseudo(bytes(addresses[0]), bytes(addresses[1]), protocol, len(packet) - start)
        assert held % 0xFFFF == wanted % 0xFFFF, f"a partial checksum of {held:#x} instead of {wanted:#x}"
        value = checksum(bytes(packet[start:])) or (0xFFFF if protocol == 17 else 0)
        packet[start + offset : start + offset + 2] = value.to_bytes(2, "big")
    if not gso_type:
        return [bytes(packet)]
    assert flags & 1, "a super-packet without a partial checksum"
    if gso_type in (1, 4, 0x81, 0x84):
        assert (gso_type & 0x7F == 1) == four, "a super-packet of the other family"
        return cut_up(bytes(packet), start + (packet[start + 12] >> 4) * 4, gso_size)
    assert gso_type == 5, f"gso_type {gso_type}"
    return _cut_up_udp(bytes(packet), start, gso_size)


def _cut_up_udp(packet: bytes, start: int, size: int) -> list[bytes]:
    made = []
    for at in range(start + 8, len(packet), size):
        part = bytearray(packet[: start + 8] + packet[at : at + size])
        four = part[0] >> 4 == 4
        if four:
            part[2:4] = len(part).to_bytes(2, "big")
            part[10:12] = b"\0\0"
            part[10:12] = checksum(bytes(part[:start])).to_bytes(2, "big")
        else:
            part[4:6] = (len(part) - 40).to_bytes(2, "big")
        part[start + 4 : start + 6] = (len(part) - start).to_bytes(2, "big")
        part[start + 6 : start + 8] = b"\0\0"
        addresses = (part[12:16], part[16:20]) if four else (part[8:24], part[24:40])
        initial = pseudo(bytes(addresses[0]), bytes(addresses[1]), 17, len(part) - start)
        part[start + 6 : start + 8] = (checksum(bytes(part[start:]), initial) or 0xFFFF).to_bytes(2, "big")
        made.append(bytes(part))
    return made


def remade(data: bytes) -> bytes:
    """scapy's own idea of the packet: read, computed fields deleted, written again."""
    four = data[0] >> 4 == 4
    packet: Any = IP(data) if four else IPv6(data)
    layer = packet
    # RFC 768: IPv4's may be without one.
    unsummed = four and packet.proto == 17 and UDP in packet and not packet[UDP].chksum
    while layer:
        for name in ("len", "plen", "chksum", "cksum", "ihl", "dataofs"):
            # Of an ICMP error's quotation everything is the quoted packet's, and goes back as it came.
            if name in layer.fields and (layer.name != "TCP" or name != "len"):
                delattr(layer, name)
        if layer.name.startswith("ICMP") or layer.name == "UDP":
            break
        layer = layer.payload
    if unsummed:
        packet[UDP].chksum = 0
    return bytes(packet)


def seen(data: bytes) -> Seen:
    """A plain packet, checked and read."""
    four = data[0] >> 4 == 4
    family = "ipv4" if four else "ipv6"
    total = int.from_bytes(data[2:4], "big") if four else 40 + int.from_bytes(data[4:6], "big")
    assert total == len(data), f"an IP length of {total} in a datagram of {len(data)}"
    at = (data[0] & 15) * 4 if four else 40
    protocol = data[9] if four else data[6]
    size, kind = (4, socket.AF_INET) if four else (16, socket.AF_INET6)
    first = 12 if four else 8
    source = socket.inet_ntop(kind, data[first : first + size])
    destination = socket.inet_ntop(kind, data[first + size : first + 2 * size])
    made = Seen(data, family, str(protocol), source, destination)
    fields = made.fields
    fields["ttl"] = data[8] if four else data[7]
    fields["tos"] = data[1] if four else int.from_bytes(data[:2], "big") >> 4 & 0xFF
    if four:
        word = int.from_bytes(data[6:8], "big")
        fields["df"] = 1 if word & 0x4000 else None
        fields["ipid"] = int.from_bytes(data[4:6], "big")
        fields["mf"], fields["off"] = (1 if word & 0x2000 else 0), (word & 0x1FFF) * 8
    elif protocol == 44:
        word = int.from_bytes(data[42:44], "big")
        fields["ipid"] = int.from_bytes(data[44:48], "big")
        fields["mf"], fields["off"] = word & 1, word & 0xFFF8
        protocol, at = data[40], 48
    else:
        fields["mf"] = fields["off"] = 0
    if four:
        head = data[: (data[0] & 15) * 4]
        assert not checksum(head), "the IP checksum is wrong"
    if fields["mf"] or fields["off"]:
        made.kind, made.payload = "fragment", data[at:]
        fields["proto"] = protocol
        fields["len"] = len(data) - at
        return made
    if protocol in (6, 17, 1, 58):
        again = remade(data)
        assert again == data, f"scapy would have sent {again.hex()} instead of {data.hex()}"
    {6: _tcp, 17: _udp, 1: _icmp, 58: _icmp}.get(protocol, _other)(made, data[at:])
    fields["len"] = len(made.payload)
    return made


def _tcp(made: Seen, segment: bytes) -> None:
    made.kind = "tcp"
    made.source_port, made.destination_port, made.sequence, ack, offset, flags, window, _, urgent = struct.unpack_from(
        ">HHIIBBHHH", segment
    )
    made.flags = "".join(letter for letter, bit in TCP_FLAGS.items() if flags & bit) or "-"
    made.payload = segment[(offset >> 4) * 4 :]
    made.fields |= {"ack": ack if flags & 16 else None, "win": window, "urp": urgent or None, "reserved": offset & 15}
    for name, value in TCP(segment).options:
        if name == "MSS":
            made.fields["mss"] = value
        elif name == "WScale":
            made.fields["ws"] = value
        elif name == "SAckOK":
            made.fields["sackok"] = 1
        elif name == "SAck":
            made.fields["sack"] = ",".join(f"{value[at]}-{value[at + 1]}" for at in range(0, len(value), 2))
        elif name == "Timestamp":
            made.fields["ts"], made.fields["ecr"] = value
        elif name == "TFO":
            made.fields["tfo"] = 1


def _udp(made: Seen, datagram: bytes) -> None:
    made.kind = "udp"
    made.source_port, made.destination_port, _, check = struct.unpack_from(">HHHH", datagram)
    made.payload = datagram[8:]
    made.fields["nosum"] = None if check else 1


def _icmp(made: Seen, message: bytes) -> None:
    kind, code, _, first, second = struct.unpack_from(">BBHHH", message)
    names = ICMP4 if made.family == "ipv4" else ICMP6
    made.kind = "icmp"
    made.fields["type"] = next((name for name, what in names.items() if what == (kind, code)), f"{kind}/{code}")
    made.fields["mtu"] = first << 16 | second
    made.fields["id"], made.fields["seq"] = first, second
    made.payload = message[8:]
    if ICMP in IP(made.data) and kind in (0, 8):
        made.fields["mtu"] = None


def _other(made: Seen, rest: bytes) -> None:
    made.payload = rest
