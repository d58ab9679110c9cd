"""The live table: every live flow of a worker, in a file that outlives it.

One writer (the worker), any readers (the parent answers List, Get and Stats from it; a restarted worker learns from it
which clients to reset and which audit records lack their end). Records are fixed: 256 bytes behind a 4 KiB header.
A record is free where its state byte is 0; the state byte is written last at the start and first at the end, so a
reader sees whole records or none. Counts are as of the last checkpoint (1 s).

It is a file in the data directory rather than a memfd in another process, so that it survives whichever of the two
processes dies, and both at once. Limit: `capacity` flows a worker; a full table refuses new flows.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from falkirk.flow.keys import Signature, key_of, lift_key, signature

HEADER: Final = struct.Struct("<8sIIQQIIII")
"""magic, version, capacity, epoch, places in use so far, slot cursors of the vnet pool, of the raw pool, of those that lower."""
HEADER_SIZE: Final = 4096
MAGIC: Final = b"FKLIVE\0\0"
VERSION: Final = 3
RECORD_SIZE: Final = 256
_RECORD: Final = struct.Struct("<BBBBIIHH16s16s16sQQQQQQQ16sB103sQII")
RULE_BYTES: Final = 103
_LEG: Final = struct.Struct("<II")
_LEG_AT: Final = 248
_COUNTS: Final = struct.Struct("<QQQQQ")
_COUNTS_AT: Final = 80
_HIGH_WATER_AT: Final = 24
_CURSORS_AT: Final = 32
_DECIDED: Final = struct.Struct("<16sB103s")
_DECIDED_AT: Final = 120
_STATE_TUNNEL: Final = struct.Struct("<BxxxI")
_FLOW_ID_AT: Final = 16
_BORN_AT: Final = 240
_SOURCE_AT: Final = 32
_SUMS: Final = struct.Struct("<BBxxI8x16s16x16s24xQQ152x")
"""State, family, tunnel, flow id, destination, bytes up and down of a record."""
_SUMS_A_READ: Final = 1024
_HELD: Final = 1
"""`falkirk.flow.table.State.HELD`."""
_U64: Final = struct.Struct("<Q")
_CURSORS: Final = struct.Struct("<IIII")
Cursors = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class LiveRecord:
    """One live flow. Addresses are packed; times are wall-clock nanoseconds; `sequence` is its started record's; a `slot` of 0
    is none."""

    index: int
    state: int
    family: int
    kind: int
    protocol: int
    tunnel: int
    slot: int
    source_port: int
    destination_port: int
    flow_id: bytes
    source: bytes
    destination: bytes
    sequence: int
    start: int
    last: int
    bytes_up: int
    bytes_down: int
    packets_up: int
    packets_down: int
    route_id: bytes
    rule: str
    lower_slot: int = 0
    """The slot of its leg; 0 where it isn't lowered."""
    lower_tunnel: int = 0
    """The tunnel that the leg leads to."""

    @property
    def key(self) -> bytes:
        """Its key in its tunnel; only a lifted TCP flow has a slot."""
        ends = self.source, self.destination, self.source_port, self.destination_port
        return lift_key(*ends) if self.slot else key_of(self.protocol, *ends)

    @property
    def raw(self) -> bool:
        """Whether its tunnel is a `raw` one."""
        return self.kind & 1 != 0

    @property
    def forwarded(self) -> bool:
        """Whether it leads to a device."""
        return self.kind & 2 != 0


def kind_of(raw: bool, forwarded: bool) -> int:
    """The kind of a flow, as it is kept."""
    return raw | forwarded << 1


class LiveTable:
    """The worker's side: a fresh file in place of the predecessor's, which leaves its slot pools' `cursors`."""

    def __init__(self, path: Path, capacity: int, epoch: int, cursors: Cursors = (0, 0, 0, 0)) -> None:
        fresh = path.with_suffix(".new")
        with fresh.open("w+b") as file:
            file.truncate(HEADER_SIZE + capacity * RECORD_SIZE)
            self._map = mmap.mmap(file.fileno(), 0)
        self._map[: HEADER.size] = HEADER.pack(MAGIC, VERSION, capacity, epoch, 0, *cursors)
        fresh.replace(path)
        self.capacity = capacity
        self._free: list[int] = []
        self._high_water = 0

    @property
    def full(self) -> bool:
        """Whether there is no place left."""
        return not self._free and self._high_water == self.capacity

    def claim(self) -> int | None:
        """A place for a flow, or None where the table is full."""
        if self._free:
            return self._free.pop()
        if self._high_water == self.capacity:
            return None
        self._high_water += 1
        _U64.pack_into(self._map, _HIGH_WATER_AT, self._high_water)
        return self._high_water - 1

    def begin(
        self,
        index: int,
        state: int,
        kind: int,
        tunnel: int,
        slot: int,
        key: bytes,
        flow_id: bytes,
        sequence: int,
        start: int,
        route_id: bytes,
        rule: bytes,
        born: int = 0,
    ) -> None:
        """Fill a claimed place with a new flow; `key` is its signature, `rule` is cut to `RULE_BYTES`, `born` is `start` on the monotonic clock."""
        at = HEADER_SIZE + index * RECORD_SIZE
        protocol, source, destination, source_port, destination_port = signature(key)
        _RECORD.pack_into(
            self._map,
            at,
            0,
            4 if len(source) == 4 else 6,
            kind,
            protocol,
            tunnel,
            slot,
            source_port,
            destination_port,
            flow_id,
            source,
            destination,
            sequence,
            start,
            start,
            0,
            0,
            0,
            0,
            route_id,
            min(len(rule), RULE_BYTES),
            rule,
            born,
            0,
            0,
        )
        self._map[at] = state

    def identity(self, index: int) -> bytes:
        """The id of the flow at a place; the last one's where it is free."""
        at = HEADER_SIZE + index * RECORD_SIZE + _FLOW_ID_AT
        return self._map[at : at + 16]

    def born(self, index: int) -> int:
        """When the flow at a place began, monotonic nanoseconds."""
        born: int = _U64.unpack_from(self._map, HEADER_SIZE + index * RECORD_SIZE + _BORN_AT)[0]
        return born

    def lowered(self, index: int, slot: int, tunnel: int) -> None:
        """A flow has a leg: its slot, and the tunnel that it leads to."""
        _LEG.pack_into(self._map, HEADER_SIZE + index * RECORD_SIZE + _LEG_AT, slot, tunnel)

    def state(self, index: int, state: int) -> None:
        """Change a flow's state."""
        self._map[HEADER_SIZE + index * RECORD_SIZE] = state

    def decided(self, index: int, route_id: bytes, rule: bytes) -> None:
        """Another route or rule has a flow go on."""
        _DECIDED.pack_into(
            self._map,
            HEADER_SIZE + index * RECORD_SIZE + _DECIDED_AT,
            route_id,
            min(len(rule), RULE_BYTES),
            rule,
        )

    def counts(self, index: int, last: int, up: int, down: int, packets_up: int, packets_down: int) -> None:
        """Checkpoint a flow's counts."""
        _COUNTS.pack_into(
            self._map, HEADER_SIZE + index * RECORD_SIZE + _COUNTS_AT, last, up, down, packets_up, packets_down
        )

    def cursors(self, cursors: Cursors) -> None:
        """Keep where the slot pools stand, for a successor."""
        _CURSORS.pack_into(self._map, _CURSORS_AT, *cursors)

    def release(self, index: int) -> None:
        """Free a place."""
        self._map[HEADER_SIZE + index * RECORD_SIZE] = 0
        self._free.append(index)


class LiveReader:
    """A reader's side. Raises ValueError for a file that isn't a live table of this version."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = self._map[: HEADER.size].ljust(HEADER.size, b"\0")
        magic, version, self.capacity, self.epoch, *_ = HEADER.unpack(whole)
        size = HEADER_SIZE + self.capacity * RECORD_SIZE
        if magic != MAGIC or version != VERSION or len(self._map) < size:
            raise ValueError(f"{path}: not a live table of version {VERSION}")

    @property
    def cursors(self) -> Cursors:
        """Where the slot pools stood."""
        vnet, raw, lower_vnet, lower_raw = _CURSORS.unpack_from(self._map, _CURSORS_AT)
        return vnet, raw, lower_vnet, lower_raw

    def __iter__(self) -> Iterator[LiveRecord]:
        return self.records(0)

    def records(self, start: int) -> Iterator[LiveRecord]:
        """Live flows from place `start` on."""
        for index in range(start, self._places):
            record = self.record(index)
            if record is not None:
                yield record

    @property
    def _places(self) -> int:
        """Places that have ever been in use: behind them there is nothing to look for."""
        high_water: int = _U64.unpack_from(self._map, _HIGH_WATER_AT)[0]
        capacity: int = self.capacity
        return min(high_water, capacity)

    def _find(self, data: bytes, offset: int) -> Iterator[LiveRecord]:
        """Live flows whose record has these bytes at an offset."""
        end = HEADER_SIZE + self._places * RECORD_SIZE
        at = self._map.find(data, HEADER_SIZE, end)
        while at >= 0:
            index, found = divmod(at - HEADER_SIZE, RECORD_SIZE)
            record = self.record(index) if found == offset else None
            if record is not None:
                yield record
            at = self._map.find(data, at + 1, end)

    def record(self, index: int) -> LiveRecord | None:
        """The flow at a place, None where it is free."""
        at = HEADER_SIZE + index * RECORD_SIZE
        if not self._map[at]:
            return None
        *values, length, rule, _, lower_slot, lower_tunnel = _RECORD.unpack_from(self._map, at)
        family = values[1]
        size = 4 if family == 4 else 16
        values[9] = values[9][:size]
        values[10] = values[10][:size]
        return LiveRecord(*(index, *values, rule[:length].decode(errors="replace"), lower_slot, lower_tunnel))

    def find(self, flow_id: bytes) -> LiveRecord | None:
        """The live flow with this id."""
        return next(self._find(flow_id, _FLOW_ID_AT), None)

    def between(self, said: Signature) -> Iterator[LiveRecord]:
        """Live flows of any tunnel with this signature."""
        protocol, source, destination, source_port, destination_port = said
        wanted = (protocol, source_port, destination_port, len(source))
        for record in self._find(source.ljust(16, b"\0") + destination.ljust(16, b"\0"), _SOURCE_AT):
            if (record.protocol, record.source_port, record.destination_port, len(record.source)) == wanted:
                yield record

    def count(self, tunnels: Collection[int]) -> tuple[int, int]:
        """Live flows of these tunnels, and those of them that are held."""
        flows = held = 0
        for index in range(self._places):
            state, tunnel = _STATE_TUNNEL.unpack_from(self._map, HEADER_SIZE + index * RECORD_SIZE)
            if state and tunnel in tunnels:
                flows += 1
                held += state == _HELD
        return flows, held

    def sums(self) -> Iterator[tuple[int, bytes, bytes, int, int]]:
        """Of each live flow its tunnel, id, packed destination, and IP bytes up and down: cheaper than whole records by ten times."""
        places = self._places
        for start in range(0, places, _SUMS_A_READ):
            end = min(places, start + _SUMS_A_READ)
            data = self._map[HEADER_SIZE + start * RECORD_SIZE : HEADER_SIZE + end * RECORD_SIZE]
            for state, family, tunnel, flow_id, destination, up, down in _SUMS.iter_unpack(data):
                if state:
                    yield tunnel, flow_id, destination[:4] if family == 4 else destination, up, down

    def is_at(self, path: Path) -> bool:
        """Whether this still is the table at `path`, and no successor has put its own there."""
        return path.exists() and path.stat().st_ino == self._inode

    def close(self) -> None:
        """Let the file go."""
        self._map.close()
