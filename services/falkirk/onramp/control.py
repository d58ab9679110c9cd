"""What the on-ramp's parent and its workers say to each other over their pairs, and workers to each other. PURE.

One datagram is one MessagePack message; descriptors ride beside it. The parent speaks first:

    parent -> worker   Setup (counters and more) Neighbour (its inbox) Places Update (rows) Close
    worker -> parent   State Opened Changed Heard Ended Traced
    worker -> worker   Passed Asked        in the inbox of the one that they are for

An `Update` is one transaction; its rows are in a memfd, so a transaction of any size is one message and is applied whole.
The file holds chunks, each a 4-byte length (big endian) and a MessagePack `Chunk`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final
from zlib import crc32

import msgspec

from falkirk.onramp.context import Code
from falkirk.onramp.tables import Row, chunks
from falkirk.wire.context import Framing, Transport, TunnelContext
from falkirk.wireguard.counters import REASONS
from falkirk.wireguard.handshake import Claim

WIREGUARD: Final = "wireguard_"
"""What the names of WireGuard's counters begin with."""
DROPS: Final = (
    "not_ready",
    "not_admitted",
    "tunnel_full",
    "no_tunnel",
    "bad_packet_of_ours",
    "socket_full",
    "worker_full",
    "unread",
)
"""WireGuard's drops that aren't the protocol's: the tables are empty still; the device isn't let in; its flow worker doesn't keep up, or has no tunnel for it; what
the flow worker sent is no packet; the socket doesn't keep up; another worker, whose datagram it is, doesn't; the kernel
dropped it before it was read, because the socket was full or, under load, by the sieve."""
PASSED: Final = "passed_on"
COUNTERS: Final = (
    "admitted",
    "closed",
    PASSED,
    *(code.value for code in Code),
    *(WIREGUARD + reason for reason in (*REASONS, *DROPS)),
)
"""Names of the shared counters: tunnels admitted and closed, datagrams that were given to another worker, refusals by code, what WireGuard drops by reason."""

_LENGTH: Final = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; on the wire an array whose head is the class's name."""


class Setup(Message, frozen=True, tag=True):
    """All that the worker must know. Descriptors: the counters' memory and the board's, the listening tunnel socket for worker 0, and where WireGuard is on its
    UDP socket and its inbox."""

    worker: int
    """Which one it is, from 0."""
    workers: int
    """How many there are."""
    mesh_dir: str
    """Where the flow workers' sockets are."""
    flow_workers: int
    peer_uids: tuple[int, ...]
    """Uids that a flow worker may have."""
    grants: tuple[tuple[int, tuple[str, ...]], ...]
    device_uids: tuple[int, ...]
    """(uid, tenant names) of producers."""
    parser: str
    mtu: int
    first_tunnel: int
    context_timeout_ms: int
    adopt_timeout_ms: int
    max_pending: int
    max_pending_per_uid: int
    max_tunnels: int
    max_tunnels_per_device: int
    log_level: str = "info"
    log_format: str = "json"
    wireguard_key: str = ""
    """The file of the node's private key; empty where WireGuard isn't on."""
    wireguard_mtu: int = 1420


class Neighbour(Message, frozen=True, tag=True):
    """Another worker. One descriptor: where to write what is for it."""

    worker: int


class Update(Message, frozen=True, tag=True):
    """A transaction of the registry, or its whole state. One descriptor: the rows."""

    full: bool
    epoch: str
    number: int


class Places(Message, frozen=True, tag=True):
    """Where devices that come by WireGuard were last heard from: (id, endpoint). Before the first update."""

    places: tuple[tuple[str, str], ...]


class Close(Message, frozen=True, tag=True):
    """Close a tunnel, where it is still open."""

    tunnel: int
    reason: str


class State(Message, frozen=True, tag=True):
    """How the worker is, after each change: the last update applied, and which flow workers it is connected to."""

    epoch: str
    number: int
    links: tuple[bool, ...]


class Opened(Message, frozen=True, tag=True, gc=False):
    """A tunnel is read by its flow worker. `resumed`: it was so before this on-ramp worker started."""

    tunnel: int
    context: TunnelContext
    framing: Framing
    mtu: int
    flow_worker: int
    uid: int
    pid: int
    admitted_at: int
    """Wall-clock nanoseconds."""
    resumed: bool = False
    transport: Transport = Transport.SOCKET
    worker: int = 0
    """Of the on-ramp."""


class Changed(Message, frozen=True, tag=True):
    """The context of an open tunnel is another one now."""

    tunnel: int
    context: TunnelContext


class Heard(Message, frozen=True, tag=True, gc=False):
    """What is known of the WireGuard device at the other end of a tunnel."""

    tunnel: int
    endpoint: str
    handshake: int
    """Wall-clock nanoseconds of the last one."""
    received_bytes: int
    """Of inner packets from the device, in all."""
    sent_bytes: int
    """To it."""


class Ended(Message, frozen=True, tag=True):
    """A tunnel is over."""

    tunnel: int
    reason: str


class Traced(Message, frozen=True, tag=True):
    """A sampled flow began on this tunnel (see `falkirk.wire.handover.Traced`)."""

    tunnel: int
    trace_id: bytes
    span_id: bytes
    time: int


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Some rows of an update, and (in its first chunk) what the transaction removed."""

    changed: tuple[Row, ...] = ()
    removed: tuple[str, ...] = ()


class Passed(Message, frozen=True, tag=True):
    """A datagram that came to another worker; from the owner's socket goes what comes of it."""

    endpoint: tuple[Any, ...]
    """Whom it came from, as the socket says it."""
    datagram: bytes
    claim: Claim | None = None
    """Of an initiation, of which this is known already."""


class Asked(Message, frozen=True, tag=True):
    """A device of this worker's sent data of a session that no worker has, and should be asked for a handshake."""

    endpoint: tuple[Any, ...]


TO_WORKER: Final = msgspec.msgpack.Decoder(Setup | Neighbour | Places | Update | Close)
TO_PARENT: Final = msgspec.msgpack.Decoder(State | Opened | Changed | Heard | Ended | Traced)
BETWEEN: Final = msgspec.msgpack.Decoder(Passed | Asked)
_CHUNK: Final = msgspec.msgpack.Decoder(Chunk)
_encoder: Final = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One datagram."""
    return _encoder.encode(message)


def owner(public_key: bytes, workers: int) -> int:
    """Which worker has the WireGuard device with this key: its sessions, its tunnel, its last timestamp."""
    return crc32(public_key) % workers


def pack(changed: Iterable[Row], removed: Iterable[str]) -> Iterator[bytes]:
    """The content of an update's file."""
    first = tuple(removed)
    if first:
        yield _framed(Chunk(removed=first))
    for portion in chunks(changed):
        yield _framed(Chunk(changed=portion))


def unpack(data: memoryview) -> Iterator[Chunk]:
    """Chunks of an update's file, decoded one at a time. Raises ValueError where it is cut off or broken."""
    position = 0
    while position < len(data):
        if position + _LENGTH.size > len(data):
            raise ValueError("the update is cut off")
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size + length
        if position > len(data):
            raise ValueError("the update is cut off")
        yield _CHUNK.decode(data[position - length : position])


def _framed(chunk: Chunk) -> bytes:
    encoded = _encoder.encode(chunk)
    return _LENGTH.pack(len(encoded)) + encoded
