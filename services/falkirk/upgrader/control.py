"""What the upgrader's parent and its workers say to each other over their inherited SEQPACKET pair.

The parent says `Setup` once, first; the worker answers `Ready` when flow workers can reach it, and reports `SpanEnded`
for sampled flows from then on. `HelperPair` follows whenever the lowering namespace's helper was replaced. `Lower` asks for a way to a device for a
stream that the parent has in hand; it is answered by `LowerOver`, before which comes `LowerOpened` where there is a way. Numbers go through shared memory (`COUNTERS`), which the parent owns, so that they
outlive a worker. The pair's end is the worker's end.

Limit: spans are lost, and counted, where the parent doesn't read fast enough.
"""

from __future__ import annotations

from typing import Final

import msgspec

GAUGES: Final = ("streams", "dialling", "paired")
"""Numbers of the present; a new worker starts them from 0."""
DROPS: Final = (
    "accept_unknown_slot",
    "accept_failed",
    "peer_refused",
    "message_refused",
    "span_dropped",
)
"""What was refused or lost, by reason: `falkirk_drops_total`."""
COUNTERS: Final = (
    *GAUGES,
    *DROPS,
    "dial_connected",
    "dial_refused",
    "dial_timed_out",
    "dial_unreachable",
    "dial_no_address",
    "dial_no_descriptors",
    "dial_unsupported",
    "dial_failed",
    "socket_opened",
    "socket_not_permitted",
    "socket_unreachable",
    "socket_no_address",
    "socket_no_port",
    "socket_no_descriptors",
    "socket_unsupported",
    "socket_failed",
    "opened",
    "slot_replaced",
    "closed_finished",
    "closed_client_reset",
    "closed_upstream_reset",
    "closed_idle",
    "closed_aborted",
    "closed_never_opened",
    "closed_relay_error",
    "lower_asked",
    "lower_refused",
    "bytes_up",
    "bytes_down",
)
"""Everything that a worker counts, in the order of the shared memory."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; on the wire an array whose head is the class's name."""


class Setup(Message, frozen=True, tag=True):
    """All that a worker must know. Descriptors: counters; vnet TUN and raw TUN that lift; the same two that lower; the pair to the lowering namespace's
    helper; IPv4 listener and, with IPv6, IPv6 listener."""

    worker: int
    workers: int
    generation: int
    """Wall-clock nanoseconds at which this worker was started."""
    path: str
    """Where flow workers connect."""
    mode: int
    """Permission bits of that socket."""
    uids: tuple[int, ...]
    """Who may be a flow worker."""
    listener_port: int
    mtu: int
    open_timeout_s: float
    congestion: str
    """Of upstream sockets; empty keeps the system's."""
    log_level: str
    log_format: str


class HelperPair(Message, frozen=True, tag=True):
    """The pair to the lowering namespace's new helper. One descriptor."""


class Lower(Message, frozen=True, tag=True):
    """Somebody wants a stream to a port of a device. One descriptor: the worker's end of it. The fields are those of
    `handover.LowerWanted`."""

    request: int
    tenant: str
    device: str
    version: int
    port: int
    actor: str


class LowerOpened(Message, frozen=True, tag=True):
    """The device has accepted: bytes pass from now on."""

    request: int
    flow_id: bytes


class LowerOver(Message, frozen=True, tag=True):
    """The stream is over, or was never opened: a reason of `handover.Closed`, the errno's name of a dial that failed, or why flow
    refused. Bytes are payload, up is towards the device."""

    request: int
    reason: str
    why: str = ""
    bytes_up: int = 0
    bytes_down: int = 0


class Ready(Message, frozen=True, tag=True):
    """Flow workers can connect now."""


class SpanEnded(Message, frozen=True, tag=True):
    """A span of a sampled flow, for the exporter. Times are wall-clock nanoseconds."""

    name: str
    trace_id: bytes
    parent_span_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, str | int]
    status: str = ""
    """Empty: no error."""


ToWorker = Setup | HelperPair | Lower
FromWorker = Ready | SpanEnded | LowerOpened | LowerOver

TO_WORKER: Final = msgspec.msgpack.Decoder(ToWorker)
FROM_WORKER: Final = msgspec.msgpack.Decoder(FromWorker)
MAX_DATAGRAM: Final = 64 * 1024

_encoder: Final = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One datagram."""
    return _encoder.encode(message)
