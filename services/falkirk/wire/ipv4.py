"""IPv4 headers (RFC 791). Strict: what isn't exactly right isn't a packet.

Options are checked for their lengths and otherwise left alone; source routes are refused (RFC 7126 4.3, 4.4), since they
would lead a packet around its tunnel's address check.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from falkirk.wire.checksum import Buffer, checksum, residue
from falkirk.wire.malformed import MalformedPacket

MINIMUM: Final = 20
DONT_FRAGMENT: Final = 0x4000
MORE_FRAGMENTS: Final = 0x2000

_HEADER: Final = Struct(">BBHHHBBH4s4s")
_END_OF_OPTIONS: Final = 0
_NO_OPERATION: Final = 1
_LOOSE_SOURCE_ROUTE: Final = 131
_STRICT_SOURCE_ROUTE: Final = 137


class Ipv4(NamedTuple):
    """One header; lengths in bytes."""

    header_length: int
    traffic_class: int
    total_length: int
    identification: int
    dont_fragment: bool
    more_fragments: bool
    fragment_offset: int
    """In bytes."""
    ttl: int
    protocol: int
    source: bytes
    destination: bytes


def parse(data: Buffer, at: int, available: int, *, quoted: bool = False) -> Ipv4:
    """The header at `at`, of whose packet `available` bytes are there.

    `quoted` is for a packet inside an ICMP error, which may be cut short behind its header. Raises MalformedPacket.
    """
    if available < MINIMUM:
        raise MalformedPacket("too_short")
    first, tos, total, identification, fragment, ttl, protocol, _, source, destination = _HEADER.unpack_from(data, at)
    if first >> 4 != 4:
        raise MalformedPacket("bad_version")
    header_length = (first & 15) << 2
    if header_length < MINIMUM or header_length > available:
        raise MalformedPacket("bad_header_length")
    if total < header_length or (total > available and not quoted):
        raise MalformedPacket("bad_total_length")
    if residue(memoryview(data)[at : at + header_length]):
        raise MalformedPacket("bad_ip_checksum")
    if header_length > MINIMUM:
        _check_options(data, at + MINIMUM, at + header_length)
    return Ipv4(
        header_length,
        tos,
        total,
        identification,
        fragment & DONT_FRAGMENT != 0,
        fragment & MORE_FRAGMENTS != 0,
        (fragment & 0x1FFF) << 3,
        ttl,
        protocol,
        source,
        destination,
    )


def _check_options(data: Buffer, at: int, end: int) -> None:
    while at < end:
        kind = data[at]
        if kind == _END_OF_OPTIONS:
            return
        if kind == _NO_OPERATION:
            at += 1
            continue
        if at + 1 >= end or data[at + 1] < 2 or at + data[at + 1] > end:
            raise MalformedPacket("bad_ip_options")
        if kind in (_LOOSE_SOURCE_ROUTE, _STRICT_SOURCE_ROUTE):
            raise MalformedPacket("source_route")
        at += data[at + 1]


def build(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload_length: int,
    *,
    ttl: int = 64,
    traffic_class: int = 0,
    identification: int = 0,
) -> bytes:
    """A header without options, DF set, so an identification of 0 is right (RFC 6864 4.1)."""
    total = MINIMUM + payload_length
    header = bytearray(
        _HEADER.pack(0x45, traffic_class, total, identification, DONT_FRAGMENT, ttl, protocol, 0, source, destination)
    )
    header[10:12] = checksum(header).to_bytes(2, "big")
    return bytes(header)
