"""What a worker pushes to its parent for somebody who captures: a datagram a packet over a SEQPACKET pair. PURE.

The first datagram is `Begun`, the others are `Captured`. The pair is the bound: what it doesn't take is lost for the watcher, counted, and
told with the next one that it takes. Closing either end is the end of the capture.

Limit: a packet longer than the pair's datagrams (about 200 KiB by default) would be lost; none is longer than 64 KiB.
"""

from __future__ import annotations

from typing import Final

import msgspec

TUNNEL: Final = 0
NAMESPACE: Final = 1

FORWARDED: Final = "forwarded"
HELD: Final = "held"
ANSWERED: Final = "answered"
DROPPED: Final = "dropped"
SENT: Final = "sent"


class Begun(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The worker captures from now on; or why it doesn't."""

    error: str = ""


class Captured(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """One packet that passed, as `CaptureResponse` has it."""

    time: int
    """Wall-clock nanoseconds."""
    side: int
    fate: str
    reason: str
    flow_id: bytes
    tenant: str
    device: str
    tunnel: int
    outcome: str
    rule: str
    gso_size: int
    partial: bool
    length: int
    data: bytes
    lost: int


Datagram = Begun | Captured
_decoder: Final = msgspec.msgpack.Decoder(Datagram)
_encoder: Final = msgspec.msgpack.Encoder()


def encode(message: Datagram) -> bytes:
    """One datagram."""
    return _encoder.encode(message)


def decode(data: bytes) -> Datagram:
    """The datagram's message. Raises msgspec.DecodeError."""
    message: Datagram = _decoder.decode(data)
    return message
