"""A flow worker: one thread, one epoll loop, all packets of the tunnels it was given.

A turn: read what is ready (each descriptor to EAGAIN or its budget), expire what is idle, then write: the spool first,
then messages to the upgrader, then the rest. So no upstream is dialled for a flow that isn't on record.

A worker starts from what its predecessor left: the live table names the clients whose streams are lost. Its upgrader
resets those streams (AbortAll) once their tunnels are back or a second has passed; the kernel's own RSTs, which carry the
right sequence numbers, find their way through the predecessor's slots (`orphans`).
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from falkirk.decide.routes import RouteTable
from falkirk.decide.rules import RuleTable
from falkirk.flow import control, counters, peers, records
from falkirk.flow.admin_flows import AdminFlows
from falkirk.flow.answers import Answers
from falkirk.flow.directory import Attachment
from falkirk.flow.drain import Drain
from falkirk.flow.echo import Echoes
from falkirk.flow.egress import Egress
from falkirk.flow.errors import IcmpErrors
from falkirk.flow.forward import Forward
from falkirk.flow.fragments import Fragments
from falkirk.flow.ingress import Ingress
from falkirk.flow.lane import Lane
from falkirk.flow.lifecycle import Lifecycle
from falkirk.flow.limits import TenantCounts
from falkirk.flow.live import LiveTable
from falkirk.flow.lowering import Lowering
from falkirk.flow.orphans import Orphans
from falkirk.flow.pairing import UpgraderPair
from falkirk.flow.randomness import Randomness
from falkirk.flow.raw import RawLane
from falkirk.flow.resolving import ResolverSessions
from falkirk.flow.review import Review
from falkirk.flow.session import Opening
from falkirk.flow.siblings import SiblingLink
from falkirk.flow.slots import SlotPool
from falkirk.flow.snapshots import Snapshots
from falkirk.flow.table import Flow, TcpLift, Wheel
from falkirk.flow.taps import Taps
from falkirk.flow.tracker import Tracker
from falkirk.flow.trunks import Trunks
from falkirk.flow.tunnels import Tunnels
from falkirk.flow.udp import UdpSessions
from falkirk.linux import scheduling, seqpacket
from falkirk.runtime import spool
from falkirk.runtime.counters import Counters
from falkirk.runtime.log import Log
from falkirk.wire.context import Framing
from falkirk.wire.handover import (
    Hello,
    Message,
    encode,
)
from falkirk.wire.slots import FIRST_INDEX, LOWERED, SlotPlan

SECOND: Final = 1_000_000_000
TELL: Final = SECOND // 10
"""How often the parent is told that the spool has grown, at most: each telling costs it a read and a message to policy."""
SPOOLED: Final = encode([control.Spooled()])


class Worker:
    """State and loop of one worker."""

    def __init__(self, parent: socket.socket, start: control.Start, counts: Counters, tenants_fd: int) -> None:
        self.start = start
        self.settings = start.settings
        self.log = Log(f"flow.worker.{start.worker}")
        self.counts = counts.view
        self.clock = time.monotonic_ns
        self.now = time.monotonic_ns()
        self.second = self.now // SECOND
        self._next_second = (self.second + 1) * SECOND
        self._wall_offset = time.time_ns() - time.monotonic_ns()
        self._stamp = (0, "")
        self._spooled_at = 0
        self._untold = False
        self.flow_count = 0
        self.draining = False
        """New flows are refused: the worker is about to end (`drain`)."""
        self.drain = Drain(self)
        self.trunks = Trunks(self)
        self.tunnels = Tunnels(self)
        self.deliver = self.tunnels.deliver
        self.pair = UpgraderPair(self)
        self.dirty: list[Flow] = []
        self.released: list[int] = []
        self.to_upgrader: list[Message] = []
        self.onramps: set[peers.OnrampLink] = set()
        self.onramp_generations: dict[int, int] = {}
        self.upgrader_generations: dict[int, int] = {}
        self.routes = RouteTable()
        self.rules = RuleTable.empty()
        self.snapshots = Snapshots(self)
        self.review = Review(self)
        self.wheel = Wheel(self.second)
        self.tenants = TenantCounts(tenants_fd, start.workers, start.worker)
        self._epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        """By descriptor; see `watch`."""
        self._urgent: set[int] = set()
        self._parent = parent
        self._to_parent: deque[bytes] = deque()
        self._plan = SlotPlan(start.workers)
        self.listener_port = b""
        self._generation = time.time_ns()
        self._alive = True
        data = Path(start.data_dir, "flow")
        self._spool_directory = data / "spool" / f"worker-{start.worker}"
        self.orphans = Orphans(
            data / "live" / f"worker-{start.worker}", self._spool_directory, self._plan, start.worker
        )
        # Records are ordered by epoch, whatever becomes of the wall clock.
        epoch = max(self.wall, self.orphans.epoch + 1)
        self.spool = spool.SpoolWriter(self._spool_directory, epoch)
        self._audit = records.of_worker(start.node, start.worker, epoch)
        self.orphans.bury(self)
        self._untold = self.spool.sequence > 0
        live = data / "live" / f"worker-{start.worker}"
        self.live = LiveTable(live, self.settings.max_flows, epoch, self.orphans.cursors)
        cursors = self.orphans.cursors
        self.lanes = {
            framing: self.make_lane(framing, self.settings.slots, cursors[framing is Framing.RAW])
            for framing in Framing
        }
        self.lowering = Lowering(self)
        self.lifecycle = Lifecycle(self, Randomness())
        self.tracker = Tracker(self)
        self.admin_flows = AdminFlows(self)
        self.answers = Answers(self)
        self.opening = Opening(self)
        self.udp = UdpSessions(self, self.opening)
        self.resolving = ResolverSessions(self, self.opening)
        self.echo = Echoes(self, self.opening)
        self.ingress = Ingress(self)
        self.egress = Egress(self)
        self.errors = IcmpErrors(self)
        self.forward = Forward(self)
        self.fragments = Fragments(self)
        self.taps = Taps(self)
        self._listen()

    # set-up

    def make_lane(self, framing: Framing, slots: int, cursor: int, namespace: int = 0) -> Lane:
        """A lane of at most `slots` slots, whose numbers have `namespace` added (`falkirk.wire.slots.LOWERED`)."""
        slots = min(slots, self._plan.last_index - FIRST_INDEX)
        first = self._plan.slot(framing, FIRST_INDEX)
        kind = RawLane if framing is Framing.RAW else Lane
        lane = kind(self, framing, SlotPool(0, slots, start=cursor), namespace + first, slots)
        lane.slot_base = self._plan.base(self.start.worker) + first
        return lane

    def all_lanes(self) -> tuple[Lane, ...]:
        """Those that lift, and those that lower."""
        return *self.lanes.values(), *self.lowering.lanes.values()

    def _listen(self) -> None:
        self._path = Path(self.start.run_dir, "mesh", f"flow.worker.{self.start.worker}.sock")
        self._listener = seqpacket.listen(self._path, 0o660)

        def accept(_: int) -> None:
            while (accepted := self._accept()) is not None:
                if self.trusted(seqpacket.peer(accepted).uid):
                    self.onramps.add(peers.OnrampLink(self, accepted))
                else:
                    self.log.error("peer_refused", peer="onramp", error="its uid isn't of this mesh (mesh_uids)")
                    accepted.close()

        self.watch(self._listener.fileno(), select.EPOLLIN, accept)
        self.watch(self._parent.fileno(), peers.READ, self._from_parent)

    def _accept(self) -> socket.socket | None:
        try:
            return seqpacket.accept(self._listener)
        except OSError as error:
            # Out of descriptors: the peer waits in the backlog.
            self.log.error("accept_failed", error=str(error))
            return None

    def trusted(self, uid: int) -> bool:
        """Whether a peer on a mesh socket may speak to this worker."""
        return uid in (0, os.getuid(), *self.start.mesh_uids)

    # the loop

    def watch(self, fd: int, events: int, handler: Callable[[int], None], *, urgent: bool = False) -> None:
        """Call `handler` with epoll's mask from now on; an `urgent` one before the others of a turn."""
        self._epoll.register(fd, events)
        self.handlers[fd] = handler
        if urgent:
            self._urgent.add(fd)

    def rewatch(self, fd: int, events: int) -> None:
        """Change what is waited for."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop calling."""
        self._urgent.discard(fd)
        if self.handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def run(self) -> None:
        """Until the parent's pair ends, or a drain does."""
        while self._alive and not self.draining:
            if self.snapshots.loading or self.review.pending:
                self.turn(0)
            elif self._untold:
                self.turn(TELL / SECOND)
            elif self.pair.whole:
                self.turn(1.0)
            else:
                self.turn(peers.RETRY / SECOND)
        if self._alive:
            self.drain.turns()
        self._path.unlink(missing_ok=True)

    def turn(self, timeout: float) -> None:
        """One turn: wait at most `timeout` seconds for something, then do everything that is ready."""
        events = self._epoll.poll(timeout)
        now = self.now = self.clock()
        if now >= self._next_second:
            self._each_second()
        if self._urgent and len(events) > 1:
            events.sort(key=lambda event: event[0] not in self._urgent)
        for fd, mask in events:
            handler = self.handlers.get(fd)
            if handler is not None:
                handler(mask)
        self._end_of_turn()

    def die(self) -> None:
        """Close every descriptor, and tidy nothing: what a kill does."""
        for fd in list(self.handlers):
            self.unwatch(fd)
        self._epoll.close()
        for link in (*self.onramps, *([self.pair.dialled] if self.pair.dialled else [])):
            link.sock.close()
        for pair in self.forward.links.values():
            pair.sock.close()
        for tunnel in self.tunnels.values():
            tunnel.bearer.close(tunnel)
        self.trunks.close()
        for lane in self.all_lanes():
            if lane.tun >= 0:
                os.close(lane.tun)
        self._listener.close()
        self._parent.close()
        self.spool.close()
        self.taps.close()
        self.tenants.close()
        self.orphans.close()

    def _end_of_turn(self) -> None:
        if self.udp.runs:
            self.udp.flush()
        if self.lowering.finished:
            self.lowering.end_of_turn()
        if self.tracker.finished:
            self.tracker.end_of_turn()
        if not self.pair.whole:
            self.pair.mend()
        if self.snapshots.loading:
            self.snapshots.step()
        if self.review.pending:
            self.review.step()
        if (self.spool.pending or self.spool.stuck) and not self.record():
            # Nothing is dialled that isn't on record: what this turn asked of the upgrader waits.
            return
        if self._untold and self.now - self._spooled_at >= TELL:
            self._spooled_at = self.now
            self._untold = False
            self._to_parent.append(SPOOLED)
        if self.forward.held:
            self.forward.end_of_turn()
        if self.to_upgrader:
            if self.pair.link is not None:
                self.pair.link.send(self.to_upgrader)
            self.to_upgrader = []
        if self.released:
            for index in self.released:
                self.live.release(index)
            self.released = []
        while self._to_parent:
            try:
                if not seqpacket.send(self._parent, self._to_parent[0]):
                    break
            except OSError:
                self._alive = False
                break
            self._to_parent.popleft()

    @property
    def wall(self) -> int:
        """Wall-clock nanoseconds of this turn; follows the wall clock within a second of its being set."""
        return self.now + self._wall_offset

    def _each_second(self) -> None:
        self.second = self.now // SECOND
        self._next_second = (self.second + 1) * SECOND
        self._wall_offset = time.time_ns() - time.monotonic_ns()
        self.lifecycle.expire()
        self.admin_flows.count()
        self.lifecycle.checkpoint()
        self.orphans.each_second(self)
        self.fragments.each_second()
        self.trunks.each_second()
        self.gauges()
        if self.spool.stuck:
            self.log.error("audit_unwritable", error=self.spool.error, remedy="make room in the data directory")

    def gauges(self) -> None:
        """Publish what there is now."""
        pools = [lane.pool for lane in self.all_lanes()]
        self.counts[counters.FLOWS] = self.flow_count
        self.counts[counters.SLOTS_ACTIVE] = sum(pool.active for pool in pools)
        self.counts[counters.SLOTS_RESTING] = sum(pool.resting for pool in pools)
        self.counts[counters.SLOTS_TOTAL] = sum(pool.size for pool in pools)
        self.counts[counters.TUNNELS] = len(self.tunnels)
        self.counts[counters.PAIRED] = self.pair.link is not None

    def record(self) -> bool:
        """Write the records that are queued; False where the disk doesn't take them."""
        if not self.spool.flush():
            return False
        self._untold = True
        lanes = (self.lanes, self.lowering.lanes)
        vnet, raw, lower_vnet, lower_raw = (
            some[framing].pool.cursor for some in lanes for framing in (Framing.VNET, Framing.RAW)
        )
        self.live.cursors((vnet, raw, lower_vnet, lower_raw))
        return True

    def write_record(self, event: str, flow_id: bytes, parts: str) -> int:
        """Queue an audit record (see `falkirk.flow.records`); returns its sequence number."""
        sequence = self.spool.next()
        head = f'{{"event":"{event}","flow_id":"{flow_id.hex()}","time":"{self.timestamp()}",{self._audit}'
        self.spool.add(f'{head},"sequence":{sequence}{parts}}}')
        return sequence

    def timestamp(self) -> str:
        """The turn's wall-clock time, RFC 3339 with nanoseconds."""
        seconds, rest = divmod(self.wall, SECOND)
        if seconds != self._stamp[0]:
            self._stamp = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds)))
        return f"{self._stamp[1]}{rest:09d}Z"

    # packets

    def drop(self, reason: str, packets: int = 1) -> None:
        """Count dropped packets."""
        self.counts[counters.DROPS[reason]] += packets

    def lane(self, framing: Framing) -> Lane:
        """The lane of a framing."""
        return self.lanes[framing]

    def flow_of(self, slot: int) -> TcpLift | None:
        """The live flow of a slot number, or its leg."""
        for lane in self.all_lanes():
            index = slot - lane.first_slot
            if 0 <= index < len(lane.flows):
                return lane.flows[index]
        return None

    def slot_address(self, slot: int, key_length: int) -> bytes:
        """The address of a slot in the family of a key."""
        plan = self._plan
        slot &= ~LOWERED
        return plan.address4(self.start.worker, slot) if key_length == 12 else plan.address6(self.start.worker, slot)

    def listener(self, lane: Lane, key: bytes) -> bytes:
        """What follows the slot's address in the rewritten signature: listener's address, client's port, listener's port."""
        return self.own_address(lane, len(key)) + key[-4:-2] + self.listener_port

    def own_address(self, lane: Lane, key_length: int) -> bytes:
        """The address of a lane's device."""
        return self.slot_address(self._plan.slot(lane.framing, 1), key_length)

    def inject(self, flow: TcpLift, packet: bytes) -> None:
        """Send a held packet (behind its virtio-net header) on its way."""
        lane = self.lanes[flow.tunnel.framing]
        lane.view[: len(packet)] = packet
        lane.up(flow.tunnel, len(packet))

    def hello(self) -> Hello:
        """What is said first to neighbours."""
        return Hello("flow", self.start.worker, self._generation)

    # the parent

    def tell(self, message: Message) -> None:
        """Send to the parent at the end of the turn."""
        self._to_parent.append(encode([message]))

    def _from_parent(self, _: int) -> None:
        while (received := seqpacket.receive(self._parent, 65536)) is not None:
            data, fds = received
            if not data:
                self._alive = False
                return
            for message in control.TO_WORKER.decode(data):
                match message:
                    case control.Tap() if fds:
                        self.taps.begin(message, fds.pop(0))
                    case control.Load():
                        self.snapshots.begin(message)
                    case control.Terminate():
                        self._terminate(message)
                    case control.Sibling() if fds:
                        pair = SiblingLink(self, self.forward, message.worker, socket.socket(fileno=fds.pop(0)))
                        self.forward.sibling(message.worker, pair)
                    case control.Attached():
                        self.forward.directory.opened(Attachment(*msgspec.structs.astuple(message)))
                    case control.Detached():
                        self.forward.detached(message.tunnel)
            for fd in fds:
                os.close(fd)

    def _terminate(self, message: control.Terminate) -> None:
        tunnel = self.tunnels.get(message.tunnel)
        flow = tunnel.flows.get(message.key) if tunnel is not None else None
        if flow is not None and self.lifecycle.identity(flow) == message.flow_id:
            flow.owner.end(flow, f"terminated: {message.reason}" if message.reason else "terminated")


def main(argv: list[str]) -> int:
    """Entry point: `--control-fd N` is the inherited pair; the first message says everything else."""
    parser = argparse.ArgumentParser(prog="falkirk.flow.worker")
    parser.add_argument("--control-fd", type=int, required=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parent = socket.socket(fileno=parser.parse_args(argv).control_fd)
    parent.setblocking(True)
    received = seqpacket.receive(parent, 65536)
    if received is None or not received[0]:
        return 1
    data, fds = received
    (start,) = control.TO_WORKER.decode(data)
    if not isinstance(start, control.Start) or len(fds) != start.descriptors:
        raise ValueError("the first message must be Start with its descriptors")
    parent.setblocking(False)
    scheduling.batch()
    try:
        worker = Worker(parent, start, Counters.attach(fds[0], counters.NAMES), fds[1])
    except OSError as error:
        # A predecessor that is still ending, or a disk that takes no records: the parent tries again.
        print(f"flow.worker.{start.worker}: {error}", file=sys.stderr)
        return 1
    worker.drain.on_sigterm()
    # Flows die by their counts of references. A full collection would look at all of them, which takes a millisecond for every twenty thousand,
    # and finds nothing; the young generations are collected as ever.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 1_000_000)
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
