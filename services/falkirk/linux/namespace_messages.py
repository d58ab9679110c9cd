"""What a namespace helper and its parent say to each other, and how the parent starts one.

One datagram is one message (MessagePack, a tagged array); descriptors ride beside it in the order that the message
names. A new namespace is announced as `Made`, one `WorkerDevices` a worker, `Ready`; a joined one as `Joined`, `Ready`;
anything that stands in the way as `Failed`, after which the helper exits. Then the parent may ask (`Inspect`) at any
time. The pair's end means the other is gone: the helper exits when its parent does.

A lowering namespace has no listeners. Instead the parent gives the helper a pair for each worker (`Serve`), and over that the worker asks for client
sockets, one for each stream that is to leave as packets::

    worker -> helper    Connect         to this slot's address
    helper -> worker    Connecting      with the socket: its SYN is on the worker's device, or will be in a moment
                        NotConnecting   there is none, and why
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

MODULE: Final = "falkirk.linux.namespace_helper"


class Purpose(StrEnum):
    """What a namespace is for."""

    LIFT = "lift"
    """Packets become streams: listeners take them in."""
    LOWER = "lower"
    """Streams become packets: client sockets are made on demand."""


class HelperSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the namespace is to be."""

    purpose: Purpose = Purpose.LIFT
    workers: int = 1
    """Upgrader workers, each with two devices, and two listeners where the purpose is to lift; 1 to 64."""
    congestion: str = "cubic"
    """TCP congestion control; "reno" where the kernel hasn't it."""
    vnet_mtu: int = 1500
    """Bytes. With super-packets it doesn't show in the speed (two such devices back to back: 12.8 Gbit/s with 1500, 12.7
    with 65535, veth 22 on the same machine), and 1500 gives segments that fit the wire when they leave by one."""
    raw_mtu: int = 1500
    """Bytes."""
    tx_queue: int = 4000
    """Packets that wait in a device for its reader."""
    backlog: int = 4096
    """Streams that wait in a listener to be accepted."""
    tcp_buffer_max: int = 8 * 1024 * 1024
    """Bytes that one socket's send or receive buffer may grow to."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; on the wire an array whose head is the class's name."""


class Made(Message, frozen=True, tag=True):
    """New namespaces. Two descriptors: the user namespace and the network namespace; keep them for a replacement."""

    network_namespace: int
    """Inode, the number that `lsns` prints."""
    user_namespace: int
    """Inode."""
    congestion: str
    """What the listeners use."""
    ipv6: bool
    """False where the kernel has no IPv6: then a worker has no IPv6 listener and three descriptors."""
    took: dict[str, str]
    """Kernel settings that were made, and their values."""
    refused: dict[str, str]
    """Kernel settings that couldn't be made, and why; the service runs without."""
    descriptors: int = 2


class WorkerDevices(Message, frozen=True, tag=True):
    """One worker's devices and listeners: vnet TUN, raw TUN, IPv4 listener and, with IPv6, IPv6 listener.

    Listeners are bound to the wildcard address; streams come to host number 1 of each slot prefix. For lowering there are none: two descriptors, and
    port 0.
    """

    worker: int
    vnet_device: str
    raw_device: str
    vnet_mtu: int
    raw_mtu: int
    port: int
    descriptors: int = 4


class Joined(Message, frozen=True, tag=True):
    """A replacement helper is inside the namespaces whose descriptors it was given."""

    network_namespace: int


class Ready(Message, frozen=True, tag=True):
    """All has been said; the helper answers requests from now on."""


class Failed(Message, frozen=True, tag=True):
    """The helper gives up and exits. `code`: "tun_unavailable", "namespace_unavailable", "set_up_failed"."""

    code: str
    message: str
    remedy: str


class Inspect(Message, frozen=True, tag=True):
    """How are the devices? Answered by `Inspected` with the same number."""

    request: int


class DeviceCounters(msgspec.Struct, frozen=True, array_like=True):
    """A device as the kernel counts it: `received` was written to the TUN, `sent` was to be read from it."""

    received_packets: int
    received_bytes: int
    received_dropped: int
    sent_packets: int
    sent_bytes: int
    sent_dropped: int
    """Packets lost because the device's reader was too slow (its queue was full)."""


class Inspected(Message, frozen=True, tag=True):
    """Counters of every device in the namespace, by name."""

    request: int
    devices: dict[str, DeviceCounters]


class Serve(Message, frozen=True, tag=True):
    """Make client sockets for this worker, which asks over the pair whose end this is. A pair that it had before is
    closed. One descriptor."""

    worker: int
    descriptors: int = 1


class Connect(Message, frozen=True, tag=True):
    """Worker to helper: a TCP socket that connects from `source_port` of the device's own address to `port` of this slot's.
    Answered by `Connecting` or `NotConnecting` with the same number."""

    request: int
    slot: int
    """As `falkirk.wire.slots` counts: kind and index."""
    version: int
    """4 or 6."""
    source_port: int
    port: int


class Connecting(Message, frozen=True, tag=True):
    """Helper to worker: the socket; it resets on close, and its first event tells how the handshake went. One descriptor."""

    request: int
    descriptors: int = 1


class NotConnecting(Message, frozen=True, tag=True):
    """Helper to worker: there is no such socket, and why."""

    request: int
    errno: int


FromHelper = Made | WorkerDevices | Joined | Ready | Failed | Inspected
ToHelper = Inspect | Serve
ToWorker = Connecting | NotConnecting

FROM_HELPER: Final = msgspec.msgpack.Decoder(FromHelper)
TO_HELPER: Final = msgspec.msgpack.Decoder(ToHelper)
FROM_WORKER: Final = msgspec.msgpack.Decoder(Connect)
TO_WORKER: Final = msgspec.msgpack.Decoder(ToWorker)
MAX_DATAGRAM: Final = 64 * 1024

_encoder: Final = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One datagram."""
    return _encoder.encode(message)


def command(
    control_fd: int, settings: HelperSettings, join: Sequence[int] | None = None, python: str = sys.executable
) -> tuple[list[str], list[int]]:
    """Arguments to exec, and descriptors to pass on (keep their numbers: Popen's `pass_fds`).

    `join` is (user namespace, network namespace) by descriptor, as `Made` brought them.
    """
    arguments = [python, "-m", MODULE, "--control-fd", str(control_fd)]
    arguments += ["--settings", msgspec.json.encode(settings).decode()]
    if join is None:
        return arguments, [control_fd]
    return [*arguments, "--join", *map(str, join)], [control_fd, *join]
