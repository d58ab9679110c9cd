"""The audit log on disk: one thread writes, in batches that share one fsync.

    append ──► queue ──► writer: admit ─► write ─► fdatasync ─► marks move ─► futures and `on_stored`

Each record is stored exactly once however often it is delivered, and whatever kills the process: marks are read from the
segments themselves (`falkirk.policy.segment`). A batch is at most `BATCH_RECORDS` records or what came within
`flush_milliseconds` of its first one. Where writing or syncing fails (a full disk) the segment is cut back to what was
synced, the batch's senders get the OSError, and they deliver again.

Segments rotate by size and age; the oldest go when the log is larger or older than it may be, never the one being
written. A directory is owned by one process (a lock says so). Limit: one writer thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import msgspec

from falkirk.policy import segment
from falkirk.policy.records import Key, Record, admit, forget

BATCH_RECORDS: Final = 1000


class AuditLocked(Exception):
    """Another process writes this log."""


class Limits(msgspec.Struct, frozen=True):
    """When segments rotate and go."""

    segment_bytes: int = 64 << 20
    segment_seconds: int = 24 * 3600
    retain_bytes: int = 4 << 30
    retain_seconds: int = 90 * 24 * 3600
    flush_milliseconds: int = 20


class Stored(msgspec.Struct, frozen=True):
    """Records that have just become durable; times in wall-clock nanoseconds."""

    records: list[Record]
    received_at: int
    stored_at: int


class _Job(msgspec.Struct):
    records: Sequence[Record]
    received_at: int
    done: Future[dict[Key, int]]


class AuditStore:
    """The log of one directory. `counters` count since `open`; `on_stored` is called in the writer's thread."""

    def __init__(self, directory: Path, limits: Limits, on_stored: Callable[[Stored], None] | None = None) -> None:
        self.directory = directory
        self.limits = limits
        self.on_stored = on_stored
        self.on_failed: Callable[[], None] | None = None
        """Called in the writer's thread where that ends before `close`: nothing is stored any more."""
        self.counters: Counter[str] = Counter()
        self._marks: dict[Key, int] = {}
        self._fd = -1
        self._lock_fd = -1
        self._number = 0
        self._opened_at = 0
        self._synced = 0
        self._jobs: deque[_Job] = deque()
        self._owed: dict[Key, int] = {}
        """By key: the lowest sequence of those that a commit failed on and that weren't delivered again."""
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="audit-writer")

    # Opening

    def open(self) -> None:
        """Recovers what is there and starts the writer. Raises AuditLocked, OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock_fd)
            raise AuditLocked(f"{self.directory}: another process writes this log") from error
        self._recover(time.time_ns())
        self._thread.start()

    def _recover(self, now: int) -> None:
        """Continues the newest segment; one that can't be read is put aside, what follows its whole lines too."""
        for draft in self.directory.glob("*.new"):
            draft.unlink()
        for number in reversed(self.segments()):
            self._number = max(self._number, number)
            path = self.path(number)
            data = path.read_bytes()
            try:
                found = segment.recover(data)
            except segment.UnreadableSegment:
                path.rename(path.with_suffix(".damaged"))
                self.counters["segments_damaged"] += 1
                continue
            self._marks = found.marks
            if number != self._number:
                break
            if data[found.length :].count(b"\n"):  # more than an unfinished line
                path.with_suffix(f".{found.length}.damaged").write_bytes(data[found.length :])
                self.counters["tails_damaged"] += 1
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._cut(found.length)
            self._opened_at = found.opened_at
            return
        self._rotate(now)

    # Reading, from any thread

    def path(self, number: int) -> Path:
        """A segment's file."""
        return self.directory / segment.name(number)

    def segments(self) -> list[int]:
        """Numbers of the segments there are, ascending."""
        numbers = (segment.number(path.name) for path in self.directory.iterdir())
        return sorted(number for number in numbers if number is not None)

    def durable(self, number: int) -> int | None:
        """How many bytes of a segment may be read: of the one being written those that are synced, of others (None) all."""
        with self._wake:
            return self._synced if number == self._number else None

    def marks(self) -> dict[Key, int]:
        """A copy of the high-water marks."""
        with self._wake:
            return dict(self._marks)

    # Writing

    def append(self, records: Sequence[Record]) -> Future[dict[Key, int]]:
        """Stores records that aren't stored yet. The future gives the marks of their keys once they are durable, or OSError."""
        job = _Job(records, time.time_ns(), Future())
        # From here on it can't be cancelled: a sender that leaves (its stream is broken) doesn't take back what it has sent, and
        # later requests of it must find these records stored, or they would be taken for lost.
        job.done.set_running_or_notify_cancel()
        with self._wake:
            if self._closing:
                raise RuntimeError("the audit store is closed")
            self._jobs.append(job)
            self._wake.notify()
        return job.done

    def close(self) -> None:
        """Stores what was appended, then stops."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        os.close(self._fd)
        os.close(self._lock_fd)

    def _run(self) -> None:
        try:
            while jobs := self._take():
                self._commit(jobs)
        finally:
            if not self._closing and self.on_failed is not None:
                self.on_failed()

    def _take(self) -> list[_Job]:
        """The next batch; empty once closed and drained."""
        with self._wake:
            self._wake.wait_for(lambda: self._jobs or self._closing)
            deadline = time.monotonic() + self.limits.flush_milliseconds / 1000
            while not self._closing and sum(len(job.records) for job in self._jobs) < BATCH_RECORDS:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    break
                self._wake.wait(remaining)
            jobs: list[_Job] = []
            count = 0
            while self._jobs and (not jobs or count + len(self._jobs[0].records) <= BATCH_RECORDS):
                jobs.append(self._jobs.popleft())
                count += len(jobs[-1].records)
            return jobs

    def _commit(self, jobs: list[_Job]) -> None:
        jobs = [job for job in jobs if not self._out_of_turn(job)]
        now = time.time_ns()
        moved: dict[Key, int] = {}
        fresh: list[Record] = []
        batches = []
        for job in jobs:
            batch = admit(job.records, moved, self._marks)
            moved |= batch.marks
            fresh += batch.fresh
            batches.append(batch)
        try:
            if fresh:
                if self._synced >= self.limits.segment_bytes or (
                    now - self._opened_at >= self.limits.segment_seconds * 1_000_000_000
                ):
                    self._rotate(now)
                    self._retain(now)
                self._write(segment.lines(fresh, now))
        except OSError as error:
            self.counters["commits_failed"] += 1
            with contextlib.suppress(OSError):
                self._cut(self._synced)
            for job in jobs:
                for record in job.records:
                    self._owed[record.key] = min(record.sequence, self._owed.get(record.key, record.sequence))
                job.done.set_exception(error)
            return
        with self._wake:
            self._marks |= moved
        self.counters["commits"] += 1
        for record in fresh:
            self.counters[f"stored_{record.event}"] += 1
        for job, batch in zip(jobs, batches, strict=True):
            self.counters["duplicates"] += batch.duplicates
            self.counters["missing"] += batch.missing
            job.done.set_result(batch.marks)
            if self.on_stored is not None and batch.fresh:
                self.on_stored(Stored(batch.fresh, job.received_at, now))

    def _out_of_turn(self, job: _Job) -> bool:
        """Refuse what was under way behind records that couldn't be stored: stored first, it would make those look like duplicates."""
        for record in job.records:
            owed = self._owed.get(record.key)
            if owed is None:
                continue
            if record.sequence > owed:
                job.done.set_exception(OSError(errno.EAGAIN, "earlier records weren't stored; deliver those first"))
                return True
            del self._owed[record.key]
        return False

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fdatasync(self._fd)
        with self._wake:
            self._synced += len(data)

    def _cut(self, length: int) -> None:
        """Ends the current segment at a length, durably."""
        os.ftruncate(self._fd, length)
        os.lseek(self._fd, length, os.SEEK_SET)
        os.fdatasync(self._fd)
        with self._wake:
            self._synced = length

    def _rotate(self, now: int) -> None:
        """Opens the next segment: whole under its name, or not there."""
        number = self._number + 1
        with self._wake:
            forget(self._marks)
        first = segment.header(number, now, self._marks)
        path = self.path(number)
        draft = path.with_suffix(".new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            os.write(fd, first)
            os.fsync(fd)
            draft.rename(path)
            self._sync_directory()
        except OSError:
            # Records go on in the old segment, so one that counts as newer must not be found.
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        with self._wake:
            self._fd, self._number, self._opened_at, self._synced = fd, number, now, len(first)

    def _retain(self, now: int) -> None:
        """Removes the oldest segments beyond what is kept. A segment is as old as the next one's opening."""
        numbers = self.segments()
        sizes = {number: self.path(number).stat().st_size for number in numbers}
        total = sum(sizes.values())
        for number, following in itertools.pairwise(numbers):
            with open(self.path(following), "rb") as file:
                try:
                    ended = segment.opened(file.readline())
                except segment.UnreadableSegment:
                    return
            too_old = now - ended > self.limits.retain_seconds * 1_000_000_000
            if total <= self.limits.retain_bytes and not too_old:
                return
            self.path(number).unlink()
            total -= sizes[number]
            self.counters["segments_removed"] += 1

    def _sync_directory(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
