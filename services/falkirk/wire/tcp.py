"""TCP headers (RFC 9293 3.1) and options (3.2). Only what a tracker and a segmenter need to know."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from falkirk.wire.checksum import Buffer, update
from falkirk.wire.malformed import MalformedPacket

MINIMUM: Final = 20
CHECKSUM_OFFSET: Final = 16
FLAGS_OFFSET: Final = 13

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
ECE: Final = 0x40
CWR: Final = 0x80

END_OF_OPTIONS: Final = 0
NO_OPERATION: Final = 1
MAXIMUM_SEGMENT_SIZE: Final = 2

_HEADER: Final = Struct(">HHIIBBHHH")


class Tcp(NamedTuple):
    """One header; `header_length` in bytes, options included."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgment: int
    header_length: int
    flags: int
    window: int
    checksum: int


def parse(data: Buffer, at: int, available: int) -> Tcp:
    """The header at `at`, of whose segment `available` bytes are there. Raises MalformedPacket."""
    if available < MINIMUM:
        raise MalformedPacket("truncated_l4")
    source, destination, sequence, acknowledgment, offset, flags, window, check, _ = _HEADER.unpack_from(data, at)
    header_length = offset >> 4 << 2
    if header_length < MINIMUM or header_length > available:
        raise MalformedPacket("bad_tcp_offset")
    return Tcp(source, destination, sequence, acknowledgment, header_length, flags, window, check)


def build(
    source_port: int, destination_port: int, sequence: int, acknowledgment: int, flags: int, window: int = 0
) -> bytes:
    """A header without options, its checksum zero."""
    return _HEADER.pack(source_port, destination_port, sequence, acknowledgment, MINIMUM << 2, flags, window, 0, 0)


def options(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(kind, offset of its data, length of its data) of each option but padding; stops at the first broken one."""
    while at < end:
        kind = data[at]
        if kind == END_OF_OPTIONS:
            return
        if kind == NO_OPERATION:
            at += 1
            continue
        if at + 1 >= end:
            return
        length = data[at + 1]
        # RFC 9293 3.2, MUST-7: be prepared to handle an illegal option length.
        if length < 2 or at + length > end:
            return
        yield kind, at + 2, length - 2
        at += length


def maximum_segment_size(data: Buffer, at: int, header_length: int) -> int | None:
    """The MSS option of the header at `at`; None where there is none."""
    for kind, offset, length in options(data, at + MINIMUM, at + header_length):
        if kind == MAXIMUM_SEGMENT_SIZE and length == 2:
            return data[offset] << 8 | data[offset + 1]
    return None


def clamp_segment_size(data: bytearray | memoryview, at: int, end: int, most: int, *, partial: bool) -> bool:
    """Lowers the MSS option of the SYN at `at`, whose segment ends at `end`, to what a path takes; whether it was larger.

    `most` is the path's MTU less 40 (IPv4) or 60 (IPv6): RFC 6691 2, options of IP and TCP are the sender's to subtract. The
    checksum follows by RFC 1624, unless it is `partial`: then it covers no option yet. A SYN without the option stays
    without: its sender takes 536 or 1,220 bytes (RFC 9293 3.7.1), which every path does. Limit: only whole headers.
    """
    header_end = at + (data[at + 12] >> 4 << 2)
    if header_end > end:
        return False
    lowered = False
    for kind, offset, length in options(data, at + MINIMUM, header_end):
        if kind != MAXIMUM_SEGMENT_SIZE or length != 2:
            continue
        size = data[offset] << 8 | data[offset + 1]
        if size <= most:
            continue
        data[offset : offset + 2] = most.to_bytes(2, "big")
        lowered = True
        if not partial:
            old, new = size, most
            if (offset - at) & 1:
                # It lies across two words of the sum.
                old, new = _swapped(old), _swapped(new)
            field = at + CHECKSUM_OFFSET
            check = update(data[field] << 8 | data[field + 1], old, new)
            data[field : field + 2] = check.to_bytes(2, "big")
    return lowered


def _swapped(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8
