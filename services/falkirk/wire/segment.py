"""A super-packet cut into the packets that it stands for, with complete checksums: where a `vnet` packet leaves by a `raw` tunnel.

Each segment has `gso_size` bytes of payload but the last. TCP: the sequence number moves on; CWR stays on the first segment
only, FIN and PSH on the last only (as Linux' tcp_gso_segment does). UDP: each has its own length. Either: the IPv4
identification grows by one, and the checksum is made from the packet's own addresses, not from the partial one that came with it.

Cost: 5 us a segment of 1,448 bytes, most of it the payload's sum; from `MANY` on numpy makes all whole ones at once, for 1.7 us each of 45.

Limits: TCP and UDP. The vnet header is the kernel's, or one that was admitted (`falkirk.wire.vnet`): gso_size isn't so small that
64 KiB become thousands of packets, and csum_start is where the upper layer starts.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

import numpy as np

from falkirk.wire import tcp
from falkirk.wire.checksum import Buffer, checksum, complete, pseudo_header, residue
from falkirk.wire.protocol import TCP, UDP
from falkirk.wire.vnet import GSO_UDP_L4, Header

if TYPE_CHECKING:
    from numpy.typing import NDArray

Packet = bytes | memoryview
MANY: Final = 12
"""Whole segments for which numpy is worth its start."""
_UDP_CHECKSUM_OFFSET: Final = 6
_U16: Final = Struct(">H").pack_into
_U32: Final = Struct(">I").pack_into


def segments(header: Header, data: Buffer, at: int, length: int) -> list[Packet]:
    """The plain packets of the (super-)packet of `length` bytes at `at`, behind the vnet header `header`. None of them shares memory with `data`."""
    view = memoryview(data)
    upper = header.csum_start
    if header.gso_type == GSO_UDP_L4:
        return _datagrams(header, view[at : at + length], upper)
    # Not hdr_len: the kernel's own is a hint (the skb's linear part), not where the payload starts.
    head_length = upper + (data[at + upper + 12] >> 4 << 2) if header.gso_type else length
    if head_length >= length:
        return [_complete(header, view[at : at + length])]
    size = header.gso_size
    start = at + head_length
    end = at + length
    template = bytearray(view[at:start])
    four = template[0] >> 4 == 4
    flags = template[upper + tcp.FLAGS_OFFSET]
    sequence = int.from_bytes(template[upper + 4 : upper + 8], "big")
    fixed = _fixed_sum(template, four, upper)
    identification = template[4] << 8 | template[5]
    current = flags & ~(tcp.FIN | tcp.PSH)
    made: list[Packet] = []
    whole = (end - start - 1) // size
    if whole >= MANY:
        # The last segment has flags of its own, and isn't one of them.
        rows = _rows(template, view[start : start + whole * size], whole, upper)
        sequences = np.arange(whole, dtype=np.int64) * size + sequence & 0xFFFFFFFF
        rows.matrix[:, upper + 4 : upper + 8] = _columns(sequences, ">u4")
        rows.matrix[:, upper + tcp.FLAGS_OFFSET] = current & ~tcp.CWR
        rows.matrix[0, upper + tcp.FLAGS_OFFSET] = current
        sums = (
            rows.sums
            + (fixed + head_length - upper + size + (current & ~tcp.CWR))
            + (sequences >> 16)
            + (sequences & 0xFFFF)
        )
        sums[0] += current & tcp.CWR
        rows.matrix[:, upper + tcp.CHECKSUM_OFFSET : upper + tcp.CHECKSUM_OFFSET + 2] = _columns(-sums % 0xFFFF, ">u2")
        made += rows.packets()
        start += whole * size
        sequence = (sequence + whole * size) & 0xFFFFFFFF
        identification = (identification + whole) & 0xFFFF
        current &= ~tcp.CWR
    while start < end:
        stop = start + size
        if stop >= end:
            stop = end
            current |= flags & (tcp.FIN | tcp.PSH)
        part = view[start:stop]
        segment_length = head_length - upper + stop - start
        total = fixed + segment_length + (sequence >> 16) + (sequence & 0xFFFF) + current + residue(part)
        _U32(template, upper + 4, sequence)
        template[upper + tcp.FLAGS_OFFSET] = current
        _U16(template, upper + tcp.CHECKSUM_OFFSET, -total % 0xFFFF)
        _ip(template, upper, segment_length, identification)
        made.append(b"".join((template, part)))
        identification = (identification + 1) & 0xFFFF
        sequence = (sequence + size) & 0xFFFFFFFF
        current &= ~tcp.CWR
        start = stop
    return made


def _datagrams(header: Header, data: memoryview, upper: int) -> list[Packet]:
    """The datagrams of a USO super-packet."""
    start, size = upper + 8, header.gso_size
    if len(data) - start <= size:
        return [_complete(header, data)]
    template = bytearray(data[:start])
    four = template[0] >> 4 == 4
    identification = template[4] << 8 | template[5]
    fixed = pseudo_header(template[12:20] if four else template[8:40], b"", UDP, 0) + residue(
        template[upper : upper + 4]
    )
    made: list[Packet] = []
    whole = (len(data) - start) // size
    if whole >= MANY:
        _U16(template, upper + 4, 8 + size)
        rows = _rows(template, data[start : start + whole * size], whole, upper)
        # RFC 768: zero would mean that there is none.
        checks = -(rows.sums + fixed + 2 * (8 + size)) % 0xFFFF
        checks[checks == 0] = 0xFFFF
        rows.matrix[:, upper + _UDP_CHECKSUM_OFFSET : upper + _UDP_CHECKSUM_OFFSET + 2] = _columns(checks, ">u2")
        made += rows.packets()
        start += whole * size
        identification = (identification + whole) & 0xFFFF
    for begin in range(start, len(data), size):
        part = data[begin : begin + size]
        length = 8 + len(part)
        check = -(fixed + 2 * length + residue(part)) % 0xFFFF or 0xFFFF
        _U16(template, upper + 4, length)
        _U16(template, upper + _UDP_CHECKSUM_OFFSET, check)
        _ip(template, upper, length, identification)
        identification = (identification + 1) & 0xFFFF
        made.append(b"".join((template, part)))
    return made


def _ip(template: bytearray, upper: int, length: int, identification: int) -> None:
    """The IP header of a segment whose upper layer has `length` bytes."""
    if template[0] >> 4 == 4:
        _U16(template, 2, upper + length)
        _U16(template, 4, identification)
        template[10] = template[11] = 0
        _U16(template, 10, checksum(template[:upper]))
    else:
        _U16(template, 4, upper + length - 40)


class _Rows:
    """Segments of one size, one a row: headers as in the template, IP's own ones right, and the payload."""

    __slots__ = ("matrix", "sums")

    def __init__(self, matrix: NDArray[np.uint8], sums: NDArray[np.int64]) -> None:
        self.matrix = matrix
        self.sums = sums
        """Of each payload's 16-bit words, modulo 0xffff."""

    def packets(self) -> list[Packet]:
        """The rows."""
        count, width = self.matrix.shape
        flat = self.matrix.reshape(count * width).data
        return [flat[at : at + width] for at in range(0, count * width, width)]


def _rows(template: bytearray, payload: memoryview, count: int, upper: int) -> _Rows:
    size, head = len(payload) // count, len(template)
    _ip(template, upper, head - upper + size, template[4] << 8 | template[5])
    matrix = np.empty((count, head + size), np.uint8)
    matrix[:, :head] = np.frombuffer(template, np.uint8)
    matrix[:, head:] = np.frombuffer(payload, np.uint8).reshape(count, size)
    if template[0] >> 4 == 4:
        identification = template[4] << 8 | template[5]
        identifications = np.arange(identification, identification + count, dtype=np.int64) & 0xFFFF
        matrix[:, 4:6] = _columns(identifications, ">u2")
        rest = residue(template[:upper]) - identification - (template[10] << 8 | template[11])
        matrix[:, 10:12] = _columns(-(identifications + rest) % 0xFFFF, ">u2")
    # Words of four bytes, least significant first, add up to what words of two would modulo 0xffff; 256 times as much is the sum of the others.
    words = size >> 2
    sums = np.add.reduce(np.ndarray((count, words), "<u4", payload, 0, (size, 4)), axis=1, dtype=np.int64)
    for place in range(size & 3):
        column = np.ndarray(count, np.uint8, payload, 4 * words + place, (size,))
        sums += column.astype(np.int64) << 8 * (place & 1)
    return _Rows(matrix, (sums << 8) % 0xFFFF)


def _columns(numbers: NDArray[np.int64], kind: str) -> NDArray[np.uint8]:
    """Numbers as the bytes of their words, a row each."""
    return numbers.astype(kind).view(np.uint8).reshape(len(numbers), -1)


def _fixed_sum(template: bytearray, four: bool, upper: int) -> int:
    """What the checksums of all segments have in common: addresses and protocol, the TCP header without what changes."""
    header = template[upper:]
    header[4:8] = bytes(4)
    header[tcp.FLAGS_OFFSET] = 0
    header[tcp.CHECKSUM_OFFSET : tcp.CHECKSUM_OFFSET + 2] = b"\0\0"
    addresses = template[12:20] if four else template[8:40]
    return pseudo_header(addresses, b"", TCP, 0) + residue(header)


def _complete(header: Header, packet: memoryview) -> bytes:
    """One packet as it is, its checksum completed where it is partial."""
    if not header.partial:
        return bytes(packet)
    whole = bytearray(packet)
    field = header.csum_start + header.csum_offset
    complete(whole, header.csum_start, field, len(whole))
    if header.csum_offset == _UDP_CHECKSUM_OFFSET and not (whole[field] or whole[field + 1]):
        # RFC 768: zero would mean that there is none.
        whole[field] = whole[field + 1] = 0xFF
    return bytes(whole)
