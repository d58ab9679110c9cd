"""Packet captures as files: pcapng, as Wireshark and its kin read it (draft-ietf-opsawg-pcapng). PURE: bytes out.

A file is one section: its header, one description an interface, then a block a packet. Packets begin with their IP header
(LINKTYPE_RAW, 101), times are nanoseconds, and each block says what is known of its packet: a comment for people, the
direction (epb_flags), and how many packets the capture lost just before it (epb_dropcount).

Limit: one section, no name resolution, no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

LINKTYPE_RAW: Final = 101
SECTION: Final = 0x0A0D0D0A
INTERFACE: Final = 1
PACKET: Final = 6
BYTE_ORDER: Final = 0x1A2B3C4D
UNKNOWN_LENGTH: Final = 0xFFFF_FFFF_FFFF_FFFF
"""Of a section that is still being written."""
_SECTION: Final = Struct("<IHHQ")
_INTERFACE: Final = Struct("<HHI")
_PACKET: Final = Struct("<IIIII")
_OPTION: Final = Struct("<HH")
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")
_END: Final = _OPTION.pack(0, 0)
COMMENT: Final = 1
USER_APPLICATION: Final = 4
IF_NAME: Final = 2
IF_DESCRIPTION: Final = 3
IF_TSRESOL: Final = 9
EPB_FLAGS: Final = 2
EPB_DROPCOUNT: Final = 4
INBOUND: Final = 1
OUTBOUND: Final = 2
MAX_OPTION: Final = 0xFFFF


def header(application: str, interfaces: Sequence[tuple[str, str]], snaplen: int) -> bytes:
    """The head of a file: `interfaces` are names with descriptions, numbered from 0; `snaplen` 0 is no limit."""
    options = _option(USER_APPLICATION, application.encode()) + _END
    parts = [_block(SECTION, _SECTION.pack(BYTE_ORDER, 1, 0, UNKNOWN_LENGTH) + options)]
    for name, description in interfaces:
        options = (
            _option(IF_NAME, name.encode())
            + _option(IF_DESCRIPTION, description.encode())
            + _option(IF_TSRESOL, b"\x09")  # 10^-9 s
            + _END
        )
        parts.append(_block(INTERFACE, _INTERFACE.pack(LINKTYPE_RAW, 0, snaplen) + options))
    return b"".join(parts)


def packet(
    interface: int, time: int, data: bytes, length: int, *, inbound: bool, comment: str = "", lost: int = 0
) -> bytes:
    """A packet of `length` bytes, of which `data` was kept; `time` is wall-clock nanoseconds."""
    options = _option(EPB_FLAGS, _U32.pack(INBOUND if inbound else OUTBOUND))
    if comment:
        options += _option(COMMENT, comment.encode()[:MAX_OPTION])
    if lost:
        options += _option(EPB_DROPCOUNT, _U64.pack(lost))
    head = _PACKET.pack(interface, time >> 32, time & 0xFFFFFFFF, len(data), length)
    return _block(PACKET, head + _padded(data) + options + _END)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + _padded(value)


def _block(kind: int, body: bytes) -> bytes:
    # The length stands at both ends, so that a file can be read backwards.
    length = _U32.pack(len(body) + 12)
    return _U32.pack(kind) + length + body + length
