"""Packets as hosts send them, made of what one would say about them. PURE: for questions, never for the wire.

`probe` makes a whole packet with right checksums; `completed` gives one that was captured before its device had done so the checksums that
it would have left with.
"""

from __future__ import annotations

from typing import Final

from falkirk.wire import icmp, ipv4, ipv6, tcp
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import UDP_HEADER, parse
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP

WINDOW: Final = 65535
DONT_FRAGMENT: Final = 0x40
ECHO: Final = {ICMP: icmp.ECHO4, ICMPV6: icmp.ECHO6}
_FIELDS: Final = {TCP: tcp.CHECKSUM_OFFSET, UDP: 6, ICMP: 2, ICMPV6: 2}
"""Where the upper layer's checksum is in its header."""


def probe(
    protocol: int,
    source: bytes,
    destination: bytes,
    source_port: int = 0,
    destination_port: int = 0,
    *,
    ttl: int = 64,
    flags: int = tcp.SYN,
    length: int = 0,
    dont_fragment: bool = True,
) -> bytes:
    """A packet of a protocol's number. TCP has `flags`; ICMP is an echo request whose identifier is `source_port`; other protocols
    have no header. Zeros follow up to `length` bytes of packet, where that is more. Addresses are of one family.
    """
    four = len(source) == 4
    if protocol == TCP:
        acknowledgment = 1 if flags & tcp.ACK else 0
        upper = bytearray(tcp.build(source_port, destination_port, 1, acknowledgment, flags, WINDOW))
    elif protocol == UDP:
        upper = bytearray(UDP_HEADER)
        upper[:4] = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    elif protocol in ECHO:
        upper = bytearray(icmp.build(ECHO[protocol], 0, source_port << 16 | 1))
    else:
        upper = bytearray()
    upper += bytes(max(0, length - len(upper) - (ipv4.MINIMUM if four else ipv6.MINIMUM)))
    if protocol == UDP:
        upper[4:6] = len(upper).to_bytes(2, "big")
    head = bytearray((ipv4 if four else ipv6).build(source, destination, protocol, len(upper)))
    if four:
        head[6] = DONT_FRAGMENT if dont_fragment else 0
        head[8] = ttl
    else:
        head[7] = ttl
    return completed(bytes(head + upper))


def completed(data: bytes) -> bytes:
    """The packet with the checksums that it should have; as it is where it can't be read, or is a fragment."""
    made = bytearray(data)
    if len(made) >= ipv4.MINIMUM and made[0] >> 4 == 4:
        size = (made[0] & 15) << 2
        made[10:12] = bytes(2)
        made[10:12] = checksum(made[:size]).to_bytes(2, "big")
    try:
        packet = parse(made, 0, len(made), fragments=True)
    except MalformedPacket:
        return data
    field = _FIELDS.get(packet.protocol)
    if field is None or packet.is_fragment:
        return bytes(made)
    start, end = packet.header_length, packet.total_length
    made[start + field : start + field + 2] = bytes(2)
    initial = 0
    if packet.protocol != ICMP:
        initial = pseudo_header(packet.source, packet.destination, packet.protocol, end - start)
    value = checksum(made[start:end], initial)
    if packet.protocol == UDP:
        # RFC 768: zero says that none was made.
        value = value or 0xFFFF
    made[start + field : start + field + 2] = value.to_bytes(2, "big")
    return bytes(made)
