"""The audit store on a directory: once each, rotation, retention, full disks, reading back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.policy import query
from falkirk.policy.records import Filter, Record, accept, format_time
from falkirk.policy.store import AuditLocked, AuditStore, Limits, Stored

QUICK = Limits(flush_milliseconds=0)
TIMEOUT = 10.0


def records(first: int, last: int, *, epoch: int = 1, tenant: str = "acme", pad: int = 0) -> list[Record]:
    def text(n: int) -> str:
        fields = {"event": "denied" if n % 2 else "started", "tenant": tenant, "time": format_time(n * 10**9)}
        return json.dumps(fields | {"pad": "x" * pad})

    return [accept("local", 0, epoch, n, text(n)) for n in range(first, last + 1)]


def sequences(store: AuditStore, limit: int = 10**6, **wanted: Any) -> list[int]:
    return [json.loads(record)["sequence"] for _, record in query.newest(store, Filter(**wanted), limit)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AuditStore]:
    opened = AuditStore(tmp_path / "audit", QUICK)
    opened.open()
    yield opened
    opened.close()


def reopen(directory: Path, limits: Limits = QUICK) -> AuditStore:
    store = AuditStore(directory, limits)
    store.open()
    return store


def test_what_is_delivered_twice_is_stored_once(store: AuditStore) -> None:
    assert store.append(records(1, 5)).result(TIMEOUT) == {("local", 0, 1): 5}
    assert store.append(records(3, 7)).result(TIMEOUT) == {("local", 0, 1): 7}
    assert store.append(records(1, 7)).result(TIMEOUT) == {("local", 0, 1): 7}
    assert sequences(store) == [1, 2, 3, 4, 5, 6, 7]
    assert (store.counters["stored_denied"], store.counters["duplicates"]) == (4, 10)


def test_what_was_under_way_behind_a_failure_waits_for_its_turn(
    store: AuditStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    assert store.append(records(1, 2)).result(TIMEOUT)
    with monkeypatch.context() as broken:
        broken.setattr(store, "_write", full)
        with pytest.raises(OSError, match="No space"):
            store.append(records(3, 4)).result(TIMEOUT)
    with pytest.raises(OSError, match="deliver those first"):
        store.append(records(5, 6)).result(TIMEOUT)
    assert store.append(records(3, 4)).result(TIMEOUT) == {("local", 0, 1): 4}
    assert store.append(records(5, 6)).result(TIMEOUT) == {("local", 0, 1): 6}
    assert sequences(store) == [1, 2, 3, 4, 5, 6]


def test_marks_outlive_the_process_and_the_segment(tmp_path: Path) -> None:
    limits = Limits(segment_bytes=400, flush_milliseconds=0)
    for last in (3, 5, 9):
        store = reopen(tmp_path, limits)
        store.append(records(1, last)).result(TIMEOUT)
        store.append(records(1, last + 1)).result(TIMEOUT)
        store.close()
    store = reopen(tmp_path, limits)
    assert len(store.segments()) > 2
    assert sequences(store) == list(range(1, 11))
    store.close()


def test_a_second_process_is_refused(store: AuditStore) -> None:
    with pytest.raises(AuditLocked):
        AuditStore(store.directory, QUICK).open()


def test_stored_records_are_announced_in_order(tmp_path: Path) -> None:
    seen: list[Stored] = []
    store = AuditStore(tmp_path, QUICK, seen.append)
    store.open()
    futures = [store.append(records(n, n + 1)) for n in range(1, 50)]
    for future in futures:
        future.result(TIMEOUT)
    store.close()
    assert [record.sequence for each in seen for record in each.records] == list(range(1, 51))
    assert all(each.received_at <= each.stored_at + 10**9 for each in seen)


def test_the_oldest_segments_go(tmp_path: Path) -> None:
    store = reopen(tmp_path, Limits(segment_bytes=2000, retain_bytes=10_000, flush_milliseconds=0))
    for n in range(1, 101):
        store.append(records(n, n, pad=200)).result(TIMEOUT)
    found = sequences(store)
    assert found == list(range(found[0], 101))
    assert 1 < found[0] < 90
    assert store.counters["segments_removed"] == store.segments()[0] - 1
    store.close()


def test_old_segments_go(tmp_path: Path) -> None:
    store = reopen(tmp_path, Limits(segment_bytes=1, retain_seconds=0, flush_milliseconds=0))
    for n in range(1, 6):
        store.append(records(n, n)).result(TIMEOUT)
    assert sequences(store)[-1] == 5
    assert len(store.segments()) <= 2
    store.close()


def test_a_full_disk_refuses_and_stores_nothing_twice(store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(records(1, 3)).result(TIMEOUT)
    write = os.write
    room = [100]

    def full(fd: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        written = write(fd, bytes(data)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        store.append(records(4, 6)).result(TIMEOUT)
    monkeypatch.undo()
    assert sequences(store) == [1, 2, 3]
    assert store.append(records(4, 8)).result(TIMEOUT) == {("local", 0, 1): 8}
    assert sequences(store) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert store.counters["commits_failed"] == 1


def test_a_failed_sync_stores_nothing(store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(records(1, 3)).result(TIMEOUT)
    sync = os.fdatasync
    calls: list[int] = []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.append(records(4, 6)).result(TIMEOUT)
    store.append(records(4, 6)).result(TIMEOUT)
    assert sequences(store) == [1, 2, 3, 4, 5, 6]


def test_a_rotation_that_fails_leaves_no_newer_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reopen(tmp_path, Limits(segment_bytes=1, flush_milliseconds=0))
    store.append(records(1, 1)).result(TIMEOUT)
    before = store.segments()
    sync = os.fsync
    calls: list[int] = []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:  # the directory's
            raise OSError(5, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.append(records(2, 2)).result(TIMEOUT)
    assert store.segments() == before
    store.append(records(2, 2)).result(TIMEOUT)
    store.close()
    store = reopen(tmp_path)
    assert sequences(store) == [1, 2]
    store.close()


def test_damage_is_put_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    store = reopen(tmp_path)
    store.append(records(1, 4)).result(TIMEOUT)
    path = store.path(store.segments()[-1])
    store.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"\0" * 30 + b"\n", *lines[4:], b'{"stored_at":"unfin']))
    store = reopen(tmp_path)
    assert store.marks() == {("local", 0, 1): 2}
    assert store.append(records(1, 6)).result(TIMEOUT) == {("local", 0, 1): 6}
    assert sequences(store) == [1, 2, 3, 4, 5, 6]
    assert store.counters["tails_damaged"] == 1
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    store.close()
    path.write_bytes(b"rubbish")
    store = reopen(tmp_path)
    assert store.counters["segments_damaged"] == 1
    assert store.append(records(1, 1, epoch=2)).result(TIMEOUT) == {("local", 0, 2): 1}
    store.close()


def test_queries_take_the_newest_and_answer_in_order(store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.append(records(1, 20)).result(TIMEOUT)
    store.append(records(1, 4, epoch=2, tenant="other")).result(TIMEOUT)
    for block in (7, 100, 1 << 20):
        monkeypatch.setattr(query, "BLOCK", block)
        assert sequences(store, tenant="acme") == list(range(1, 21))
        assert sequences(store, 3, tenant="acme") == [18, 19, 20]
        assert sequences(store, tenant="acme", event="denied", start=10 * 10**9, end=14 * 10**9) == [11, 13]
        assert sequences(store, tenant="nobody") == []
    cancelled = threading.Event()
    cancelled.set()
    assert query.newest(store, Filter(), 10, cancelled) == []


def test_a_query_sees_only_what_is_durable(store: AuditStore) -> None:
    store.append(records(1, 2)).result(TIMEOUT)
    with open(store.path(store.segments()[-1]), "ab") as file:
        file.write(file.tell() * b"x")
    assert sequences(store) == [1, 2]


def test_a_sender_that_leaves_takes_nothing_back(store: AuditStore) -> None:
    left = store.append(records(1, 3))
    assert not left.cancel()
    assert store.append(records(4, 6)).result(TIMEOUT) == {("local", 0, 1): 6}
    assert sequences(store) == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = reopen(tmp_path)
    failed = threading.Event()
    store.on_failed = failed.set
    monkeypatch.setattr(store, "_commit", lambda jobs: [][len(jobs)])
    store.append(records(1, 1))
    assert failed.wait(TIMEOUT)
    store.close()
    assert failed.is_set()
