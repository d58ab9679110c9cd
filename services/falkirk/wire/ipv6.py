"""IPv6 headers (RFC 8200) and the walk through extension headers.

Walked: hop-by-hop options (only first, 4.1), destination options, routing headers with no segment left, one fragment
header. Refused: routing headers of type 0 (RFC 5095) or with segments left, since the address check and the checksum's
pseudo-header would mean another destination than the one in the header. Not walked, and so a packet's protocol as they
stand: AH and ESP (a rewritten address breaks the former's signature), mobility, HIP and others.

Limits: 8 extension headers and 512 bytes of them; no jumbograms (RFC 2675), a payload length of 0 is an empty payload.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.protocol import DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING

MINIMUM: Final = 40
MAX_EXTENSIONS: Final = 8
MAX_EXTENSION_BYTES: Final = 512

_HEADER: Final = Struct(">IHBB16s16s")
_FRAGMENT: Final = Struct(">BBHI")
_WALKED: Final = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS))


class Ipv6(NamedTuple):
    """One header with its extensions; lengths in bytes."""

    header_length: int
    """Up to the upper layer, extension headers included."""
    traffic_class: int
    flow_label: int
    total_length: int
    """40 plus the payload length."""
    hop_limit: int
    protocol: int
    source: bytes
    destination: bytes
    identification: int = 0
    more_fragments: bool = False
    fragment_offset: int = 0
    """In bytes."""


def parse(data: Buffer, at: int, available: int, *, quoted: bool = False) -> Ipv6:
    """The header at `at`, of whose packet `available` bytes are there.

    `quoted` is for a packet inside an ICMP error, which may be cut short behind its headers. Raises MalformedPacket.
    """
    if available < MINIMUM:
        raise MalformedPacket("too_short")
    first, payload_length, following, hop_limit, source, destination = _HEADER.unpack_from(data, at)
    if first >> 28 != 6:
        raise MalformedPacket("bad_version")
    total = MINIMUM + payload_length
    if total > available and not quoted:
        raise MalformedPacket("bad_total_length")
    traffic_class = first >> 20 & 0xFF
    if following not in _WALKED:
        return Ipv6(MINIMUM, traffic_class, first & 0xFFFFF, total, hop_limit, following, source, destination)
    end, following, identification, fragment = _walk(data, at, following, min(total, available))
    return Ipv6(
        end - at,
        traffic_class,
        first & 0xFFFFF,
        total,
        hop_limit,
        following,
        source,
        destination,
        identification,
        fragment & 1 != 0,
        fragment & 0xFFF8,
    )


def _walk(data: Buffer, start: int, following: int, available: int) -> tuple[int, int, int, int]:
    """(where the upper layer starts, its protocol, fragment identification, fragment word)."""
    at = start + MINIMUM
    end = start + available
    identification = fragment = 0
    fragmented = False
    for count in range(MAX_EXTENSIONS + 1):
        if following not in _WALKED:
            return at, following, identification, fragment
        if count == MAX_EXTENSIONS or at + 8 > end:
            raise MalformedPacket("bad_extension_header")
        if following == FRAGMENT:
            if fragmented:
                raise MalformedPacket("bad_extension_header")
            fragmented = True
            following, _, fragment, identification = _FRAGMENT.unpack_from(data, at)
            at += 8
            if fragment & 0xFFF8:
                # What follows belongs to the middle of the packet: there is nothing more to walk.
                return at, following, identification, fragment
            continue
        if following == HOP_BY_HOP and count:
            raise MalformedPacket("bad_extension_header")
        # RFC 5095: type 0 is refused whatever is left of it; the others where they still lead somewhere.
        if following == ROUTING and (data[at + 2] == 0 or data[at + 3] != 0):
            raise MalformedPacket("source_route")
        length = (data[at + 1] + 1) << 3
        following = data[at]
        at += length
        if at > end or at - start - MINIMUM > MAX_EXTENSION_BYTES:
            raise MalformedPacket("bad_extension_header")
    raise MalformedPacket("bad_extension_header")


def build(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload_length: int,
    *,
    hop_limit: int = 64,
    traffic_class: int = 0,
) -> bytes:
    """A header without extensions and with flow label 0."""
    return _HEADER.pack(6 << 28 | traffic_class << 20, payload_length, protocol, hop_limit, source, destination)
