"""What a flow is known by within its tunnel: its signature as bytes. PURE.

A lifted TCP flow's key is the 12 (IPv4) or 36 (IPv6) bytes of addresses and ports as they stand in the packet, so that the
fast path makes it by slicing. Every other flow's key is the same bytes and one more, the protocol's number: no key of another
protocol is ever as long as one of these, and the fast path finds lifted TCP flows only. Where a protocol has no ports they
are zero; an ICMP echo's identifier stands where the source port would, and its destination port is zero.
"""

from __future__ import annotations

from typing import NamedTuple

from falkirk.wire.protocol import TCP


class Signature(NamedTuple):
    """A key, taken apart. Addresses are packed, 4 or 16 bytes."""

    protocol: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int


def key_of(protocol: int, source: bytes, destination: bytes, source_port: int, destination_port: int) -> bytes:
    """The key of a flow that isn't a lifted TCP one: 13 or 37 bytes."""
    return b"%b%b%b%b%c" % (
        source,
        destination,
        source_port.to_bytes(2, "big"),
        destination_port.to_bytes(2, "big"),
        protocol,
    )


def lift_key(source: bytes, destination: bytes, source_port: int, destination_port: int) -> bytes:
    """The key of a lifted TCP flow: 12 or 36 bytes."""
    return source + destination + source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")


def signature(key: bytes) -> Signature:
    """Any flow's key, taken apart."""
    length = len(key)
    at = length & ~1 if length & 1 else length
    protocol = key[-1] if length & 1 else TCP
    size = (at - 4) >> 1
    return Signature(
        protocol, key[:size], key[size : 2 * size], key[at - 4] << 8 | key[at - 3], key[at - 2] << 8 | key[at - 1]
    )
