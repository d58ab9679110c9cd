"""From the spool to `policy`, and to whoever watches.

Two cursors run over a worker's spool. The *feed* follows it as it grows and hands records to watchers and to the trace
exporter; it starts at the end, so nobody is told an old story. The *delivery* starts at the oldest segment on disk and
streams records to `policy`; what is acknowledged is forgotten, a segment at a time, but for the newest two (see
`falkirk.runtime.spool`). While `policy` is away the spool grows; nothing is lost, and nothing waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

import grpc
import msgspec
import structlog

from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
from falkirk.runtime.spool import epoch_of, segments

BATCH: Final = 500
"""Records a message, of at most 1000 that the contract allows."""
CHUNK: Final = 256 * 1024
RETRY: Final = 0.5
"""Seconds before a broken stream is opened again."""
IN_FLIGHT: Final = 8
"""Batches that may be unacknowledged."""

log = structlog.get_logger()


class Place(msgspec.Struct):
    """Where a record stands: (epoch, sequence) order all records of a worker."""

    epoch: int
    sequence: int


_place: Final = msgspec.json.Decoder(Place).decode


class SpoolReader:
    """Reads a worker's spool forward, whole lines only."""

    def __init__(self, directory: Path, *, at_end: bool = False) -> None:
        self._directory = directory
        self._segment: Path | None = None
        self._offset = 0
        if at_end:
            found = segments(directory)
            if found:
                self._segment, self._offset = found[-1], found[-1].stat().st_size

    def read(self) -> list[bytes]:
        """The next lines, at most `CHUNK` bytes of them; empty where there is nothing new."""
        while True:
            if self._segment is None or not self._segment.exists():
                following = [
                    path for path in segments(self._directory) if self._segment is None or path > self._segment
                ]
                if not following:
                    return []
                self._segment, self._offset = following[0], 0
            with self._segment.open("rb") as file:
                file.seek(self._offset)
                data = file.read(CHUNK)
            end = data.rfind(b"\n") + 1
            if end:
                self._offset += end
                return data[:end].splitlines()
            # A segment that isn't the newest is finished; a torn last line of it will never be completed.
            following = [path for path in segments(self._directory) if path > self._segment]
            if not following:
                return []
            self._segment, self._offset = following[0], 0


class Delivery:
    """One worker's spool. `on_lines` is called with new lines as they are written."""

    def __init__(self, directory: Path, on_lines: Callable[[list[bytes]], None]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._on_lines = on_lines
        self._feed = SpoolReader(directory, at_end=True)
        self._grown = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self.acknowledged = Place(0, 0)
        self._written: dict[int, list[int]] = {}
        """First and last sequence number of each epoch whose records may not all be acknowledged."""
        for segment in segments(directory):
            self._wrote(_ends(segment))

    @property
    def pending(self) -> int:
        """Records on disk that policy hasn't acknowledged to this process."""
        seen = self.acknowledged
        return sum(
            max(last - max(first - 1, seen.sequence if epoch == seen.epoch else 0), 0)
            for epoch, (first, last) in self._written.items()
            if epoch >= seen.epoch
        )

    def _wrote(self, lines: list[bytes]) -> None:
        """Lines of one segment are on disk."""
        if lines:
            first, last = _place(lines[0]), _place(lines[-1])
            self._written.setdefault(first.epoch, [first.sequence, 0])[1] = last.sequence

    def grown(self) -> None:
        """The worker says that the spool has grown."""
        while lines := self._feed.read():
            self._wrote(lines)
            self._on_lines(lines)
        self._grown.set()

    async def run(self, stub: policy_service_pb2_grpc.AuditServiceStub) -> None:
        """Deliver until cancelled."""
        while True:
            try:
                await self._stream(stub)
            except grpc.aio.AioRpcError as error:
                log.info("audit_delivery_waits", code=error.code().name, pending=self.pending)
            await asyncio.sleep(RETRY)

    async def delivered(self) -> None:
        """Returns once policy has acknowledged all there is."""
        while self.pending:
            self._acknowledged.clear()
            await self._acknowledged.wait()

    async def _stream(self, stub: policy_service_pb2_grpc.AuditServiceStub) -> None:
        room = asyncio.Semaphore(IN_FLIGHT)
        async for response in stub.Deliver(self._batches(room)):
            room.release()
            self.acknowledge(response.epoch, response.sequence)

    def acknowledge(self, epoch: int, sequence: int) -> None:
        """Policy has everything up to this record."""
        self.acknowledged = Place(epoch, sequence)
        for older in [known for known in self._written if known < epoch]:
            del self._written[older]
        self._acknowledged.set()
        self._forget()

    async def _batches(self, room: asyncio.Semaphore) -> AsyncIterator[policy_service_pb2.DeliverRequest]:
        reader = SpoolReader(self._directory)
        while True:
            self._grown.clear()
            lines = reader.read()
            if not lines:
                await self._grown.wait()
                continue
            for batch in _batches(lines):
                await room.acquire()
                yield policy_service_pb2.DeliverRequest(records=batch)

    def _forget(self) -> None:
        """Delete segments that are wholly acknowledged, except the newest two."""
        found = segments(self._directory)
        for segment, following in pairwise(found[:-1]):
            done = self.acknowledged.epoch > epoch_of(segment)
            if not done and epoch_of(following) == epoch_of(segment):
                with following.open("rb") as file:
                    line = file.readline()
                done = line.endswith(b"\n") and self.acknowledged.sequence >= _place(line).sequence - 1
            if not done:
                return
            segment.unlink()


def _ends(segment: Path) -> list[bytes]:
    """The first and the last whole line of a segment."""
    with segment.open("rb") as file:
        first = file.readline()
        file.seek(max(0, segment.stat().st_size - CHUNK))
        tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1].splitlines()
    return [first, whole[-1]] if whole else []


class _Record(msgspec.Struct):
    node: str
    worker: int
    epoch: int
    sequence: int


_record: Final = msgspec.json.Decoder(_Record).decode


def _batches(lines: list[bytes]) -> list[list[policy_service_pb2.AuditRecord]]:
    """Records in batches of one epoch each."""
    batches: list[list[policy_service_pb2.AuditRecord]] = []
    epoch = -1
    for line in lines:
        head = _record(line)
        if head.epoch != epoch or len(batches[-1]) == BATCH:
            batches.append([])
            epoch = head.epoch
        batches[-1].append(
            policy_service_pb2.AuditRecord(
                node=head.node, worker=head.worker, epoch=head.epoch, sequence=head.sequence, json=line.decode()
            )
        )
    return batches
