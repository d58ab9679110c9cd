"""ICMP (RFC 792) and ICMPv6 (RFC 4443): types, codes, and which messages are errors."""

from __future__ import annotations

from enum import Enum
from struct import Struct
from typing import Final, NamedTuple

from falkirk.wire.checksum import Buffer
from falkirk.wire.malformed import MalformedPacket

HEADER: Final = 8
CHECKSUM_OFFSET: Final = 2

ECHO_REPLY4: Final = 0
UNREACHABLE4: Final = 3
FRAGMENTATION_NEEDED4: Final = 4
"""A code of UNREACHABLE4."""
SOURCE_QUENCH4: Final = 4
REDIRECT4: Final = 5
ECHO4: Final = 8
TIME_EXCEEDED4: Final = 11
PARAMETER_PROBLEM4: Final = 12

UNREACHABLE6: Final = 1
PACKET_TOO_BIG6: Final = 2
TIME_EXCEEDED6: Final = 3
PARAMETER_PROBLEM6: Final = 4
ECHO6: Final = 128
ECHO_REPLY6: Final = 129
REDIRECT6: Final = 137

ERRORS4: Final = frozenset((UNREACHABLE4, SOURCE_QUENCH4, REDIRECT4, TIME_EXCEEDED4, PARAMETER_PROBLEM4))
"""RFC 1122 3.2.2: types that quote a packet."""

_HEADER: Final = Struct(">BBHHH")


class Unreachable(Enum):
    """Why a destination can't be reached: (ICMP code of type 3, ICMPv6 type, ICMPv6 code)."""

    NET = (0, UNREACHABLE6, 0)
    """No route."""
    HOST = (1, UNREACHABLE6, 3)
    PROTOCOL = (2, PARAMETER_PROBLEM6, 1)
    """RFC 4443 3.4: an unrecognised next header, the pointer on the field."""
    PORT = (3, UNREACHABLE6, 4)
    PROHIBITED = (13, UNREACHABLE6, 1)
    """RFC 1812 5.2.7.1: administratively."""


class Icmp(NamedTuple):
    """One header. `first` and `second` are its last four bytes: identifier and sequence of an echo, for example."""

    type: int
    code: int
    checksum: int
    first: int
    second: int


def parse(data: Buffer, at: int, available: int) -> Icmp:
    """The header at `at`, of whose message `available` bytes are there. Raises MalformedPacket."""
    if available < HEADER:
        raise MalformedPacket("truncated_l4")
    return Icmp._make(_HEADER.unpack_from(data, at))


def build(kind: int, code: int, rest: int) -> bytes:
    """A header whose checksum is zero; `rest` is its last four bytes."""
    return _HEADER.pack(kind, code, 0, rest >> 16, rest & 0xFFFF)


def is_error(version: int, kind: int) -> bool:
    """Whether a message of this type quotes a packet. A redirect counts: it must not be answered either."""
    if version == 4:
        return kind in ERRORS4
    return kind < 128 or kind == REDIRECT6


def is_echo(version: int, kind: int) -> bool:
    """Whether it is an echo or its reply, whose identifier stands where ports would."""
    return kind in (ECHO4, ECHO_REPLY4) if version == 4 else kind in (ECHO6, ECHO_REPLY6)
