"""Fragments of IPv4 (RFC 791 3.2) and IPv6 (RFC 8200 4.5): what a fragment is a piece of, a packet of its pieces, pieces of a packet.

`piece` looks at one fragment by itself and refuses what no sender needs to make:

- a length that isn't a multiple of 8 though more follows, or nothing at all (RFC 8200 4.5, RFC 791 3.2);
- an end beyond 65,535 bytes, the ping of death (RFC 8200 4.5);
- a TCP segment whose second fragment begins inside the fixed header (RFC 1858 4, RFC 3128), where a filter that looked at
  the first one has seen less than all of it. That the first one holds the whole header chain (RFC 7112 5) is `parse`'s to see.

`assemble` and `cut` are each other's opposite. What was put together has no DF: whoever let it be fragmented once has nothing against
a second time. `cut` copies the IPv4 options that say so to every fragment (RFC 791 3.1), and puts the IPv6 fragment header behind what
routers look at.

Limits: an IPv6 header chain of more than 500 bytes may not fit the first fragment of a link below 1,280 bytes; nobody makes either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from falkirk.wire import ipv4, ipv6
from falkirk.wire.checksum import Buffer, checksum
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import Packet
from falkirk.wire.protocol import DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING, TCP

MAX_LENGTH: Final = 65535
"""Of an IPv4 packet, and of an IPv6 packet's payload."""
HEADER6: Final = 8
"""Bytes of an IPv6 fragment header."""
_COPIED: Final = 0x80
"""The bit of an IPv4 option's kind that has it in every fragment."""
_CONGESTED: Final = 3
"""RFC 3168 5: the ECN field CE; 0 is not ECN-capable."""


class Piece(NamedTuple):
    """One fragment. Offsets of data are in bytes of what is being put together."""

    key: bytes
    """What belongs together has the same: addresses and identification, with IPv4 the protocol too (RFC 791 2.3; RFC 8200 4.5 says
    that with IPv6 it may differ)."""
    offset: int
    end: int
    more: bool
    """It isn't the last."""
    packet: bytes
    """The fragment as it came."""
    start: int
    """Where its data begin in `packet`."""
    pointer: int
    """IPv6: where in `packet` the field is that names the fragment header."""

    @property
    def data(self) -> bytes:
        """What it brings."""
        return self.packet[self.start :]


def piece(data: Buffer, packet: Packet) -> Piece:
    """The fragment `packet`, which was parsed with `fragments`.

    Raises MalformedPacket: fragment_length, fragment_too_long or fragment_tiny.
    """
    at = packet.at
    if packet.version == 4:
        start, pointer, before = packet.header_length, 0, packet.header_length
        identity = bytes((packet.protocol,)) + packet.identification.to_bytes(2, "big")
    else:
        start, pointer = fragment_header(data, at)
        before = start - HEADER6 - ipv6.MINIMUM
        identity = packet.identification.to_bytes(4, "big")
    offset = packet.fragment_offset
    length = packet.total_length - start
    if length <= 0 or (packet.more_fragments and length & 7):
        raise MalformedPacket("fragment_length")
    if before + offset + length > MAX_LENGTH:
        raise MalformedPacket("fragment_too_long")
    # RFC 3128 2.1: at an offset of 8 it has TCP's flags, and a filter that saw ports only has let the first one by.
    if 0 < offset < 20 and packet.protocol == TCP:
        raise MalformedPacket("fragment_tiny")
    return Piece(
        packet.source + packet.destination + identity,
        offset,
        offset + length,
        packet.more_fragments,
        bytes(memoryview(data)[at : at + packet.total_length]),
        start,
        pointer,
    )


def fragment_header(data: Buffer, at: int) -> tuple[int, int]:
    """(what follows the fragment header, the field that names it), counted from `at`; the packet has been parsed."""
    pointer, here = 6, ipv6.MINIMUM
    while data[at + pointer] != FRAGMENT:
        pointer = here
        here += (data[at + here + 1] + 1) << 3
    return here + HEADER6, pointer


def assemble(pieces: Sequence[Piece]) -> bytes:
    """The packet of these pieces: in order, without gaps, from offset 0 to the last.

    Raises MalformedPacket: fragment_too_long where it doesn't fit behind the first one's header, fragment_ecn where
    some say that the path was congested and others that it can't say so (RFC 3168 5.3).
    """
    first = pieces[0]
    body = b"".join([each.data for each in pieces])
    congested = _congested(pieces)
    if first.packet[0] >> 4 == 4:
        head = bytearray(first.packet[: first.start])
        total = len(head) + len(body)
        if total > MAX_LENGTH:
            raise MalformedPacket("fragment_too_long")
        head[1] |= congested
        head[2:4] = total.to_bytes(2, "big")
        head[6:8] = b"\0\0"
        head[10:12] = b"\0\0"
        head[10:12] = checksum(head).to_bytes(2, "big")
        return bytes(head) + body
    # RFC 8200 4.5: the headers of the first fragment, and the next header that its fragment header names.
    head = bytearray(first.packet[: first.start - HEADER6])
    length = len(head) - ipv6.MINIMUM + len(body)
    if length > MAX_LENGTH:
        raise MalformedPacket("fragment_too_long")
    head[first.pointer] = first.packet[first.start - HEADER6]
    head[1] |= congested << 4
    head[4:6] = length.to_bytes(2, "big")
    return bytes(head) + body


def _congested(pieces: Sequence[Piece]) -> int:
    """The ECN field to add: CE where any fragment has it."""
    marks = {_ecn(each.packet) for each in pieces}
    if _CONGESTED not in marks:
        return 0
    if 0 in marks:
        raise MalformedPacket("fragment_ecn")
    return _CONGESTED


def _ecn(packet: bytes) -> int:
    return packet[1] & 3 if packet[0] >> 4 == 4 else packet[1] >> 4 & 3


def cut(packet: bytes, mtu: int, identification: int | None = None) -> list[bytes]:
    """The fragments of a packet on a link that takes `mtu` bytes; the packet itself where it fits.

    `identification` is theirs; with IPv4 None keeps the packet's own, which a router must (RFC 791 3.2); with IPv6 it is
    needed, and must not come again between these addresses for a while (RFC 8200 4.5) nor be guessed (RFC 7739). Whether
    the packet may be fragmented at all is the caller's to know. Raises ValueError where the link takes no 8 bytes of data.
    """
    if len(packet) <= mtu:
        return [packet]
    return _cut4(packet, mtu, identification) if packet[0] >> 4 == 4 else _cut6(packet, mtu, identification)


def _cut4(packet: bytes, mtu: int, identification: int | None) -> list[bytes]:
    size = (packet[0] & 15) << 2
    head = bytearray(packet[:size])
    if identification is not None:
        head[4:6] = (identification & 0xFFFF).to_bytes(2, "big")
    word = head[6] << 8 | head[7]
    offset = (word & 0x1FFF) << 3
    last_word = word & ipv4.MORE_FRAGMENTS
    made = []
    at = size
    while at < len(packet):
        room = _room(mtu, len(head))
        stop = min(at + room, len(packet))
        following = last_word if stop == len(packet) else ipv4.MORE_FRAGMENTS
        head[2:4] = (len(head) + stop - at).to_bytes(2, "big")
        head[6:8] = (following | offset >> 3).to_bytes(2, "big")
        head[10:12] = b"\0\0"
        head[10:12] = checksum(head).to_bytes(2, "big")
        made.append(bytes(head) + packet[at:stop])
        offset += stop - at
        if at == size and size > ipv4.MINIMUM:
            head = _copied(head)
        at = stop
    return made


def _copied(head: bytearray) -> bytearray:
    """The header of fragments other than the first: without the options that aren't copied."""
    options = bytearray()
    at = ipv4.MINIMUM
    # The parser has seen that lengths are right.
    while at < len(head) and head[at]:
        length = 1 if head[at] == 1 else head[at + 1]
        if head[at] & _COPIED:
            options += head[at : at + length]
        at += length
    options += bytes(-len(options) % 4)
    short = head[: ipv4.MINIMUM] + options
    short[0] = 0x40 | len(short) >> 2
    return short


def _cut6(packet: bytes, mtu: int, identification: int | None) -> list[bytes]:
    if identification is None:
        raise ValueError("IPv6 fragments need an identification")
    end, pointer = _per_fragment(packet)
    head = bytearray(packet[:end])
    following, head[pointer] = head[pointer], FRAGMENT
    number = (identification & 0xFFFFFFFF).to_bytes(4, "big")
    room = _room(mtu, end + HEADER6)
    made = []
    for at in range(end, len(packet), room):
        part = packet[at : at + room]
        head[4:6] = (end - ipv6.MINIMUM + HEADER6 + len(part)).to_bytes(2, "big")
        word = at - end | (at + room < len(packet))
        made.append(b"".join((head, bytes((following, 0)), word.to_bytes(2, "big"), number, part)))
    return made


def _per_fragment(packet: bytes) -> tuple[int, int]:
    """(end of the headers that each fragment has, the field that names what follows them).

    RFC 8200 4.5: up to the routing header if there is one, else the hop-by-hop options; the packet has been parsed.
    """
    pointer, here = 6, ipv6.MINIMUM
    found = (here, pointer)
    while packet[pointer] in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
        kind, pointer = packet[pointer], here
        here += (packet[here + 1] + 1) << 3
        if kind != DESTINATION_OPTIONS:
            found = (here, pointer)
    return found


def _room(mtu: int, header_length: int) -> int:
    room = (mtu - header_length) & ~7
    if room < 8:
        raise ValueError(f"no fragment fits {mtu} bytes")
    return room
