"""A whole IP packet, parsed once into a value that nobody has to check again. This is the slow path.

The packet loop knows its flows by slices of bytes and comes here for what it doesn't know: the first packet of a flow,
one with options or extension headers, or a bad one. `parse` looks at the IP header (checksum, lengths, options), walks
IPv6 extension headers and looks at the TCP, UDP or ICMP header. The upper layer's checksum is apart (`verify`), since it
costs as much as all the rest and is only *partial* behind a vnet header.

Fragments are refused unless asked for (`falkirk.wire.fragments` puts them together). The first one must hold the whole chain of
headers up to and with the upper layer's (RFC 7112 5; for IPv4 RFC 1858 asks the same of TCP), else it is `fragment_tiny`. An IPv6
fragment header on a packet that isn't a fragment (RFC 6946) is walked like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from falkirk.wire import icmp, ipv4, ipv6, tcp
from falkirk.wire.checksum import Buffer, pseudo_header, residue
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP

UDP_HEADER = 8

_Fields = tuple[int, int, int, int, int, bytes, bytes, int, int, bool, int, bool, int]
"""What a Packet begins with: all that is in the IP header."""
_CUT: Final = ("truncated_l4", "bad_tcp_offset")
"""What is wrong with an upper layer's header that is longer than the first fragment."""


class Packet(msgspec.Struct, frozen=True, gc=False):
    """Where everything is. `at` is absolute in the buffer; other offsets count from `at`; lengths are in bytes."""

    version: int
    at: int
    total_length: int
    """The IP packet's, header included."""
    header_length: int
    """Of IP, options or extension headers included: the upper layer's offset."""
    protocol: int
    """The upper layer's: TCP, UDP, ICMP, ICMPV6 or what else the header says."""
    source: bytes
    """4 or 16 bytes."""
    destination: bytes
    ttl: int
    traffic_class: int
    dont_fragment: bool
    """Always true for IPv6."""
    fragment_offset: int = 0
    more_fragments: bool = False
    identification: int = 0
    payload_offset: int = 0
    """Of the upper layer's payload; of the upper layer where its header isn't known."""
    source_port: int = 0
    """TCP and UDP."""
    destination_port: int = 0
    sequence: int = 0
    """TCP's, or that of an ICMP echo."""
    acknowledgment: int = 0
    flags: int = 0
    """TCP's low eight, see `falkirk.wire.tcp`."""
    window: int = 0
    icmp_type: int = -1
    """-1 where it isn't ICMP or ICMPv6."""
    icmp_code: int = -1
    identifier: int = 0
    """Of an ICMP echo or its reply."""

    @property
    def payload_length(self) -> int:
        """Bytes behind the upper layer's header."""
        return self.total_length - self.payload_offset

    @property
    def segment_length(self) -> int:
        """SEG.LEN of RFC 9293 3.4: payload, and one each for SYN and FIN."""
        return self.total_length - self.payload_offset + (self.flags >> 1 & 1) + (self.flags & 1)

    @property
    def is_fragment(self) -> bool:
        """Whether the rest of it comes in other packets."""
        return self.more_fragments or self.fragment_offset != 0

    @property
    def is_icmp_error(self) -> bool:
        """Whether it quotes another packet."""
        return self.icmp_type >= 0 and icmp.is_error(self.version, self.icmp_type)


def split(data: Buffer, length: int, at: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, length) of each packet in a raw datagram, from `at` up to `length`.

    Only versions and lengths are looked at. Raises MalformedPacket at the first packet that doesn't say where it ends;
    what was yielded before is good, and nothing behind it can be found.
    """
    while at < length:
        version = data[at] >> 4
        if version == 4:
            if length - at < ipv4.MINIMUM:
                raise MalformedPacket("too_short")
            size = data[at + 2] << 8 | data[at + 3]
            # At least a header, so every turn moves on.
            if size < ipv4.MINIMUM:
                raise MalformedPacket("bad_total_length")
        elif version == 6:
            if length - at < ipv6.MINIMUM:
                raise MalformedPacket("too_short")
            size = ipv6.MINIMUM + (data[at + 4] << 8 | data[at + 5])
        else:
            raise MalformedPacket("bad_version")
        if size > length - at:
            raise MalformedPacket("bad_total_length")
        yield at, size
        at += size


def parse(data: Buffer, at: int, length: int, *, fragments: bool = False) -> Packet:
    """The packet in `length` bytes from `at`; it may be shorter than they are (padding), never longer.

    With `fragments` a fragment is parsed too; one that isn't the first has nothing above IP. Raises MalformedPacket.
    """
    if length < 1:
        raise MalformedPacket("too_short")
    version = data[at] >> 4
    if version == 4:
        head = ipv4.parse(data, at, length)
        fields = (
            version,
            at,
            head.total_length,
            head.header_length,
            head.protocol,
            head.source,
            head.destination,
            head.ttl,
            head.traffic_class,
            head.dont_fragment,
            head.fragment_offset,
            head.more_fragments,
            head.identification,
        )
    elif version == 6:
        six = ipv6.parse(data, at, length)
        fields = (
            version,
            at,
            six.total_length,
            six.header_length,
            six.protocol,
            six.source,
            six.destination,
            six.hop_limit,
            six.traffic_class,
            True,
            six.fragment_offset,
            six.more_fragments,
            six.identification,
        )
    else:
        raise MalformedPacket("bad_version")
    header_length, offset, more = fields[3], fields[10], fields[11]
    if offset or more:
        if not fragments:
            raise MalformedPacket("fragment")
        if offset:
            return Packet(*fields, payload_offset=header_length)
        try:
            return _upper(data, fields)
        except MalformedPacket as error:
            raise MalformedPacket("fragment_tiny" if error.reason in _CUT else error.reason) from error
    return _upper(data, fields)


def _upper(data: Buffer, fields: _Fields) -> Packet:
    """The packet with what is above IP."""
    version, at, total, header_length, protocol = fields[:5]
    more = fields[11]
    upper = at + header_length
    available = total - header_length
    if protocol == TCP:
        segment = tcp.parse(data, upper, available)
        return Packet(
            *fields,
            header_length + segment.header_length,
            segment.source_port,
            segment.destination_port,
            segment.sequence,
            segment.acknowledgment,
            segment.flags,
            segment.window,
        )
    if protocol == UDP:
        return _udp(data, upper, available, more, fields)
    if protocol == (ICMP if version == 4 else ICMPV6):
        message = icmp.parse(data, upper, available)
        echo = icmp.is_echo(version, message.type)
        return Packet(
            *fields,
            payload_offset=header_length + icmp.HEADER,
            icmp_type=message.type,
            icmp_code=message.code,
            identifier=message.first if echo else 0,
            sequence=message.second if echo else 0,
        )
    return Packet(*fields, payload_offset=header_length)


def _udp(data: Buffer, upper: int, available: int, more: bool, fields: _Fields) -> Packet:
    if available < UDP_HEADER:
        raise MalformedPacket("truncated_l4")
    size = data[upper + 4] << 8 | data[upper + 5]
    if size < UDP_HEADER or (size > available and not more):
        raise MalformedPacket("bad_udp_length")
    return Packet(
        *fields,
        fields[3] + UDP_HEADER,
        data[upper] << 8 | data[upper + 1],
        data[upper + 2] << 8 | data[upper + 3],
    )


def verify(data: Buffer, packet: Packet) -> None:
    """Checks the checksum of TCP, UDP, ICMP or ICMPv6; other protocols and fragments pass.

    Not for a packet whose vnet header says NEEDS_CSUM. Raises MalformedPacket("bad_l4_checksum").
    """
    if packet.fragment_offset or packet.more_fragments:
        return
    protocol = packet.protocol
    start = packet.at + packet.header_length
    end = packet.at + packet.total_length
    if protocol == UDP:
        if data[start + 6] == 0 and data[start + 7] == 0:
            # RFC 768: none was made. RFC 8200 8.1: IPv6 has no such choice.
            if packet.version == 6:
                raise MalformedPacket("bad_l4_checksum")
            return
        end = start + (data[start + 4] << 8 | data[start + 5])
    if protocol in (TCP, UDP) or (protocol == ICMPV6 and packet.version == 6):
        initial = pseudo_header(packet.source, packet.destination, protocol, end - start)
    elif protocol == ICMP and packet.version == 4:
        initial = 0
    else:
        return
    if (residue(memoryview(data)[start:end]) + initial) % 0xFFFF:
        raise MalformedPacket("bad_l4_checksum")
