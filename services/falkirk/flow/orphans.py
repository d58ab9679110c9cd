"""What a predecessor left: streams whose flow worker died.

Its live table names them. Each flow of any protocol gets the `ended` record that it lacks (reason `tracker_lost`, counts as of the last
checkpoint), unless its start was never written, or its end was. Each slot that was in use rests. The upgrader resets the
streams; their RSTs come out of the TUN devices and are led back by `back` and the deltas kept here.

A client whose RST hasn't been seen (it was dropped on the way; its stream was over for the upgrader, so that nothing but
the kernel still had the end of it; the upgrader died with its namespace) is *probed*: a segment outside its window makes it say
where it stands (RFC 9293 3.10.7.4: an unacceptable segment is answered with an ACK), and that ACK, which no flow knows,
gets the RST with the right sequence number. It is probed again twice, a second apart: Linux answers such a segment only every
half second (tcp_invalid_ratelimit), and the kernel at the other end may just have asked, a window of zero for instance.

The books are closed before the predecessor's live table gives way, and what is in the spool isn't written again, so that a
worker that is killed at any point of this leaves its successor the rest to do and nothing twice; clients that aren't told
yet are in a file of their own until they are. A lock makes sure that the
predecessor has ended: a killed parent's worker may live a moment longer than it.

Limits: contexts of tunnels are appended to a file beside the live table and read once, at the next start. Streams of tunnels
that don't come back within `PATIENCE` aren't looked for any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.flow import records
from falkirk.flow.live import Cursors, LiveReader, LiveRecord
from falkirk.flow.table import TcpLift, native_sum
from falkirk.runtime.spool import last_epoch, last_words, repair
from falkirk.wire.build import segment
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.slots import LOWERED, SlotPlan

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

ACK: Final = 16
PATIENCE: Final = 60
"""Seconds for which lost streams wait for their tunnel."""
PROBES: Final = 4096
"""Clients that begin to be probed a second, at most."""
TRIES: Final = 3


class Orphan(msgspec.Struct, frozen=True, gc=False):
    """How the way back of a lost stream rewrites a packet; the names are those of `falkirk.flow.table.TcpLift`."""

    tunnel: int
    back: bytes
    delta_addresses: int
    delta_all: int


class TunnelLine(msgspec.Struct):
    """A line of the contexts' file."""

    tunnel: int
    context: TunnelContext


class Orphans:
    """Read before this worker's own live table replaces its predecessor's. Raises BlockingIOError where that one still lives."""

    def __init__(self, live: Path, spool: Path, plan: SlotPlan, worker: int) -> None:
        live.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(live.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        repair(spool)
        self._spool = spool
        self._plan = plan
        self._number = worker
        self._by_slot: dict[int, Orphan] = {}
        self._records: list[LiveRecord] = []
        self.cursors: Cursors = (0, 0, 0, 0)
        self.tunnels: set[int] = set()
        """Tunnels that have lost streams."""
        self._untold_path = live.with_suffix(".untold")
        # One that is missing or of another version has nothing to say.
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            self._by_slot = _untold(self._untold_path.read_bytes())
            self.tunnels.update(orphan.tunnel for orphan in self._by_slot.values())
        self._contexts_path = live.with_suffix(".tunnels")
        self._contexts = read_contexts(self._contexts_path)
        self._epoch = 0
        self._log = -1
        self._silent: list[tuple[int, bytes, int]] = []
        """Clients to probe: tunnel, way back, tries left; where those are more than `TRIES`, seconds to wait for the tunnel too."""
        self._seconds = 0
        self._keeps_file = bool(self._by_slot)
        if live.exists():
            self._read(live)
        self.epoch = max(self._epoch, last_epoch(spool))
        """The newest epoch of a predecessor."""

    def _read(self, path: Path) -> None:
        try:
            table = LiveReader(path)
        except ValueError:
            return  # Of another version, or never finished: there is nothing to learn from it.
        self._epoch = table.epoch
        self.cursors = table.cursors
        for record in table:
            self._records.append(record)
            if record.slot:
                self.tunnels.add(record.tunnel)
                self._by_slot[record.slot] = self._orphan(record)
            if record.lower_slot:
                self.tunnels.add(record.lower_tunnel)
                self._by_slot[record.lower_slot] = self._leg(record)
        table.close()

    def _orphan(self, record: LiveRecord) -> Orphan:
        plan = self._plan
        framing = Framing.RAW if record.raw else Framing.VNET
        one = plan.slot(framing, 1)
        address = plan.address4 if record.family == 4 else plan.address6
        key = record.key
        ports = key[-4:]
        back = record.destination + record.source + ports[2:] + ports[:2]
        inside = address(self._number, record.slot) + address(self._number, one)
        addresses = (native_sum(record.source + record.destination) - native_sum(inside)) % 0xFFFF
        # Of the listener's port, which only the upgrader knows, nothing is in here: see `take`.
        everything = (native_sum(key) - native_sum(inside + ports[:2])) % 0xFFFF
        return Orphan(record.tunnel, back, (0xFFFF - addresses) % 0xFFFF, (0xFFFF - everything) % 0xFFFF)

    def _leg(self, record: LiveRecord) -> Orphan:
        """How its leg rewrote what went to the device."""
        plan = self._plan
        slot = record.lower_slot & ~LOWERED
        one = plan.slot(Framing.RAW if slot >> plan.index_bits else Framing.VNET, 1)
        address = plan.address4 if record.family == 4 else plan.address6
        inside = address(self._number, slot) + address(self._number, one)
        # Ports are the same on both sides.
        addresses = (native_sum(inside) - native_sum(record.source + record.destination)) % 0xFFFF
        ports = record.source_port.to_bytes(2, "big") + record.destination_port.to_bytes(2, "big")
        towards = record.source + record.destination + ports
        return Orphan(record.lower_tunnel, towards, addresses, addresses)

    def bury(self, worker: Worker) -> None:
        """Write the ends that are missing, before anything of the predecessor's is given up. Raises OSError where the disk
        doesn't take them."""
        words = last_words(self._spool, self._epoch)
        for record in self._records:
            flow_id = record.flow_id.hex()
            if record.sequence > words.sequence or flow_id in words.ended:
                continue
            worker.write_record(
                "ended",
                record.flow_id,
                records.of_tunnel(record.tunnel, self._contexts.get(record.tunnel))
                + records.of_key(record.key)
                + records.of_rule(record.rule)
                + records.of_reason("tracker_lost")
                + records.of_counts(
                    record.bytes_up,
                    record.bytes_down,
                    record.packets_up,
                    record.packets_down,
                    max(worker.wall - record.start, 0),
                ),
            )
        if worker.spool.pending and not worker.spool.flush():
            raise OSError(f"the ends of lost flows can't be recorded: {worker.spool.error}")
        if self._by_slot:
            # This worker may be killed before all clients are told.
            fresh = self._untold_path.with_suffix(".new-untold")
            fresh.write_bytes(msgspec.msgpack.encode(self._by_slot))
            fresh.replace(self._untold_path)
            self._keeps_file = True
        self._records.clear()
        self._contexts.clear()
        self.begin_contexts()

    def begin_contexts(self) -> None:
        """A fresh contexts' file in place of the predecessor's."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._log = os.open(self._contexts_path, flags, 0o600)

    def remember(self, tunnel: int, context: TunnelContext) -> None:
        """Keep a tunnel's context for a successor."""
        # A full disk costs a successor's records their names, and nobody his tunnel.
        with contextlib.suppress(OSError):
            os.write(self._log, msgspec.json.encode(TunnelLine(tunnel, context)) + b"\n")

    def close(self) -> None:
        """Let the files go."""
        os.close(self._log)
        os.close(self._lock)

    def take(self, lane: Lane, index: int, listener_port: bytes) -> Orphan | None:
        """The lost stream of a slot, once. `index` is the lane's; `listener_port` completes the checksum's delta."""
        slot = lane.first_slot + index
        orphan = self._by_slot.pop(slot, None) if self._by_slot else None
        if orphan is None or slot >= LOWERED:
            return orphan
        return msgspec.structs.replace(orphan, delta_all=(orphan.delta_all + native_sum(listener_port)) % 0xFFFF)

    def untold(self, orphan: Orphan) -> None:
        """The RST of a lost stream found its tunnel full, or without its device yet."""
        self._silent.append((orphan.tunnel, orphan.back, TRIES))

    def reset(self, worker: Worker, flow: TcpLift) -> None:
        """Tell the client of a flow whose upgrader is gone, where the kernel's RST hasn't."""
        if flow.held is not None:
            packet, flow.held = flow.held, None
            flow.tunnel.device.held -= 1
            worker.answers.reset(flow.tunnel, packet)
        elif not flow.reset:
            self._silent.append((flow.tunnel.id, flow.back, TRIES))

    def seek(self, number: int, back: bytes) -> None:
        """The same where the tunnel has gone with another worker, and may come back with its successor within `PATIENCE`."""
        self._silent.append((number, back, TRIES + PATIENCE))

    def ask(self, worker: Worker, number: int, back: bytes) -> None:
        """Probe one end of a connection that nobody carries any more. `back` is the signature of packets towards it, 12 or 36 bytes."""
        tunnel = worker.tunnels.get(number)
        if tunnel is not None:
            sent = worker.tunnels.say(tunnel, _probe(back), counted=False)
            self._silent.append((number, back, TRIES - sent))

    def each_second(self, worker: Worker) -> None:
        """Look for clients that haven't been told yet, once the upgrader has been asked to reset everything."""
        if self._by_slot and worker.pair.ready:
            here = [slot for slot, orphan in self._by_slot.items() if worker.tunnels.reach(orphan.tunnel)]
            for slot in here[:PROBES]:
                orphan = self._by_slot.pop(slot)
                self._silent.append((orphan.tunnel, orphan.back, TRIES))
            self._seconds += 1
            if self._seconds > PATIENCE:
                self._by_slot.clear()
        if self._silent:
            self.probe(worker)
        if self._keeps_file and not self._by_slot and not self._silent:
            self._keeps_file = False
            self._untold_path.unlink(missing_ok=True)

    def probe(self, worker: Worker) -> None:
        """Probe those that must be, and once more in a second; what their tunnel doesn't take now isn't counted as a try."""
        silent, self._silent = self._silent, []
        for number, back, tries in silent:
            tunnel = worker.tunnels.reach(number)
            if tunnel is not None and tries:
                sent = worker.tunnels.say(tunnel, _probe(back), counted=False)
                self._silent.append((number, back, min(tries, TRIES) - sent))
            elif tries > TRIES:
                self._silent.append((number, back, tries - 1))


_untold: Final = msgspec.msgpack.Decoder(dict[int, Orphan]).decode


def _probe(back: bytes) -> bytes:
    """A segment from the destination to the initiator that fits nothing."""
    size = (len(back) - 4) // 2
    random = os.urandom(8)
    return segment(
        back[:size],
        back[size : 2 * size],
        int.from_bytes(back[-4:-2], "big"),
        int.from_bytes(back[-2:], "big"),
        int.from_bytes(random[:4], "big"),
        int.from_bytes(random[4:], "big"),
        ACK,
    )


def read_contexts(path: Path) -> dict[int, TunnelContext]:
    """The contexts' file; lines that were half written are left out."""
    if not path.exists():
        return {}
    decode = msgspec.json.Decoder(TunnelLine).decode
    contexts = {}
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            found = decode(line)
            contexts[found.tunnel] = found.context
    return contexts
