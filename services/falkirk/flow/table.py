"""Flows and tunnels as a worker holds them, and the timers that end what is idle. PURE.

A tunnel has a dict from the signature's bytes to its flow, of every protocol (see `falkirk.flow.keys`). What all flows have
(whose they are, what was decided, counts, timers) is `Flow`; how one ends is known by its `Owner`: the tracker for lifted TCP,
others for other kinds. A lifted TCP flow carries all that the fast path needs, computed once: the twelve (or
thirty-six) bytes to write over the signature each way, and the RFC 1624 deltas of the checksums.

A complete checksum is the complement of its sum, so it takes the opposite direction's delta: HC' = ~(~HC + d) is HC - d
(RFC 1624 eqn. 3, modulo 65,535). A partial one (virtio NEEDS_CSUM) is the plain sum of the pseudo-header. Deltas are sums of 16-bit words in the machine's own byte order, modulo 65,535 (RFC 1071 2(B)): the packet's checksum
fields are read in that order too, so nothing is swapped.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from falkirk.flow.keys import signature
from falkirk.flow.records import of_tunnel
from falkirk.wire.checksum import Buffer
from falkirk.wire.context import Framing, Transport, TunnelContext

if TYPE_CHECKING:
    from falkirk.flow.decision import Decision
    from falkirk.flow.passages import Passage


IPV6: Final = 0x10000


class State(IntEnum):
    """Where a flow is; numbers are those of the live table and of FlowState."""

    HELD = 1
    OPENING = 2
    ESTABLISHED = 3
    CLOSING = 4


def native_sum(data: bytes) -> int:
    """The sum of 16-bit words in native order, modulo 65,535. Even length."""
    return int.from_bytes(data, "little") % 0xFFFF


_WORDS: Final = tuple(range(0x10000))
_PORTS: Final = (_WORDS, tuple(range(IPV6, 2 * IPV6)))
"""The numbers of which each flow has three, once: together they take 5 MiB, apart they took 100 bytes a flow."""


class Flow:
    """One flow of any protocol. The initiator's view: `up` is from it, `down` to it."""

    __slots__ = (
        "bucket",
        "bytes_down",
        "bytes_up",
        "decision",
        "index",
        "key",
        "owner",
        "packets_down",
        "packets_up",
        "reason",
        "slot",
        "span_id",
        "state",
        "tick",
        "tunnel",
    )

    def __init__(self, owner: Owner[Any], tunnel: Tunnel, key: bytes) -> None:
        self.owner = owner
        """Who knows how it ends."""
        self.tunnel = tunnel
        self.key = key
        self.index = -1
        """Its place in the live table."""
        self.slot = 0
        """Its NAT slot's number; 0 where it has none."""
        self.state = State.HELD
        self.tick = 0
        """The second of the last packet (of the last outbound one where only those count)."""
        self.bytes_up = 0
        self.bytes_down = 0
        self.packets_up = 0
        self.packets_down = 0
        self.bucket = 0
        self.reason = ""
        self.span_id = b""
        self.decision: Decision | None = None

    @property
    def protocol(self) -> int:
        """The IP protocol's number."""
        return signature(self.key).protocol

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.key) < 16 else 6

    @property
    def source(self) -> bytes:
        """The initiator's address."""
        return self.key[:4] if len(self.key) < 16 else self.key[:16]

    @property
    def destination(self) -> bytes:
        """The destination's address."""
        return self.key[4:8] if len(self.key) < 16 else self.key[16:32]

    @property
    def source_port(self) -> int:
        """The initiator's port; an echo's identifier."""
        return signature(self.key).source_port

    @property
    def destination_port(self) -> int:
        """The destination's port."""
        return signature(self.key).destination_port


F = TypeVar("F", bound=Flow)
T = TypeVar("T")


class Owner(ABC, Generic[F]):
    """What knows how flows of one kind end. Whatever takes a flow out of the tables is `falkirk.flow.lifecycle`."""

    @abstractmethod
    def end(self, flow: F, reason: str) -> None:
        """End a live flow and tell both sides, in the words that its protocol has. It may take some turns."""

    @abstractmethod
    def cut(self, flow: F, reason: str) -> None:
        """End it at once: its tunnel is gone, and nobody is there to be told."""

    @abstractmethod
    def bereave(self, flow: F, reason: str) -> None:
        """The upgrader is gone, with all that it held of the flow: end it at once where it can't do without."""

    @abstractmethod
    def expire(self, flow: F) -> None:
        """The wheel's turn for this flow has come: end it where it is idle, or place it anew."""

    @abstractmethod
    def release(self, flow: F, reason: str) -> None:
        """It has been taken out of the tables: give back what it held."""


class Ending:
    """How far a TCP flow's end has come."""

    __slots__ = ("fin_acked_down", "fin_acked_up", "fin_down", "fin_up", "long_rest", "over", "reset")

    def __init__(self) -> None:
        self.fin_up: int | None = None
        """The sequence number that acknowledges the initiator's FIN, once it has passed."""
        self.fin_down: int | None = None
        self.fin_acked_up = False
        self.fin_acked_down = False
        self.long_rest = False
        """The kernel has learned an IPv6 path MTU for the slot's address: it rests longer."""
        self.reset = False
        """A RST has passed towards the initiator."""
        self.over = False
        """The upgrader has nothing more of this slot."""


_NOT_ENDING: Final = Ending()


class _OfEnding(Generic[T]):
    """An attribute of a flow's ending, as one of the flow: the first that is set gives the flow an ending of its own."""

    def __set_name__(self, owner: type[TcpLift], name: str) -> None:
        self._name = name

    def __get__(self, flow: TcpLift, owner: type[TcpLift]) -> T:
        value: T = getattr(flow.ending, self._name)
        return value

    def __set__(self, flow: TcpLift, value: T) -> None:
        if flow.ending is _NOT_ENDING:
            flow.ending = Ending()
        setattr(flow.ending, self._name, value)


class TcpLift(Flow):
    """A lifted TCP flow: one that goes through a kernel's TCP, behind a NAT. `forward` and `back` replace the signature's bytes; deltas are for `forward`,
    their negatives for `back`. An idle one takes 560 bytes, tables included: what only some flows have is shared until they do."""

    owner: TcpOwner
    __slots__ = (
        "back",
        "delta_addresses",
        "delta_all",
        "ending",
        "forward",
        "held",
        "lane",
        "leg",
        "opens",
        "port",
        "vnet_ok",
        "vnet_put",
    )
    fin_up = _OfEnding[int | None]()
    fin_down = _OfEnding[int | None]()
    fin_acked_up = _OfEnding[bool]()
    fin_acked_down = _OfEnding[bool]()
    long_rest = _OfEnding[bool]()
    reset = _OfEnding[bool]()
    over = _OfEnding[bool]()

    def __init__(self, owner: TcpOwner, tunnel: Tunnel, key: bytes, forward: bytes, slot: int, lane: Any) -> None:
        super().__init__(owner, tunnel, key)
        size = 8 if len(key) == 12 else 32
        self.slot = slot
        self.lane = lane
        """Its way to the kernel and back, not that of its tunnel's packets: a lowered one comes by another device."""
        self.leg: Leg | None = None
        """Where it is lowered again: its other side."""
        self.forward = forward
        half = size // 2
        self.back = key[half:size] + key[:half] + key[size + 2 :] + key[size : size + 2]
        # 2^16 = 1 modulo 65,535, so a number's remainder is the sum of its words.
        addresses = int.from_bytes(forward[:size], "little") - int.from_bytes(key[:size], "little")
        everything = int.from_bytes(forward, "little") - int.from_bytes(key, "little")
        self.delta_addresses = _WORDS[addresses % 0xFFFF]
        self.delta_all = _WORDS[everything % 0xFFFF]
        self.port = _PORTS[size == 32][int.from_bytes(key[size : size + 2], "little")]
        """The initiator's port in native order, and `IPV6`: what a segment from the slot's kernel is known by."""
        self.held: bytes | None = None
        """The first packet behind its virtio-net header, while the upstream is dialled."""
        self.vnet_ok = b""
        """The last virtio-net header from the tunnel that was found to be true."""
        self.vnet_put = b""
        """Its normal form, which goes on."""
        self.opens = 0
        """While it opens: the initiator's next sequence number, the only one at which a RST ends a handshake."""
        self.ending = _NOT_ENDING
        """How far its end has come; most flows have nothing of that, and share it."""


class TcpOwner(Owner[TcpLift]):
    """What follows segments, for the lanes."""

    @abstractmethod
    def segment_up(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> bool:
        """A segment from the tunnel that opens, closes, or comes while the flow isn't established. True: it goes on."""

    @abstractmethod
    def segment_down(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
        """The same to the tunnel; it has been rewritten, and goes on."""


class Leg(TcpLift):
    """Where a stream leaves as packets again: the other side of a lifted flow, or the only one of a flow that begins here (see
    `falkirk.flow.lowering`).

    It lies in the tunnel that it leads to, under the key of the device's replies, and `up` is from that device. It is no flow of its own: records,
    limits and timers are its `flow`'s.
    """

    __slots__ = ("flow", "handle", "prefix")

    def __init__(self, owner: TcpOwner, tunnel: Tunnel, key: bytes, forward: bytes, slot: int, lane: Any) -> None:
        super().__init__(owner, tunnel, key, forward, slot, lane)
        self.flow: Any = None
        """Whose side it is."""
        self.handle = 0
        """This worker's number for it towards the worker that reads its tunnel; 0 where that is this one."""
        self.prefix = ""
        """Of the route that leads to the tunnel."""
        self.state = State.OPENING


class DeviceCounts:
    """What a device has on this worker, over all its tunnels."""

    __slots__ = ("flows", "held", "tunnels")

    def __init__(self) -> None:
        self.flows = 0
        self.held = 0
        self.tunnels = 0


class Bearer:
    """What carries a tunnel's packets. This one carries nothing: a tunnel has it once it is closed."""

    __slots__ = ()
    open = False
    """Whether packets can be written, now or later."""
    transport = Transport.SOCKET
    full = "tunnel_full"
    """Why what there is no room for is dropped."""
    descriptor = -1
    """What the on-ramp has a copy of: the tunnel lives as long as it. Negative where it has none."""

    def read(self, buffers: Sequence[Buffer]) -> int:
        """A packet, or several, into these buffers; the size. Raises BlockingIOError where there is none."""
        raise OSError(errno.ENOTCONN, "nothing carries this tunnel's packets")

    def write(self, tunnel: Tunnel, data: Buffer) -> int:
        """The other way. Raises BlockingIOError where there is no room, other OSError where there is nobody."""
        raise OSError(errno.ENOTCONN, "nothing carries this tunnel's packets")

    def ended(self) -> bool:
        """Whether reading nothing meant the end."""
        return True

    def room(self, size: int) -> bool:
        """Whether so many bytes more may wait."""
        return True

    def keep(self, tunnel: Tunnel, data: bytes) -> None:
        """What couldn't be written waits in the tunnel's queue, and is written as soon as it can be."""
        tunnel.wait(data)

    def close(self, tunnel: Tunnel) -> None:
        """The tunnel is over."""


NOBODY: Final = Bearer()


class _Nothing(dict[Any, Any]):
    """The dict of all tunnels that have nothing to put into theirs. It stays empty."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("this dict is every idle tunnel's: it takes nothing")


NOTHING: Final = _Nothing()
_NO_QUEUE: Final[deque[bytes]] = deque(maxlen=0)


class Tunnel:
    """One tunnel: whom it speaks for, its flows, and the bounded queue towards a slow reader. What an idle one hasn't, such as a queue, is shared until it has it."""

    __slots__ = (
        "_audit",
        "bearer",
        "context",
        "device",
        "flows",
        "framing",
        "icmp_left",
        "icmp_tick",
        "id",
        "identification",
        "lifts",
        "memo",
        "mtu",
        "onramp",
        "passages",
        "queue",
        "queued",
        "records_left",
        "records_tick",
        "refused",
        "row",
        "unrecorded",
    )

    def __init__(
        self,
        number: int,
        context: TunnelContext,
        framing: Framing,
        mtu: int,
        bearer: Bearer,
        row: int,
        device: DeviceCounts,
    ) -> None:
        self.id = number
        self.device = device
        self.context = context
        self._audit = ""
        self.framing = framing
        self.mtu = mtu
        self.bearer = bearer
        self.onramp = 0
        """The on-ramp worker whose it is: what concerns it is told to that one."""
        self.row = row
        """The tenant's row in the shared counts."""
        self.flows: dict[bytes, Flow] = NOTHING
        """Flows that it initiated, of every protocol, by their keys."""
        self.lifts = cast("dict[bytes, TcpLift]", self.flows)
        """The same dict as the TCP path sees it: under a key of 12 or 36 bytes there is never anything else. Legs lie here too, which this tunnel has not
        initiated."""
        self.passages: dict[bytes, Passage] = NOTHING
        """Forwarded flows' packets that come from here, initiated here or elsewhere (`falkirk.flow.passages`)."""
        self.memo: dict[tuple[bytes, int, int], Decision] = NOTHING
        """Decisions on new flows by (destination, port, protocol)."""
        self.queue = _NO_QUEUE
        """Datagrams that wait, oldest first."""
        self.queued = 0
        """Their bytes."""
        self.refused: dict[tuple[bytes, int, str], list[int]] = NOTHING
        """Refusals of the last seconds by (destination, port, reason): [second of the record, repeats since]."""
        self.records_tick = 0
        self.records_left = 0
        self.unrecorded = 0
        """Refusals since the last record of any, beyond what is recorded a second."""
        self.icmp_tick = 0
        self.icmp_left = 0
        self.identification = -1
        """The last one that was given to fragments; -1 before the first."""

    @property
    def audit(self) -> str:
        """Its part of an audit record, made when the first is written."""
        if not self._audit:
            self._audit = of_tunnel(self.id, self.context)
        return self._audit

    def recontext(self, context: TunnelContext) -> None:
        """It speaks for this from now on."""
        self.context = context
        self._audit = ""

    def begin(self, key: bytes, flow: Flow) -> None:
        """Know a flow, or a leg, by its key."""
        if self.flows is NOTHING:
            self.flows = {}
            self.lifts = cast("dict[bytes, TcpLift]", self.flows)
        self.flows[key] = flow

    def wait(self, data: bytes) -> None:
        """Queue a datagram."""
        if self.queue is _NO_QUEUE:
            self.queue = deque()
        self.queue.append(data)
        self.queued += len(data)

    def remember(self, at: tuple[bytes, int, int], decision: Decision) -> None:
        """Keep a decision on new flows."""
        if self.memo is NOTHING:
            self.memo = {}
        self.memo[at] = decision

    def refuse(self, at: tuple[bytes, int, str], second: int, repeats: int) -> None:
        """Note a refusal: the second of its record, and repeats since."""
        if self.refused is NOTHING:
            self.refused = {}
        self.refused[at] = [second, repeats]

    def let(self, key: bytes, passage: Passage) -> None:
        """Let packets of a forwarded flow pass."""
        if self.passages is NOTHING:
            self.passages = {}
        self.passages[key] = passage

    def serve(self) -> bool:
        """Write the first datagram that waits; False where no more do. Raises BlockingIOError where there is no room."""
        queue = self.queue
        try:
            if queue:
                self.bearer.write(self, queue[0])
                self.queued -= len(queue.popleft())
        except BlockingIOError:
            raise
        except OSError:
            # Nobody is there, as whoever reads will find.
            queue.clear()
        if queue:
            return True
        self.queue, self.queued = _NO_QUEUE, 0
        return False


class Distant(Tunnel):
    """A tunnel that another worker reads, as far as legs of this one lead there. Its packets cross over the pair with that worker, behind virtio-net
    headers, which it translates for the tunnel."""

    __slots__ = ("sibling",)

    def __init__(self, number: int, context: TunnelContext, mtu: int, sibling: Any) -> None:
        super().__init__(number, context, Framing.VNET, mtu, NOBODY, 0, DeviceCounts())
        self.sibling = sibling


class Wheel:
    """Ends what is idle without scanning: a flow lies in the bucket of the second at which it would time out if nothing
    more came, and is moved when the bucket's turn comes and something had. Moving costs O(1), so does leaving."""

    def __init__(self, now: int) -> None:
        self._now = now
        self._buckets: dict[int, tuple[int, dict[Flow, None]]] = {}
        """By second; each with that second as the one number that all its flows refer to."""

    def __len__(self) -> int:
        return sum(len(flows) for _, flows in self._buckets.values())

    def place(self, flow: Flow, deadline: int) -> None:
        """Put a flow into the bucket of `deadline` (monotonic seconds), out of the one it was in."""
        deadline = max(deadline, self._now + 1)
        if flow.bucket:
            self.remove(flow)
        flow.bucket, flows = self._buckets.setdefault(deadline, (deadline, {}))
        flows[flow] = None

    def remove(self, flow: Flow) -> None:
        """Take a flow out."""
        bucket = self._buckets.get(flow.bucket)
        if bucket is not None:
            bucket[1].pop(flow, None)
            if not bucket[1]:
                del self._buckets[flow.bucket]
        flow.bucket = 0

    def due(self, now: int) -> list[Flow]:
        """Flows whose bucket's turn has come; the caller ends them or places them anew."""
        flows: list[Flow] = []
        while self._now < now:
            self._now += 1
            flows.extend(self._buckets.pop(self._now, (0, {}))[1])
        for flow in flows:
            flow.bucket = 0
        return flows
