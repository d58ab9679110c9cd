"""A super-packet cut into the packets that it stands for, with complete checksums: where a `vnet` packet leaves by a `raw` tunnel.

Each segment has `gso_size` bytes of payload but the last. TCP: the sequence number moves on; CWR stays on the first segment
only, FIN and PSH on the last only (as Linux' tcp_gso_segment does). UDP: each has its own length. Either: the IPv4
identification grows by one, and the checksum is made from the packet's own addresses, not from the partial one that came with it.

Cost: 5 us a segment of 1,448 bytes, most of it the payload's sum.

Limits: TCP and UDP. The vnet header is the kernel's, or one that was admitted (`falkirk.wire.vnet`): gso_size isn't so small that
64 KiB become thousands of packets, and csum_start is where the upper layer starts.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from falkirk.wire import tcp
from falkirk.wire.checksum import Buffer, checksum, complete, pseudo_header, residue
from falkirk.wire.protocol import TCP, UDP
from falkirk.wire.vnet import GSO_UDP_L4, Header

_UDP_CHECKSUM_OFFSET: Final = 6
_U16: Final = Struct(">H").pack_into
_U32: Final = Struct(">I").pack_into


def segments(header: Header, data: Buffer, at: int, length: int) -> list[bytes]:
    """The plain packets of the (super-)packet of `length` bytes at `at`, behind the vnet header `header`."""
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
    made = []
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
        if four:
            _U16(template, 2, upper + segment_length)
            _U16(template, 4, identification)
            template[10] = template[11] = 0
            _U16(template, 10, checksum(template[:upper]))
            identification = (identification + 1) & 0xFFFF
        else:
            _U16(template, 4, upper + segment_length - 40)
        made.append(b"".join((template, part)))
        sequence = (sequence + size) & 0xFFFFFFFF
        current &= ~tcp.CWR
        start = stop
    return made


def _datagrams(header: Header, data: memoryview, upper: int) -> list[bytes]:
    """The datagrams of a USO super-packet."""
    start = upper + 8
    if len(data) - start <= header.gso_size:
        return [_complete(header, data)]
    template = bytearray(data[:start])
    four = template[0] >> 4 == 4
    identification = template[4] << 8 | template[5]
    fixed = pseudo_header(template[12:20] if four else template[8:40], b"", UDP, 0) + residue(
        template[upper : upper + 4]
    )
    made = []
    for begin in range(start, len(data), header.gso_size):
        part = data[begin : begin + header.gso_size]
        length = 8 + len(part)
        # RFC 768: zero would mean that there is none.
        check = -(fixed + 2 * length + residue(part)) % 0xFFFF or 0xFFFF
        _U16(template, upper + 4, length)
        _U16(template, upper + _UDP_CHECKSUM_OFFSET, check)
        if four:
            _U16(template, 2, upper + length)
            _U16(template, 4, identification)
            template[10] = template[11] = 0
            _U16(template, 10, checksum(template[:upper]))
            identification = (identification + 1) & 0xFFFF
        else:
            _U16(template, 4, upper + length - 40)
        made.append(b"".join((template, part)))
    return made


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
