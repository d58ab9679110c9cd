"""What packet processes say to each other over SEQPACKET pairs.

One datagram is one MessagePack list of messages (tagged structs), so a loop turn costs one system call a peer.
Descriptors ride beside the datagram (SCM_RIGHTS), in the order of the messages that name them; each such message
says how many are its own in `descriptors`.

The first message each way is `Hello`. A peer with another `protocol` is refused; a peer whose `generation` is lower
than one already seen in that role is refused (it is a process that was replaced). Generations are wall-clock
nanoseconds at start.

    onramp worker  -> flow worker   mesh/flow.worker.N.sock      Hello Trunk Adopt Recontext TunnelClosed / Trunked Adopted AdoptRefused Held TunnelClosed Traced
    flow worker    -> upgrader worker mesh/upgrader.worker.N.sock  Hello Prepare Abort AbortAll LowerRefused OpenSocket / Hello Devices Connected DialFailed Closed LowerWanted SocketOpened SocketFailed
    parent         <-> worker       inherited socket pair         see `falkirk.flow.control` and its siblings

Limit: 64 messages and 16 descriptors a datagram, and 128 KiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from falkirk.wire.context import Framing, Transport, TunnelContext

PROTOCOL: Final = 6
"""Version of these messages; raised by any change that an older peer would misread."""
MAX_MESSAGES: Final = 64
MAX_DESCRIPTORS: Final = 16
MAX_DATAGRAM: Final = 128 * 1024


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; on the wire an array whose head is the class's name."""


class Hello(Message, frozen=True, tag=True):
    """First message each way. `role` is "flow", "upgrader" or "onramp"; `worker` its number."""

    role: str
    worker: int
    generation: int
    protocol: int = PROTOCOL


# onramp <-> flow


class Trunk(Message, frozen=True, tag=True):
    """The pair for the packets of this on-ramp worker's tunnels that have no descriptor of their own (`falkirk.wire.trunk`), in place of the
    one before. Said before any such tunnel; answered by `Trunked`. One descriptor."""

    descriptors: int = 1


class Trunked(Message, frozen=True, tag=True):
    """Flow worker to on-ramp: it reads and writes the trunk from now on. Each tunnel of its own that may have packets there has been told by `Held` before."""


class Adopt(Message, frozen=True, tag=True):
    """A tunnel's descriptor, with all that the flow worker must know. One descriptor; none with the transport `trunk`.

    `greeting` is written to the tunnel before any packet (the admission's answer); empty on a re-adoption.
    """

    tunnel: int
    context: TunnelContext
    framing: Framing
    mtu: int
    greeting: bytes = b""
    transport: Transport = Transport.SOCKET
    """With `device` the producer is asked for its device, on this descriptor, after the greeting."""
    descriptors: int = 1


class Recontext(Message, frozen=True, tag=True):
    """On-ramp to flow worker: the context of a tunnel is this from now on. Tenant, device, virtual network and addresses are the same as
    before: where they change, the tunnel is closed."""

    tunnel: int
    context: TunnelContext


class Adopted(Message, frozen=True, tag=True):
    """The flow worker reads the tunnel from now on."""

    tunnel: int


class AdoptRefused(Message, frozen=True, tag=True):
    """The flow worker doesn't take the tunnel; the sender tells the producer."""

    tunnel: int
    code: str
    message: str


class Held(Message, frozen=True, tag=True):
    """Flow worker to a new on-ramp: a tunnel that it reads already, with a copy of its descriptor, so that the on-ramp can
    hand it over again should the flow worker die. One descriptor; none with the transport `trunk`."""

    tunnel: int
    context: TunnelContext
    framing: Framing
    mtu: int
    transport: Transport = Transport.SOCKET
    descriptors: int = 1
    busy: bool = False
    """Whether flows go through it at present."""


class TunnelClosed(Message, frozen=True, tag=True):
    """Either side: the tunnel is over; `reason` is for people and audit."""

    tunnel: int
    reason: str


class Traced(Message, frozen=True, tag=True):
    """Flow worker to on-ramp: a sampled flow began on this tunnel; the on-ramp adds its `admit` span to the trace."""

    tunnel: int
    trace_id: bytes
    """16 bytes."""
    span_id: bytes
    """8 bytes: the flow's root span, parent of the on-ramp's."""
    time: int
    """Wall-clock nanoseconds at which the flow's first packet was read."""


# flow <-> upgrader


class Devices(Message, frozen=True, tag=True):
    """The worker's TUN devices: those that lift, first the one for `vnet` tunnels, then the one for `raw` tunnels; then those that lower, in
    the same order. Four descriptors.

    Addresses of slots are arithmetic, see `falkirk.wire.slots.SlotPlan(workers)`. `listener_port` is where both the IPv4
    and the IPv6 listener of this worker wait, on the device's own address (host number 1 of each prefix).
    """

    workers: int
    listener_port: int
    mtu: int
    descriptors: int = 4


class Prepare(Message, frozen=True, tag=True):
    """Dial an upstream, and expect a stream from this slot. Answered by `Connected` or `DialFailed`."""

    slot: int
    flow_id: bytes
    """16 bytes."""
    destination: bytes
    """4 or 16 bytes."""
    port: int
    egress: bytes
    """Address to send from, of the destination's family; empty lets the kernel choose."""
    connect_timeout_ms: int
    idle_timeout_s: int
    treatment: str
    """"l4"; others are refused with EPROTONOSUPPORT until they are built."""
    span_id: bytes = b""
    """8 bytes where the flow is sampled: parent of the upgrader's spans. Empty: not sampled."""
    lower: int = 0
    """Not 0: the upstream is a device, and this is the slot (`LOWERED` included) to which a client socket of the lowering namespace connects, from
    `source_port` to `port`. `destination` and `egress` only tell the family then."""
    source_port: int = 0
    request: int = 0
    """Not 0: no client comes from a slot, as whoever asked by this number (`LowerWanted`) has the other end. `slot` is `lower` then."""
    preface: bytes = b""
    """Not empty: the upstream is this mesh's resolver, which is told this first (`falkirk.wire.asker`)."""


class Connected(Message, frozen=True, tag=True):
    """The upstream is connected; the SYN may be written now."""

    slot: int
    dial_ns: int


class DialFailed(Message, frozen=True, tag=True):
    """The upstream isn't connected; nothing of this slot remains at the upgrader."""

    slot: int
    errno: int
    dial_ns: int


class Abort(Message, frozen=True, tag=True):
    """End whatever the slot stands for: both sides get a RST. Answered by `Closed` where something was there."""

    slot: int


class AbortAll(Message, frozen=True, tag=True):
    """End everything (a new flow worker clears what its predecessor left). Each is answered by `Closed`."""


class Closed(Message, frozen=True, tag=True):
    """A prepared slot is over: "finished" (both FINs passed), "client_reset", "upstream_reset", "idle", "aborted",
    "never_opened" (the client's handshake didn't come), "relay_error". Bytes are payload."""

    slot: int
    reason: str
    bytes_up: int
    bytes_down: int


class LowerWanted(Message, frozen=True, tag=True):
    """Upgrader worker to flow worker: somebody with a stream in hand asks for a way to a port of a device. Answered by
    `Prepare` with this number, or by `LowerRefused`."""

    request: int
    tenant: str
    device: str
    """Both by name."""
    version: int
    """4 or 6; 0 leaves it to the device's addresses."""
    port: int
    actor: str
    """Who asks, as far as the service knows; for audit."""


class LowerRefused(Message, frozen=True, tag=True):
    """Flow worker to upgrader worker: there is no way. `reason` is "no_tunnel" where no tunnel of this worker is the device's."""

    request: int
    reason: str
    why: str


class OpenSocket(Message, frozen=True, tag=True):
    """Open a connected datagram socket for one session and hand it over. Answered by `SocketOpened` or `SocketFailed`; the upgrader
    keeps nothing of it, so its end costs no session."""

    token: int
    """The flow worker's own number of this wish."""
    protocol: int
    """17 for UDP, 1 or 58 for ICMP echo."""
    destination: bytes
    """4 or 16 bytes."""
    port: int
    """0 for echo."""
    egress: bytes
    """Address to send from, of the destination's family; empty lets the kernel choose."""
    local: int
    """UDP: the external port of the client's address and port, which all its sessions share (RFC 4787 REQ-1); 0 where it has none yet.
    Echo: the identifier to use where the kernel doesn't choose one."""
    flow_id: bytes
    """16 bytes."""
    span_id: bytes = b""
    """8 bytes where the flow is sampled: parent of the upgrader's span. Empty: not sampled."""
    preface: bytes = b""
    """Not empty: the socket is one to this mesh's resolver, which is told this first (`falkirk.wire.asker`)."""


class SocketOpened(Message, frozen=True, tag=True):
    """The socket. One descriptor."""

    token: int
    local: int
    """Its external port or its identifier."""
    raw: bool
    """Echo: a raw socket, whose packets have their IPv4 header and need a checksum."""
    descriptors: int = 1


class SocketFailed(Message, frozen=True, tag=True):
    """There is no socket; `errno` says why."""

    token: int
    errno: int


OnrampToFlow = Hello | Trunk | Adopt | Recontext | TunnelClosed
FlowToOnramp = Hello | Trunked | Adopted | AdoptRefused | Held | TunnelClosed | Traced
FlowToUpgrader = Hello | Prepare | Abort | AbortAll | LowerRefused | OpenSocket
UpgraderToFlow = Hello | Devices | Connected | DialFailed | Closed | LowerWanted | SocketOpened | SocketFailed

ONRAMP_TO_FLOW: Final = msgspec.msgpack.Decoder(list[OnrampToFlow])
FLOW_TO_ONRAMP: Final = msgspec.msgpack.Decoder(list[FlowToOnramp])
FLOW_TO_UPGRADER: Final = msgspec.msgpack.Decoder(list[FlowToUpgrader])
UPGRADER_TO_FLOW: Final = msgspec.msgpack.Decoder(list[UpgraderToFlow])

_encoder: Final = msgspec.msgpack.Encoder()
_LONG: Final = 32 * 1024
"""Bytes of what may be long, after which a datagram ends."""


def encode(messages: Iterable[Message]) -> bytes:
    """One datagram of at most `MAX_MESSAGES` messages."""
    return _encoder.encode(messages)


def batches(messages: list[Message]) -> Iterator[bytes]:
    """Datagrams for any number of messages without descriptors, in order."""
    some: list[Message] = []
    size = 0
    for message in messages:
        # Prefaces and contexts are all that can be long: at most 64 KiB (`falkirk.wire.asker`), so a datagram never grows beyond `MAX_DATAGRAM`.
        if len(some) == MAX_MESSAGES or size > _LONG:
            yield _encoder.encode(some)
            some, size = [], 0
        some.append(message)
        if isinstance(message, Prepare | OpenSocket):
            size += len(message.preface)
        elif isinstance(message, Held):
            size += len(_encoder.encode(message))
    if some:
        yield _encoder.encode(some)
