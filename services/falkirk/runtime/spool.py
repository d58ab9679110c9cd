"""The audit spool: what a packet process did, on its own disk before the world sees it.

A record's id is (node, worker, epoch, sequence). The worker appends the records of a loop turn with one write, before
the messages of that turn leave, so no flow's first packet goes out unrecorded. Segments are NDJSON files named
`<epoch>-<number>.ndjson`; the parent reads them, delivers them to `policy` and deletes those that are acknowledged,
except the newest two, from which a restarted worker learns how far its predecessor came.

A segment is made when there is something to write to it, so the newest one of an epoch always holds its last flush. A
worker killed in mid-write leaves a torn last line: its successor cuts it off. Records aren't fsynced here: they
survive the process, not the machine; `policy` fsyncs what it stores.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

SEGMENT_BYTES: Final = 8 * 1024 * 1024


class AuditRecord(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One audit record; keys are absent where they don't apply. Times are wall clock; durations are monotonic."""

    event: str
    """started, denied or ended; capture_started or capture_ended: somebody looked at packets (each worker records that it is asked)."""
    flow_id: str
    """32 hexadecimal digits; also the trace id. Of a capture: the flow that was asked for, else empty."""
    time: str
    """RFC 3339 in UTC with nanoseconds."""
    node: str
    worker: int
    epoch: int
    sequence: int
    tenant: str = ""
    tenant_id: str = ""
    device: str = ""
    device_id: str = ""
    user: str = ""
    """The device's owner."""
    groups: list[str] = []
    """Of the owner and of the device."""
    virtual_network: str = ""
    tunnel_id: int = 0
    protocol: str = ""
    source: str = ""
    source_port: int = 0
    destination: str = ""
    destination_port: int = 0
    rule: str = ""
    """The rule that decided, as policy/rule; absent for the default deny."""
    why: str = ""
    route_id: str = ""
    treatment: str = ""
    destination_device: str = ""
    """The device that the destination leads to."""
    destination_device_id: str = ""
    destination_user: str = ""
    """That device's owner."""
    destination_groups: list[str] = []
    reason: str = ""
    """Why it was denied or how it ended."""
    bytes_up: int = 0
    """IP bytes from the initiator."""
    bytes_down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    duration_ns: int = 0
    count: int = 0
    """How often the same denied flow was tried again since the last record of it. Of a capture: packets that were handed over."""
    sampled: bool = False
    span_id: str = ""
    """The flow's root span, 16 hexadecimal digits, where it is sampled."""
    resolve_ns: int = 0
    """How long the route took to find, where it is sampled."""
    decide_ns: int = 0
    """How long the verdict took, where it is sampled."""
    capture_id: str = ""
    """32 hexadecimal digits: one capture, at all workers."""
    by: str = ""
    """Who captured, and why, as they said."""
    filter: str = ""
    """Of which flows: an expression."""
    dropped_only: bool = False
    snaplen: int = 0
    """Bytes of each packet that were kept at most; absent: all."""
    lost: int = 0
    """Captured packets that the watcher lost."""


class SpoolWriter:
    """Appends records of one epoch."""

    def __init__(self, directory: Path, epoch: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.epoch = epoch
        self.sequence = 0
        self.stuck = False
        """The disk doesn't take records: no new flow may start."""
        self.error = ""
        """What the disk said last."""
        self._rest = b""
        self._number = 0
        self._size = 0
        self.pending: list[bytes] = []
        """Records that `flush` will write."""
        self._file = -1

    def add(self, line: str) -> None:
        """Queue a record, whose sequence is `next()`'s."""
        self.pending.append(line.encode())

    def next(self) -> int:
        """The next sequence number."""
        self.sequence += 1
        return self.sequence

    def flush(self) -> bool:
        """Write what is queued; False where the disk doesn't take all of it: the rest stays queued, and `stuck` is set."""
        self.pending.append(b"")
        data = self._rest + b"\n".join(self.pending)
        self.pending = []
        try:
            if self._file < 0:
                self._file = self._open()
            written = os.write(self._file, data)
        except OSError as error:
            written, self.error = 0, str(error)
        self._size += written
        self._rest = data[written:]
        self.stuck = bool(self._rest)
        if self.stuck:
            # A line that is half written is completed by the next flush; a successor would cut it off.
            return False
        if self._size >= SEGMENT_BYTES:
            self.close()
            self._number += 1
            self._size = 0
        return True

    def close(self) -> None:
        """Let the segment go; what wasn't flushed is lost."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        path = self._directory / f"{self.epoch:020d}-{self._number:08d}.ndjson"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def segments(directory: Path) -> list[Path]:
    """Segments in the order in which they were written."""
    return sorted(directory.glob("*.ndjson"))


def epoch_of(segment: Path) -> int:
    """The epoch that a segment belongs to."""
    return int(segment.name.split("-")[0])


def repair(directory: Path) -> None:
    """Cut a torn last line off the newest segment."""
    found = segments(directory)
    if not found:
        return
    with found[-1].open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            file.truncate(end)


class LastWords(msgspec.Struct):
    """What the newest segments of an epoch say of its end."""

    sequence: int
    """The last one written; 0 where there is none."""
    ended: set[str]
    """Flows whose end was written, of those that can still be in the live table."""


class _Head(msgspec.Struct):
    event: str
    flow_id: str
    sequence: int
    epoch: int


def last_words(directory: Path, epoch: int) -> LastWords:
    """Read them from the newest two segments of the epoch (the live table is cleared a turn after the end is written), and
    from all later ones: a successor that died before its own live table was in place has closed some of the books."""
    words = LastWords(0, set())
    decode = msgspec.json.Decoder(_Head).decode
    found = segments(directory)
    later = [path for path in found if epoch_of(path) > epoch]
    for segment in [path for path in found if epoch_of(path) == epoch][-2:] + later:
        for line in segment.read_bytes().splitlines():
            try:
                head = decode(line)
            except msgspec.DecodeError:
                continue  # Of a disk that lost it; a worker that doesn't start would cost more.
            if head.epoch == epoch:
                words.sequence = max(words.sequence, head.sequence)
            if head.event == "ended":
                words.ended.add(head.flow_id)
    return words


def last_epoch(directory: Path) -> int:
    """The newest epoch that wrote anything; 0 where none has."""
    return max(map(epoch_of, segments(directory)), default=0)
