"""Packets of scripts as bytes: made by hand, so that every one of their mistakes can be made on purpose.

`craft` turns a step (`tests.packets.script`) into an IP packet. Checksums and lengths are right unless the step says otherwise; they are
computed here and not by the code under test. Limit: one IPv4 option or chain of IPv6 extension headers a packet, by name.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from tests.packets.script import Step

TCP_FLAGS: Final = {"F": 1, "S": 2, "R": 4, "P": 8, ".": 16, "U": 32, "E": 64, "W": 128}
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "sctp": 132, "gre": 47, "esp": 50}
ICMP4: Final = {
    "unreachable-net": (3, 0),
    "unreachable-host": (3, 1),
    "unreachable-protocol": (3, 2),
    "unreachable-port": (3, 3),
    "too-big": (3, 4),
    "prohibited": (3, 13),
    "source-quench": (4, 0),
    "redirect": (5, 1),
    "time-exceeded": (11, 0),
    "reassembly": (11, 1),
    "parameter": (12, 0),
    "echo": (8, 0),
    "echo-reply": (0, 0),
    "timestamp": (13, 0),
}
ICMP6: Final = {
    "unreachable-net": (1, 0),
    "prohibited": (1, 1),
    "unreachable-host": (1, 3),
    "unreachable-port": (1, 4),
    "too-big": (2, 0),
    "time-exceeded": (3, 0),
    "reassembly": (3, 1),
    "parameter": (4, 0),
    "unreachable-protocol": (4, 1),
    "unknown-option": (4, 2),
    "echo": (128, 0),
    "echo-reply": (129, 0),
    "router-solicitation": (133, 0),
    "redirect": (137, 0),
}
OPTIONS4: Final = {
    "rr": "07070400000000" + "00",
    "ts": "4408050000000000",
    "nop": "01010101",
    "eol": "00000000",
    "ra": "94040000",
    "unknown": "9e040000",
    "lsrr": "830704c612000100",
    "ssrr": "890704c612000100",
    "short": "07010000",
    "long": "07280400",
}
"""RFC 791 3.1: record route, timestamp, no operation, end of options, router alert (RFC 2113), source routes, and two broken ones."""
_EXTENSION: Final = {
    **dict.fromkeys(("hop", "hopra", "hopunknown", "hopskip", "hoplong"), 0),
    **dict.fromkeys(("rh0", "rh0done", "rh2", "rh4", "rh4left"), 43),
    "dst": 60,
    "frag": 44,
    "none": 59,
    "ah": 51,
    "mobility": 135,
    "reserved": 253,
}
"""Protocol numbers of extension headers, by the names that scripts have for them."""
_EXTENSION_BODY: Final = {
    "hop": "00010400000000",
    "hopra": "00050200000100",
    "hopunknown": "00be0400000000",
    "hopskip": "003e0400000000",
    "hoplong": "03" + "011c" + "00" * 29,
    "dst": "00010400000000",
    "rh0": "0200010000000020010db8000000000000000000000099",
    "rh0done": "02000000000000" + "20010db8000000000000000000000099",
    "rh4": "02040000000000" + "20010db8000000000000000000000099",
    "rh4left": "02040100000000" + "20010db8000000000000000000000099",
    "rh2": "02020000000000" + "20010db8000000000000000000000099",
    "frag": "00000000000007",
    "none": "00" * 7,
    "ah": "04000000000001" + "00" * 16,
    "mobility": "00050000000000",
    "reserved": "00000000000000",
}
"""What follows the next-header byte of each extension (RFC 8200 4.2 to 4.8, RFC 5095, RFC 6275, RFC 4302)."""


@dataclass
class Endpoints:
    """Between whom a packet goes."""

    source: str
    destination: str
    source_port: int
    destination_port: int


def checksum(data: bytes, initial: int = 0) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = initial + sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(address: str) -> bytes:
    """4 or 16 bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1), not complemented."""
    data = source + destination + struct.pack(">IHH", length, 0, protocol)
    return int(~checksum(data) & 0xFFFF)


def pattern(start: int, length: int) -> bytes:
    """Bytes of a stream by their place in it, so that what comes twice or in pieces can be recognised."""
    block = bytes((place ^ place >> 8) & 0xFF for place in range(start & 0xFFFF, (start & 0xFFFF) + min(length, 65536)))
    return (block * (length // max(len(block), 1) + 1))[:length]


def tcp_options(step: Step, echo: int, base: int) -> bytes:
    """The options that a step names, padded; `echo` is the timestamp that TSecr repeats, `base` what SACK blocks are counted from."""
    made = b""
    if step.has("mss"):
        made += struct.pack(">BBH", 2, 4, step.number("mss"))
    if step.has("sackok"):
        made += b"\x04\x02"
    if step.has("ts"):
        made += struct.pack(">BBII", 8, 10, step.number("ts"), step.number("ecr", echo))
    if step.has("ws"):
        made += b"\x01\x03\x03" + bytes([step.number("ws")])
    if step.has("sack"):
        blocks = [[int(edge) for edge in block.split("-")] for block in step.value("sack").split(",")]
        edges = b"".join(struct.pack(">I", base + edge & 0xFFFFFFFF) for block in blocks for edge in block)
        made += bytes([1, 1, 5, 2 + len(edges)]) + edges
    made += bytes.fromhex(step.value("tcpopt"))
    return made + b"\x01" * (-len(made) % 4)


def tcp(
    step: Step,
    ends: Endpoints,
    flags: str,
    sequence: int,
    acknowledgment: int,
    payload: bytes,
    echo: int = 0,
    base: int = 0,
) -> bytes:
    """A segment with its checksum."""
    options = tcp_options(step, echo, base)
    bits = sum(TCP_FLAGS[flag] for flag in flags if flag != "-")
    offset = step.number("offset", 5 + len(options) // 4)
    head = struct.pack(
        ">HHIIBBHHH",
        ends.source_port,
        ends.destination_port,
        sequence & 0xFFFFFFFF,
        acknowledgment & 0xFFFFFFFF,
        offset << 4 | (14 if step.has("reserved") else 0),
        bits,
        step.number("win", 65535),
        0,
        step.number("urp"),
    )
    return _summed(head + options + payload, 16, ends, 6, step)


def udp(step: Step, ends: Endpoints, payload: bytes) -> bytes:
    """A datagram with its checksum; `nosum` for none (RFC 768)."""
    length = step.number("udplen", 8 + len(payload))
    whole = struct.pack(">HHHH", ends.source_port, ends.destination_port, length, 0) + payload
    if step.has("nosum"):
        return whole
    if length < len(whole):
        return _summed(whole[:length], 6, ends, 17, step) + whole[length:]
    return _summed(whole, 6, ends, 17, step)


def icmp_kind(family: str, name: str) -> tuple[int, int]:
    """Type and code of a name, or of `3/1`."""
    if "/" in name:
        kind, _, code = name.partition("/")
        return int(kind), int(code)
    return (ICMP4 if family == "ipv4" else ICMP6)[name]


def icmp(step: Step, ends: Endpoints, family: str, name: str, body: bytes) -> bytes:
    """A message with its checksum; its second word is the MTU, or identifier and sequence number."""
    kind, code = icmp_kind(family, name)
    if step.has("mtu"):
        rest = struct.pack(">I", step.number("mtu"))
    elif name in ("echo", "echo-reply"):
        rest = struct.pack(">HH", step.number("id", 1), step.number("seq", 1))
    else:
        rest = struct.pack(">I", step.number("rest"))
    whole = struct.pack(">BBH", kind, code, 0) + rest + body
    return _summed(whole, 2, ends, 1 if family == "ipv4" else 58, step)


def _summed(whole: bytes, at: int, ends: Endpoints, protocol: int, step: Step) -> bytes:
    initial = 0
    if protocol != 1:
        initial = pseudo(packed(ends.source), packed(ends.destination), protocol, len(whole))
    value = checksum(whole, initial)
    if protocol == 17 and not value:
        value = 0xFFFF
    if step.value("sum") == "bad":
        value ^= 0x5555
    return whole[:at] + struct.pack(">H", value) + whole[at + 2 :]


def ip(step: Step, ends: Endpoints, family: str, protocol: int, upper: bytes, fragment: int = 0) -> bytes:
    """An IP packet around an upper layer. `fragment` is IPv4's offset word, flags included, or IPv6's, where it isn't zero."""
    made = (
        _ip4(step, ends, protocol, upper, fragment) if family == "ipv4" else _ip6(step, ends, protocol, upper, fragment)
    )
    for key in step.keys:
        if key.name == "poke":
            at, _, value = key.value.partition(":")
            made = made[: int(at)] + bytes.fromhex(value) + made[int(at) + len(value) // 2 :]
    made += bytes(step.number("pad"))
    return made[: step.number("cut")] if step.has("cut") else made


def _ip4(step: Step, ends: Endpoints, protocol: int, upper: bytes, fragment: int) -> bytes:
    options = bytes.fromhex(OPTIONS4[step.value("opt")]) if step.has("opt") else b""
    word = fragment or (0 if step.has("!df") or step.value("df") == "0" else 0x4000)
    head = struct.pack(
        ">BBHHHBBH4s4s",
        0x40 | 5 + len(options) // 4,
        step.number("tos"),
        step.number("iplen", 20 + len(options) + len(upper)),
        step.number("ipid", 0x1234),
        word,
        step.number("ttl", 64),
        protocol,
        0,
        packed(ends.source),
        packed(ends.destination),
    )
    head += options
    value = checksum(head) ^ (0x5555 if step.value("ipsum") == "bad" else 0)
    return head[:10] + struct.pack(">H", value) + head[12:] + upper


def _ip6(step: Step, ends: Endpoints, protocol: int, upper: bytes, fragment: int) -> bytes:
    names = [name for name in step.value("ext").split(",") if name]
    numbers = [_EXTENSION[name] for name in names] + ([44] if fragment else []) + [protocol]
    chain = b"".join(
        bytes([following]) + bytes.fromhex(_EXTENSION_BODY[name])
        for name, following in zip(names, numbers[1:], strict=False)
    )
    if fragment:
        chain += struct.pack(">BBHI", protocol, 0, fragment & 0xFFFF, step.number("ipid", 0x1234))
    length = step.number("iplen", len(chain) + len(upper))
    head = struct.pack(
        ">IHBB16s16s",
        6 << 28 | step.number("tos") << 20 | step.number("label"),
        length,
        numbers[0],
        step.number("ttl", 64),
        packed(ends.source),
        packed(ends.destination),
    )
    return head + chain + upper


def cut_up(packet: bytes, size: int, mss: int) -> list[bytes]:
    """The segments of a TCP packet whose headers are `size` bytes, as a super-packet would be cut."""
    head, payload = packet[:size], packet[size:]
    four = packet[0] >> 4 == 4
    upper = (packet[0] & 15) * 4 if four else 40
    sequence = int.from_bytes(packet[upper + 4 : upper + 8], "big")
    made = []
    for at in range(0, len(payload), mss):
        part = bytearray(head + payload[at : at + mss])
        part[upper + 4 : upper + 8] = (sequence + at & 0xFFFFFFFF).to_bytes(4, "big")
        if at + mss < len(payload):
            part[upper + 13] &= ~9
        if four:
            part[2:4] = len(part).to_bytes(2, "big")
            part[10:12] = b"\0\0"
            part[10:12] = checksum(bytes(part[:upper])).to_bytes(2, "big")
        else:
            part[4:6] = (len(part) - 40).to_bytes(2, "big")
        source, destination = (part[12:16], part[16:20]) if four else (part[8:24], part[24:40])
        part[upper + 16 : upper + 18] = b"\0\0"
        total = checksum(bytes(part[upper:]), pseudo(bytes(source), bytes(destination), 6, len(part) - upper))
        part[upper + 16 : upper + 18] = total.to_bytes(2, "big")
        made.append(bytes(part))
    return made
