"""What a flow worker and its parent say to each other over the inherited pair (framed as in `falkirk.wire.handover`)."""

from __future__ import annotations

from typing import Final

import msgspec

from falkirk.flow.settings import FlowSettings
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.handover import Message


class Start(Message, frozen=True, tag=True):
    """First message to a worker. Two descriptors: the counters, the tenants' rows."""

    worker: int
    workers: int
    generation: int
    node: str
    sample_ratio: float
    run_dir: str
    data_dir: str
    mesh_uids: tuple[int, ...]
    settings: FlowSettings
    descriptors: int = 2


class Load(Message, frozen=True, tag=True):
    """A new snapshot lies on disk: load it in slices, then swap. `name` is "rules" or "routes"."""

    name: str
    path: str
    epoch: str
    number: int


class Terminate(Message, frozen=True, tag=True):
    """End the flow that its tunnel knows by this key, if it still is the one of this id."""

    tunnel: int
    key: bytes
    flow_id: bytes
    reason: str


class Sibling(Message, frozen=True, tag=True):
    """A pair with another worker, in place of the one with its predecessor. One descriptor."""

    worker: int
    descriptors: int = 1


class Attached(Message, frozen=True, tag=True):
    """Another worker reads a tunnel from now on."""

    tunnel: int
    worker: int
    tenant_id: str
    device_id: str
    virtual_network_id: str
    framing: Framing
    mtu: int


class Detached(Message, frozen=True, tag=True):
    """A tunnel of another worker is over, or its worker is."""

    tunnel: int


class Tap(Message, frozen=True, tag=True):
    """Capture packets from now on, and push them into the descriptor; its end ends the capture. One descriptor. Fields that are
    empty choose nothing. See `falkirk.flow.captured`."""

    capture_id: bytes
    """16 bytes."""
    flow_id: bytes
    tenant: str
    device: str
    expression: bytes
    """Serialised CEL."""
    text: str
    """The expression as it was written, for audit."""
    dropped_only: bool
    snaplen: int
    by: str
    descriptors: int = 1


class Loaded(Message, frozen=True, tag=True):
    """The snapshot decides from now on; `error` where it couldn't be loaded (the old one stays)."""

    name: str
    epoch: str
    number: int
    error: str = ""


class TunnelOpened(Message, frozen=True, tag=True, gc=False):
    """A tunnel is read from now on; or, of one that is, its context has changed."""

    tunnel: int
    context: TunnelContext
    framing: Framing
    mtu: int


class TunnelEnded(Message, frozen=True, tag=True):
    """A tunnel is over."""

    tunnel: int


class Spooled(Message, frozen=True, tag=True):
    """The spool has grown."""


class Status(Message, frozen=True, tag=True):
    """Whether the worker is paired with its upgrader worker, and ready for new flows."""

    paired: bool
    ready: bool


ToWorker = Start | Load | Terminate | Tap | Sibling | Attached | Detached
ToParent = Loaded | TunnelOpened | TunnelEnded | Spooled | Status

TO_WORKER: Final = msgspec.msgpack.Decoder(list[ToWorker])
TO_PARENT: Final = msgspec.msgpack.Decoder(list[ToParent])
