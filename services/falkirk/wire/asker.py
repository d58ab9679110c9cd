"""Who asks the resolver: the first thing it hears on a connection, before any question. PURE.

The flow worker writes it for a flow whose route leads to the tenant's resolver; the upgrader worker, which makes the connection, passes it
on unread. Two roads lead to the resolver's process, both unix sockets of `mesh/`: a SEQPACKET socket for UDP, where the first datagram is
the asker and each other one a DNS message, and a stream socket for TCP, where the asker stands behind its length (four bytes, big endian) and
the client's own bytes follow (RFC 1035 4.2.2).

Limit: 64 KiB; what is longer, or of another version, is refused.
"""

from __future__ import annotations

from typing import Final

import msgspec

from falkirk.wire.context import TunnelContext

VERSION: Final = 1
DATAGRAMS: Final = "router.resolver.sock"
"""The SEQPACKET socket's name in `mesh/`."""
STREAMS: Final = "router.resolver.stream.sock"
"""The stream socket's name in `mesh/`."""
LENGTH: Final = 4
"""Bytes of the length on a stream."""
MAX: Final = 64 * 1024


class Asker(msgspec.Struct, frozen=True, array_like=True):
    """Whose questions follow."""

    flow_id: bytes
    """16 bytes."""
    protocol: int
    """17 for UDP, 6 for TCP: the road must be the protocol's."""
    source: bytes
    """The device's address, packed."""
    source_port: int
    destination: bytes
    """The resolver's own address, as it was asked: packed."""
    context: TunnelContext
    version: int = VERSION


class NotAnAsker(ValueError):
    """The bytes aren't an asker of this version; the mesh's fault, never a device's."""


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Asker)


def encode(asker: Asker) -> bytes:
    """The bytes that a connection begins with."""
    return _encoder.encode(asker)


def framed(preface: bytes) -> bytes:
    """The same on a stream."""
    return len(preface).to_bytes(LENGTH, "big") + preface


def decode(data: bytes) -> Asker:
    """Read one. Raises NotAnAsker."""
    if len(data) > MAX:
        raise NotAnAsker(f"{len(data)} bytes are more than {MAX}")
    try:
        asker = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotAnAsker(str(error)) from error
    if asker.version != VERSION:
        raise NotAnAsker(f"version {asker.version}, this is {VERSION}: upgrade both together")
    if len(asker.flow_id) != 16 or len(asker.destination) not in (4, 16):
        raise NotAnAsker("a flow's id has 16 bytes, an address 4 or 16")
    return asker
