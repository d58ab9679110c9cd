"""The four messages on the wire (5.4): little-endian fields at fixed offsets, in a UDP datagram each.

    initiation 148   type 1, sender 4, ephemeral 32, static 32+16, timestamp 12+16, mac1 16, mac2 16
    response    92   type 2, sender 4, receiver 4, ephemeral 32, nothing 0+16, mac1 16, mac2 16
    cookie      64   type 3, receiver 4, nonce 24, cookie 16+16
    data       32+   type 4, receiver 4, counter 8, packet n+16

The type is one byte and three reserved zeros, read here as one number.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

INITIATION: Final = 1
RESPONSE: Final = 2
COOKIE: Final = 3
DATA: Final = 4

INITIATION_SIZE: Final = 148
RESPONSE_SIZE: Final = 92
COOKIE_SIZE: Final = 64
DATA_OVERHEAD: Final = 32
"""Bytes that a data message has beside its packet and padding; a keepalive is nothing else."""
DATA_HEADER_SIZE: Final = 16
MAC_SIZE: Final = 16
KEY_SIZE: Final = 32
TAG_SIZE: Final = 16
TIMESTAMP_SIZE: Final = 12
NONCE_SIZE: Final = 24
"""Of a cookie reply."""

HEADER: Final = Struct("<II")
"""Type, then the sender's or the receiver's index."""
RESPONSE_HEADER: Final = Struct("<III")
"""Type, sender, receiver."""
DATA_HEADER: Final = Struct("<IIQ")
"""Type, receiver, counter."""
NONCE: Final = Struct("<4xQ")
"""A data message's counter as the cipher's nonce (5.4.6)."""

MAC_OFFSETS: Final = {INITIATION: INITIATION_SIZE - 2 * MAC_SIZE, RESPONSE: RESPONSE_SIZE - 2 * MAC_SIZE}
"""Where mac1 is; mac2 follows it."""
SIZES: Final = {INITIATION: INITIATION_SIZE, RESPONSE: RESPONSE_SIZE, COOKIE: COOKIE_SIZE}
"""Sizes of the messages that have one."""

NO_MAC: Final = bytes(MAC_SIZE)
"""mac2 of whoever has no cookie."""

MAX_PACKET: Final = 65_507 - DATA_OVERHEAD - 20
"""The longest inner packet whose padded message is a datagram over IPv4; 20 are for IPv6's and other headers' sake."""
