"""What a predecessor left: streams whose flow worker died.

Its live table names them. Each gets the `ended` record that it lacks (reason `tracker_lost`, counts as of the last
checkpoint), unless its start was never written, or its end was. Each slot that was in use rests. The upgrader resets the
streams; their RSTs come out of the TUN devices and are led back by `back` and the deltas kept here.

A flow whose upgrader died without its RST being seen is *probed*: a segment outside the client's window makes it say
where it stands (RFC 9293 3.10.7.4: an unacceptable segment is answered with an ACK), and that ACK, which no flow knows,
gets the RST with the right sequence number.

Limit: contexts of tunnels are appended to a file beside the live table and read once, at the next start.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.flow import records
from falkirk.flow.live import LiveReader, LiveRecord
from falkirk.flow.spool import last_words
from falkirk.flow.table import Flow, native_sum
from falkirk.wire.build import segment
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.slots import FIRST_INDEX, SlotPlan

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

ACK: Final = 16


class Orphan(msgspec.Struct, frozen=True, gc=False):
    """How the way back of a lost stream rewrites a packet; the names are those of `falkirk.flow.table.Flow`."""

    tunnel: int
    back: bytes
    delta_addresses: int
    delta_addresses_back: int
    delta_all: int


class TunnelLine(msgspec.Struct):
    """A line of the contexts' file."""

    tunnel: int
    context: TunnelContext


class Orphans:
    """Read before this worker's own live table replaces its predecessor's."""

    def __init__(self, live: Path, spool: Path, plan: SlotPlan, worker: int) -> None:
        live.parent.mkdir(parents=True, exist_ok=True)
        self._spool = spool
        self._plan = plan
        self._number = worker
        self._by_slot: dict[int, Orphan] = {}
        self._records: list[LiveRecord] = []
        self.cursors = (0, 0)
        self.tunnels: set[int] = set()
        """Tunnels that have lost streams."""
        self._contexts_path = live.with_suffix(".tunnels")
        self._contexts = read_contexts(self._contexts_path)
        self._epoch = 0
        if live.exists():
            self._read(live)
        self._log = os.open(
            self._contexts_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )

    def _read(self, path: Path) -> None:
        try:
            table = LiveReader(path)
        except ValueError:
            return  # Of another version, or never finished: there is nothing to learn from it.
        self._epoch = table.epoch
        self.cursors = table.cursors
        for record in table:
            self._records.append(record)
            self.tunnels.add(record.tunnel)
            self._by_slot[record.slot] = self._orphan(record)
        table.close()

    def _orphan(self, record: LiveRecord) -> Orphan:
        plan = self._plan
        framing = Framing.RAW if record.kind else Framing.VNET
        one = plan.slot(framing, 1)
        address = plan.address4 if record.family == 4 else plan.address6
        ports = record.source_port.to_bytes(2, "big") + record.destination_port.to_bytes(2, "big")
        key = record.source + record.destination + ports
        back = record.destination + record.source + ports[2:] + ports[:2]
        inside = address(self._number, record.slot) + address(self._number, one)
        addresses = (native_sum(record.source + record.destination) - native_sum(inside)) % 0xFFFF
        # Of the listener's port, which only the upgrader knows, nothing is in here: see `take`.
        everything = (native_sum(key) - native_sum(inside + ports[:2])) % 0xFFFF
        return Orphan(record.tunnel, back, (0xFFFF - addresses) % 0xFFFF, addresses, (0xFFFF - everything) % 0xFFFF)

    def bury(self, worker: Worker) -> None:
        """Write the ends that are missing. Called once, when the new spool is open."""
        words = last_words(self._spool, self._epoch)
        for record in self._records:
            flow_id = record.flow_id.hex()
            if record.sequence > words.sequence or flow_id in words.ended:
                continue
            ports = record.source_port.to_bytes(2, "big") + record.destination_port.to_bytes(2, "big")
            worker.write_record(
                "ended",
                record.flow_id,
                records.of_tunnel(record.tunnel, self._contexts.get(record.tunnel))
                + records.of_key(record.source + record.destination + ports)
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
        self._records.clear()
        self._contexts.clear()

    def remember(self, tunnel: int, context: TunnelContext) -> None:
        """Keep a tunnel's context for a successor."""
        # A full disk costs a successor's records their names, and nobody his tunnel.
        with contextlib.suppress(OSError):
            os.write(self._log, msgspec.json.encode(TunnelLine(tunnel, context)) + b"\n")

    def close(self) -> None:
        """Let the contexts' file go."""
        os.close(self._log)

    def take(self, framing: Framing, index: int, listener_port: bytes) -> Orphan | None:
        """The lost stream of a slot, once. `index` is the lane's; `listener_port` completes the checksum's delta."""
        orphan = self._by_slot.pop(self._plan.slot(framing, FIRST_INDEX) + index, None) if self._by_slot else None
        if orphan is None:
            return None
        return msgspec.structs.replace(orphan, delta_all=(orphan.delta_all + native_sum(listener_port)) % 0xFFFF)

    def reset(self, worker: Worker, flow: Flow) -> None:
        """Tell the client of a flow whose upgrader is gone, where the kernel's RST hasn't."""
        if flow.held is not None:
            packet, flow.held = flow.held, None
            flow.tunnel.device.held -= 1
            worker.answers.reset(flow.tunnel, packet)
        elif not flow.reset and not flow.over:
            random = os.urandom(8)
            probe = segment(
                flow.destination,
                flow.source,
                flow.destination_port,
                flow.source_port,
                int.from_bytes(random[:4], "big"),
                int.from_bytes(random[4:], "big"),
                ACK,
            )
            worker.say(flow.tunnel, probe, counted=False)


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
