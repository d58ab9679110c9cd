"""The virtio-net header in front of packets on `vnet` tunnels and TUN devices (virtio 1.2, 5.1.6; host byte order).

A client's header is untrusted: it would have the kernel cut and sum what it says, where it says. So it must describe
exactly the packet behind it: gso_type the packet's family and TCP, or UDP_L4 for UDP (either family's), csum_start and csum_offset
the place of the checksum that parsing found, gso_size between 536 and the MTU for TCP, and for UDP so that no more than
`MAXIMUM_DATAGRAMS` come out and each fits the MTU; the only flag is NEEDS_CSUM. What is passed on is *normal*: hdr_len
computed here, DATA_VALID (a claim that a check may be skipped) cleared, fields that mean nothing zero.

`validate` is for parsed packets. `admit_tcp4` and `admit_tcp6` are the same for the packet loop: 0.6 us, in place.

Limit: offloads of TCP and UDP only; UFO (gso_type 3), which asks for IP fragments, is refused.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from falkirk.wire import tcp
from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet
from falkirk.wire.protocol import TCP, UDP

SIZE: Final = 10
NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
"""USO: one UDP header in front of several datagrams of equal length, the last maybe shorter."""
GSO_ECN: Final = 0x80
"""With a TCP type: the first segment has CWR, the others must not."""

MINIMUM_GSO_SIZE: Final = 536
"""RFC 9293 3.7.1: the default MSS; smaller ones would turn one datagram into thousands of packets."""

MAXIMUM_DATAGRAMS: Final = 128
"""UDP_MAX_SEGMENTS of Linux: datagrams of one USO super-packet."""

STRUCT: Final = Struct("=BBHHHH")
_read: Final = STRUCT.unpack_from
_write: Final = STRUCT.pack_into

ZERO: Final = bytes(SIZE)
"""A plain packet with a complete checksum."""


class Header(NamedTuple):
    """The fields in their order; lengths in bytes, from the packet's start."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    @property
    def partial(self) -> bool:
        """Whether the checksum is still to be completed."""
        return self.flags & NEEDS_CSUM != 0

    def pack(self) -> bytes:
        """The ten bytes."""
        return STRUCT.pack(*self)


def unpack(data: Buffer, at: int, length: int) -> Header:
    """The header at `at` of a datagram of `length` bytes. Raises MalformedPacket where it is too short for one."""
    if length < SIZE:
        raise MalformedPacket("vnet_too_short")
    return Header._make(_read(data, at))


def validate(header: Header, packet: Packet, mtu: int) -> Header:
    """The normal form of a header that fits its packet; raises MalformedPacket where it doesn't.

    `mtu` is the tunnel's: what a segment's payload may at most be.
    """
    flags, gso_type, _, gso_size, csum_start, csum_offset = header
    if flags & ~(NEEDS_CSUM | DATA_VALID):
        raise MalformedPacket("vnet_flags")
    partial = flags & NEEDS_CSUM
    if partial:
        field = {TCP: tcp.CHECKSUM_OFFSET, UDP: 6}.get(packet.protocol)
        whole = not packet.fragment_offset and not packet.more_fragments
        if csum_start != packet.header_length or csum_offset != field or not whole:
            raise MalformedPacket("vnet_checksum")
    if gso_type == GSO_NONE:
        if not partial:
            return Header()
        return Header(NEEDS_CSUM, GSO_NONE, packet.payload_offset, 0, csum_start, csum_offset)
    if packet.protocol == UDP:
        return _validate_uso(header, packet, mtu)
    right_type = GSO_TCPV4 if packet.version == 4 else GSO_TCPV6
    if gso_type & ~GSO_ECN != right_type or packet.protocol != TCP:
        raise MalformedPacket("vnet_gso_type")
    # virtio 1.2, 5.1.6.2.1: a driver that sets a GSO type must set NEEDS_CSUM as well.
    if not partial:
        raise MalformedPacket("vnet_checksum")
    if not MINIMUM_GSO_SIZE <= gso_size <= mtu:
        raise MalformedPacket("vnet_gso_size")
    return Header(NEEDS_CSUM, gso_type, packet.payload_offset, gso_size, csum_start, csum_offset)


def _validate_uso(header: Header, packet: Packet, mtu: int) -> Header:
    flags, gso_type, _, gso_size, csum_start, csum_offset = header
    if gso_type != GSO_UDP_L4:
        raise MalformedPacket("vnet_gso_type")
    if not flags & NEEDS_CSUM:
        raise MalformedPacket("vnet_checksum")
    if not 0 < gso_size <= mtu - packet.payload_offset or packet.payload_length > MAXIMUM_DATAGRAMS * gso_size:
        raise MalformedPacket("vnet_gso_size")
    return Header(NEEDS_CSUM, gso_type, packet.payload_offset, gso_size, csum_start, csum_offset)


def admit_tcp4(buf: bytearray | memoryview, at: int, end: int, upper: int, mtu: int) -> int:
    """Checks the header at `at` in place and makes it normal; behind it, up to `end`, is IPv4 with TCP at offset `upper`.

    Checks as well what the kernel would stumble over and a known flow's packet isn't parsed for: that the IP length is the
    datagram's, and TCP's header inside. Returns the flags that are left: 1 where the checksum is partial, else 0.
    Raises MalformedPacket.
    """
    length = end - at - SIZE
    if length < upper + 20:
        raise MalformedPacket("truncated_l4")
    if buf[at + 12] << 8 | buf[at + 13] != length:
        raise MalformedPacket("bad_total_length")
    return _admit_tcp(buf, at, length, upper, mtu, GSO_TCPV4)


def admit_tcp6(buf: bytearray | memoryview, at: int, end: int, upper: int, mtu: int) -> int:
    """As `admit_tcp4`, for IPv6."""
    length = end - at - SIZE
    if length < upper + 20:
        raise MalformedPacket("truncated_l4")
    if (buf[at + 14] << 8 | buf[at + 15]) + 40 != length:
        raise MalformedPacket("bad_total_length")
    return _admit_tcp(buf, at, length, upper, mtu, GSO_TCPV6)


def _admit_tcp(buf: bytearray | memoryview, at: int, length: int, upper: int, mtu: int, right_type: int) -> int:
    flags, gso_type, _, gso_size, csum_start, csum_offset = _read(buf, at)
    header_length = upper + (buf[at + upper + 22] >> 4 << 2)
    if not upper + 20 <= header_length <= length:
        raise MalformedPacket("bad_tcp_offset")
    if flags & NEEDS_CSUM:
        if flags > 3:
            raise MalformedPacket("vnet_flags")
        if csum_start != upper or csum_offset != 16:
            raise MalformedPacket("vnet_checksum")
        if gso_type == GSO_NONE:
            _write(buf, at, 1, 0, header_length, 0, upper, 16)
            return 1
        if gso_type & 0x7F != right_type:
            raise MalformedPacket("vnet_gso_type")
        if not 536 <= gso_size <= mtu:
            raise MalformedPacket("vnet_gso_size")
        _write(buf, at, 1, gso_type, header_length, gso_size, upper, 16)
        return 1
    if flags & ~DATA_VALID:
        raise MalformedPacket("vnet_flags")
    if gso_type:
        raise MalformedPacket("vnet_gso_type" if gso_type & 0x7F != right_type else "vnet_checksum")
    buf[at : at + SIZE] = ZERO
    return 0
