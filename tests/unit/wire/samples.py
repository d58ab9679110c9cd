"""Packets for the tables, built by hand with the plainest of code: nothing here uses what is under test."""

from __future__ import annotations

import struct
from collections.abc import Iterator

C4, S4, A4, D4 = (bytes(a) for a in ([100, 96, 0, 2], [93, 184, 216, 34], [10, 0, 1, 16], [10, 0, 0, 1]))
C6 = bytes.fromhex("fd000000000000010000000000000002")
S6 = bytes.fromhex("2001067c02e800220000000000c10696")
A6 = bytes.fromhex("fd66616c6b69726b0000000000000110")
D6 = bytes.fromhex("fd66616c6b69726b0000000000000001")
SYN, ACK, RST, FIN, PSH, CWR = 2, 16, 4, 1, 8, 128


def words(data: bytes) -> Iterator[int]:
    padded = data + b"\0" * (len(data) % 2)
    for at in range(0, len(padded), 2):
        yield padded[at] << 8 | padded[at + 1]


def slow_sum(data: bytes) -> int:
    """RFC 1071 word by word, end-around carry at each."""
    total = 0
    for word in words(data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def slow_checksum(data: bytes) -> int:
    return ~slow_sum(data) & 0xFFFF


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack(">BBH", 0, protocol, length)
    return source + destination + struct.pack(">IHBB", length, 0, 0, protocol)


def ip4(
    protocol: int,
    payload: bytes,
    *,
    source: bytes = C4,
    destination: bytes = S4,
    ttl: int = 64,
    options: bytes = b"",
    fragment: int = 0x4000,
    identification: int = 7,
    total: int | None = None,
    header_length: int | None = None,
) -> bytes:
    size = 20 + len(options)
    first = 0x40 | (size if header_length is None else header_length) >> 2
    whole = size + len(payload) if total is None else total
    head = struct.pack(
        ">BBHHHBBH4s4s", first, 0, whole, identification, fragment, ttl, protocol, 0, source, destination
    )
    head += options
    return head[:10] + slow_checksum(head).to_bytes(2, "big") + head[12:] + payload


def ip6(
    protocol: int,
    payload: bytes,
    *,
    source: bytes = C6,
    destination: bytes = S6,
    ttl: int = 64,
    extensions: bytes = b"",
    first: int | None = None,
    length: int | None = None,
) -> bytes:
    """`first` is the next header of the fixed header where there are `extensions`."""
    size = len(extensions) + len(payload) if length is None else length
    following = protocol if first is None else first
    return struct.pack(">IHBB16s16s", 6 << 28, size, following, ttl, source, destination) + extensions + payload


def tcp(
    source: bytes,
    destination: bytes,
    *,
    sport: int = 40000,
    dport: int = 443,
    sequence: int = 1000,
    acknowledgment: int = 2000,
    flags: int = ACK,
    options: bytes = b"",
    payload: bytes = b"",
    window: int = 512,
    partial: bool = False,
) -> bytes:
    offset = (20 + len(options)) << 2
    head = struct.pack(">HHIIBBHHH", sport, dport, sequence, acknowledgment, offset, flags, window, 0, 0) + options
    front = pseudo(source, destination, 6, len(head) + len(payload))
    check = slow_sum(front) if partial else slow_checksum(front + head + payload)
    return head[:16] + check.to_bytes(2, "big") + head[18:] + payload


def udp(source: bytes, destination: bytes, payload: bytes = b"question", *, length: int | None = None) -> bytes:
    size = 8 + len(payload) if length is None else length
    head = struct.pack(">HHHH", 5353, 53, size, 0)
    check = slow_checksum(pseudo(source, destination, 17, size) + head + payload)
    return head[:6] + check.to_bytes(2, "big") + payload


def icmp4(kind: int, code: int = 0, rest: int = 0x00050009, payload: bytes = b"ping") -> bytes:
    head = struct.pack(">BBHI", kind, code, 0, rest)
    return head[:2] + slow_checksum(head + payload).to_bytes(2, "big") + head[4:] + payload


def icmp6(
    kind: int, code: int = 0, rest: int = 0x00050009, payload: bytes = b"ping", source: bytes = C6, to: bytes = S6
) -> bytes:
    head = struct.pack(">BBHI", kind, code, 0, rest)
    check = slow_checksum(pseudo(source, to, 58, len(head) + len(payload)) + head + payload)
    return head[:2] + check.to_bytes(2, "big") + head[4:] + payload


def tcp4(**fields: object) -> bytes:
    return ip4(6, tcp(C4, S4, **fields))  # type: ignore[arg-type]


def tcp6(**fields: object) -> bytes:
    return ip6(6, tcp(C6, S6, **fields))  # type: ignore[arg-type]
