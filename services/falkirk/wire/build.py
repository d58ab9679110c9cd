"""Packets that Falkirk itself answers with: TCP resets and ICMP errors.

Every function takes the parsed packet that is answered and returns a whole packet with complete checksums, or None where
the rules say that nothing may be sent. The answer's TTL is 64, its identification 0 (DF is set, RFC 6864).

Errors quote as much as fits in 576 bytes (RFC 1812 4.3.2.3) or 1,280 (RFC 4443 2.4 c). A quoted packet that came behind a vnet
header is quoted as it came: with a partial checksum, and as the super-packet that it was.

Limit: rate limits of errors (RFC 4443 2.4 f) are the caller's.
"""

from __future__ import annotations

from typing import Final

from falkirk.wire import icmp, ipv4, ipv6, tcp
from falkirk.wire.checksum import Buffer, checksum, pseudo_header
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import Packet
from falkirk.wire.protocol import FRAGMENT, ICMP, ICMPV6, TCP

MAX_ERROR4: Final = 576
MAX_ERROR6: Final = 1280
IN_TRANSIT: Final = 0
"""Code of a time that was exceeded: by hops, or (REASSEMBLY) by fragments that didn't come."""
REASSEMBLY: Final = 1
_NOWHERE6: Final = (bytes(16), bytes(15) + b"\x01")


def segment(
    source: bytes,
    destination: bytes,
    source_port: int,
    destination_port: int,
    sequence: int,
    acknowledgment: int,
    flags: int,
    window: int = 0,
) -> bytes:
    """A TCP segment without options and payload. Addresses are packed, 4 or 16 bytes both."""
    header = bytearray(tcp.build(source_port, destination_port, sequence, acknowledgment, flags, window))
    check = checksum(header, pseudo_header(source, destination, TCP, len(header)))
    header[tcp.CHECKSUM_OFFSET : tcp.CHECKSUM_OFFSET + 2] = check.to_bytes(2, "big")
    if len(source) == 4:
        return ipv4.build(source, destination, TCP, len(header)) + header
    return ipv6.build(source, destination, TCP, len(header)) + header


def reset(packet: Packet) -> bytes | None:
    """The RST for a segment that no connection wants (RFC 9293 3.10.7.1); None for a RST, for what isn't TCP,
    or where either address isn't one host's.

    It comes from the address that the segment was meant for.
    """
    if packet.protocol != TCP or packet.flags & tcp.RST:
        return None
    # RFC 1122 4.2.3.10: a segment to many addresses, or from what isn't one host's, is silently dropped.
    if not (_may_answer4(packet) if packet.version == 4 else _may_answer6(packet, icmp.UNREACHABLE6)):
        return None
    if packet.flags & tcp.ACK:
        sequence, acknowledgment, flags = packet.acknowledgment, 0, tcp.RST
    else:
        sequence, acknowledgment = 0, (packet.sequence + packet.segment_length) & 0xFFFFFFFF
        flags = tcp.RST | tcp.ACK
    return segment(
        packet.destination,
        packet.source,
        packet.destination_port,
        packet.source_port,
        sequence,
        acknowledgment,
        flags,
    )


def unreachable(data: Buffer, packet: Packet, why: Unreachable, source: bytes) -> bytes | None:
    """Destination unreachable from `source`, an address of the packet's family; None where no error may be sent."""
    code4, type6, code6 = why.value
    if packet.version == 4:
        return _error(data, packet, icmp.UNREACHABLE4, code4, 0, source)
    pointer = _next_header_pointer(data, packet) if why is Unreachable.PROTOCOL else 0
    return _error(data, packet, type6, code6, pointer, source)


def time_exceeded(data: Buffer, packet: Packet, source: bytes, code: int = IN_TRANSIT) -> bytes | None:
    """TTL or hop limit exceeded in transit; or, with REASSEMBLY, the first fragment's rest didn't come."""
    kind = icmp.TIME_EXCEEDED4 if packet.version == 4 else icmp.TIME_EXCEEDED6
    return _error(data, packet, kind, code, 0, source)


def parameter_problem6(data: Buffer, packet: Packet, pointer: int, source: bytes) -> bytes | None:
    """An IPv6 header field, `pointer` bytes into the packet, is wrong: RFC 4443 3.4, code 0."""
    return _error(data, packet, icmp.PARAMETER_PROBLEM6, 0, pointer, source)


def too_big(data: Buffer, packet: Packet, mtu: int, source: bytes) -> bytes | None:
    """Fragmentation needed (RFC 1191 4) or packet too big (RFC 4443 3.2); `mtu` is the next hop's, in bytes."""
    if packet.version == 4:
        return _error(data, packet, icmp.UNREACHABLE4, icmp.FRAGMENTATION_NEEDED4, min(mtu, 0xFFFF), source)
    return _error(data, packet, icmp.PACKET_TOO_BIG6, 0, mtu, source)


def _error(data: Buffer, packet: Packet, kind: int, code: int, rest: int, source: bytes) -> bytes | None:
    four = packet.version == 4
    if not (_may_answer4(packet) if four else _may_answer6(packet, kind)):
        return None
    room = MAX_ERROR4 - ipv4.MINIMUM if four else MAX_ERROR6 - ipv6.MINIMUM
    quoted = min(packet.total_length, room - icmp.HEADER)
    message = bytearray(icmp.build(kind, code, rest))
    message += memoryview(data)[packet.at : packet.at + quoted]
    # RFC 1812 4.3.2.5: precedence 6 (internetwork control).
    return icmp_packet(message, source, packet.source, traffic_class=0xC0 if four else 0)


def icmp_packet(
    message: bytearray, source: bytes, destination: bytes, *, ttl: int = 64, traffic_class: int = 0
) -> bytes:
    """An ICMP or ICMPv6 message behind an IP header of its family; the message's checksum is zero, and filled in here."""
    four = len(source) == 4
    initial = 0 if four else pseudo_header(source, destination, ICMPV6, len(message))
    message[icmp.CHECKSUM_OFFSET : icmp.CHECKSUM_OFFSET + 2] = checksum(message, initial).to_bytes(2, "big")
    if four:
        return ipv4.build(source, destination, ICMP, len(message), ttl=ttl, traffic_class=traffic_class) + message
    return ipv6.build(source, destination, ICMPV6, len(message), hop_limit=ttl, traffic_class=traffic_class) + message


def _may_answer4(packet: Packet) -> bool:
    """RFC 1812 4.3.2.7: not about an error, a later fragment, to many, or from nobody in particular."""
    source, destination = packet.source[0], packet.destination[0]
    return not (
        packet.is_icmp_error or packet.fragment_offset or destination >= 224 or source >= 224 or source in (0, 127)
    )


def _may_answer6(packet: Packet, kind: int) -> bool:
    """RFC 4443 2.4 e: likewise; too big and parameter problem code 2 alone may be about a multicast destination."""
    return not (
        packet.is_icmp_error
        # A router says of the first fragment what there is to say; of a wrong later one only that it is wrong.
        or (packet.fragment_offset and kind != icmp.PARAMETER_PROBLEM6)
        or (packet.destination[0] == 0xFF and kind != icmp.PACKET_TOO_BIG6)
        or packet.source[0] == 0xFF
        or packet.source in _NOWHERE6
    )


def _next_header_pointer(data: Buffer, packet: Packet) -> int:
    """The offset of the next-header field that names the upper layer (RFC 4443 3.4)."""
    pointer, at = 6, ipv6.MINIMUM
    while at < packet.header_length:
        following = data[packet.at + pointer]
        pointer = at
        at += 8 if following == FRAGMENT else (data[packet.at + at + 1] + 1) << 3
    return pointer
