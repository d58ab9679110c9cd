"""SQLite under the engine: files, schema, epoch, the one writer and the readers.

All writes run one after another on one thread, each in one `BEGIN IMMEDIATE` transaction that also appends to the
history; a transaction that changed something raises the revision by one. Commits are durable (WAL, synchronous=FULL)
before anyone hears of them. Reads run on their own threads and see the last
commit, never half of one.

The epoch is a UUID made with the store. A store that was restored from a backup has lost revisions that replicas may
have seen, so it gets a new epoch: the file `<store>.head` remembers epoch and highest revision apart from the store,
and a store that is behind its head is one that was set back. Copy the `.db` alone when backing up.

Limits: the history holds at most `history_bytes`, but always the newest transaction; one transaction changes at most
`transaction_bytes`, so that it fits into one message of a watch. One process at a time: the head file is locked.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from falkirk.registry.migrations import MIGRATIONS, SCHEMA
from falkirk.registry.refusal import Reason, Refused

T = TypeVar("T")

_CHANGE_OVERHEAD = 128
"""Bytes that a row of history costs beside its body, roughly."""
_READERS = 2
_APPLICATION_ID = 0x464B5247  # "FKRG"


class StoreError(Exception):
    """The store can't be opened: of a newer version, in use, or not a store. The operator's to mend."""


@dataclass(frozen=True, slots=True)
class Change:
    """One resource in one transaction: its new body, or None where it was removed."""

    kind: int
    id: str
    tenant_id: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one commit changed."""

    revision: int
    changes: tuple[Change, ...]
    size: int
    """Bytes that it takes in the history."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All resources asked for, as of one revision: (kind, body)."""

    revision: int
    bodies: list[tuple[int, bytes]]


def open_database(path: Path) -> sqlite3.Connection:
    """A connection with the settings that every part of the store relies on; transactions are begun by hand."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def migrate(connection: sqlite3.Connection, migrations: tuple[tuple[str, ...], ...] = MIGRATIONS) -> int:
    """Bring the schema up to date; the version it had. Raises `StoreError` for a newer one or a foreign file."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (found or tables):
        raise StoreError("the file is an SQLite database, but not a Falkirk registry")
    if found > len(migrations):
        raise StoreError(
            f"the store has schema {found}, this program knows {len(migrations)}: use the newer program that wrote it"
        )
    for version in range(found, len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        for statement in migrations[version]:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={version + 1}")
        connection.execute("COMMIT")
    return int(found)


class Store:
    """An open store. `write` and `read` may be called from any thread."""

    def __init__(self, path: Path, *, history_bytes: int, transaction_bytes: int) -> None:
        """Open or create. Raises `StoreError`, OSError."""
        self._path = path
        self._history_bytes = history_bytes
        self._transaction_bytes = transaction_bytes
        self.on_commit: Callable[[Transaction], None] = lambda transaction: None
        """Called on the writer's thread after each commit, in order, before whoever wrote hears of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._head = _Head(path.with_name(path.name + ".head"))
        # It has digests of tokens and sealed keys; SQLite gives its other files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
        try:
            self._connection = open_database(path)
            migrate(self._connection)
            self.epoch, self._revision = self._identify()
            self._oldest, self._history_size = self._kept()
        except sqlite3.DatabaseError as error:
            self._head.close()
            raise StoreError(f"{path}: {error}") from error
        except StoreError as error:
            self._head.close()
            raise StoreError(f"{path}: {error}") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="registry-writer")
        self._reader = ThreadPoolExecutor(_READERS, thread_name_prefix="registry-reader")
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Wait for what is under way, then close."""
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        for connection in (*self._connections, self._connection):
            connection.close()
        self._head.close()

    @property
    def revision(self) -> int:
        """Of the last commit; 0 before the first."""
        return self._revision

    @property
    def oldest_resumable(self) -> int:
        """The oldest revision that `history` can go on from."""
        return self._oldest - 1

    @property
    def schema(self) -> int:
        """The schema's version."""
        return SCHEMA

    def write(self, work: Callable[[Writing], T]) -> Future[T]:
        """Run `work` on the writer in one transaction; an exception rolls all of it back."""
        return self._writer.submit(self._write, work)

    def read(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run `work` on a reader, in one consistent view."""
        return self._reader.submit(self._read, work)

    def snapshot(self, kinds: tuple[int, ...], tenant_id: str = "") -> Future[Snapshot]:
        """All resources of the kinds, kinds in the order given, those of one tenant only where `tenant_id` is set."""

        def work(connection: sqlite3.Connection) -> Snapshot:
            (revision,) = connection.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()
            bodies: list[tuple[int, bytes]] = []
            for kind in kinds:
                where, values = (
                    ("kind = ? AND tenant_id = ?", (kind, tenant_id)) if tenant_id else ("kind = ?", (kind,))
                )
                bodies += connection.execute(
                    f"SELECT kind, body FROM resource WHERE {where} ORDER BY tenant, name", values
                )
            return Snapshot(int(revision), bodies)

        return self.read(work)

    def history(self, after: int, limit_bytes: int) -> Future[list[Transaction] | None]:
        """Transactions after a revision, in order, about `limit_bytes` of them but at least one; None where the first of them is no longer kept."""

        def work(connection: sqlite3.Connection) -> list[Transaction] | None:
            found: list[Transaction] = []
            total = 0
            for revision, size in connection.execute(
                "SELECT revision, size FROM past WHERE revision > ? ORDER BY revision", (after,)
            ):
                if revision != after + len(found) + 1:
                    return None
                rows = connection.execute(
                    "SELECT kind, id, tenant_id, body FROM change WHERE revision = ? ORDER BY position", (revision,)
                )
                found.append(Transaction(revision, tuple(Change(*row) for row in rows), size))
                total += size
                if total >= limit_bytes:
                    break
            return found

        return self.read(work)

    def _write(self, work: Callable[[Writing], T]) -> T:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        writing = Writing(connection, self._revision + 1)
        try:
            result = work(writing)
            recorded = self._record(writing) if writing.changes else None
            connection.execute("COMMIT")
        except BaseException:
            # Whatever it was, nothing of it may stay; it goes on to the caller.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if recorded is not None:
            transaction, self._oldest, self._history_size = recorded
            self._revision = transaction.revision
            self._head.write(self.epoch, transaction.revision)
            self.on_commit(transaction)
        return result

    def _record(self, writing: Writing) -> tuple[Transaction, int, int]:
        """Append to the history and cut its end off; with the oldest revision and the bytes that it then has."""
        connection, revision = self._connection, writing.revision
        changes = tuple(writing.changes.values())
        size = sum(len(change.body or b"") + _CHANGE_OVERHEAD for change in changes)
        if size > self._transaction_bytes:
            most = self._transaction_bytes
            raise Refused(
                Reason.TRANSACTION_TOO_LARGE,
                f"the change has {size} bytes, one transaction holds {most}; split it",
                limit=str(most),
            )
        connection.execute("UPDATE meta SET value = ? WHERE key = 'revision'", (revision,))
        connection.execute(
            "INSERT INTO past (revision, size, time_ns) VALUES (?, ?, ?)", (revision, size, time.time_ns())
        )
        connection.executemany(
            "INSERT INTO change (revision, position, kind, id, tenant_id, body) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (revision, position, change.kind, change.id, change.tenant_id, change.body)
                for position, change in enumerate(changes)
            ],
        )
        oldest, total = self._oldest, self._history_size + size
        while total > self._history_bytes and oldest < revision:
            (cut,) = connection.execute("SELECT size FROM past WHERE revision = ?", (oldest,)).fetchone()
            connection.execute("DELETE FROM change WHERE revision = ?", (oldest,))
            connection.execute("DELETE FROM past WHERE revision = ?", (oldest,))
            oldest, total = oldest + 1, total - cut
        return Transaction(revision, changes, size), oldest, total

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = open_database(self._path)
            connection.execute("PRAGMA query_only=ON")
            self._connections.append(connection)
        with _view(connection):
            return work(connection)

    def _identify(self) -> tuple[str, int]:
        """Epoch and revision; a new epoch for a new store and for one that was set back."""
        rows = dict(self._connection.execute("SELECT key, value FROM meta"))
        epoch, revision = rows.get("epoch", ""), int(rows.get("revision", 0))
        head_epoch, head_revision = self._head.read()
        if not epoch or (head_epoch == epoch and head_revision > revision):
            epoch = str(uuid.uuid4())
            with _immediate(self._connection):
                self._connection.execute(
                    "INSERT OR REPLACE INTO meta (key, value) VALUES ('epoch', ?), ('revision', ?)", (epoch, revision)
                )
        self._head.write(epoch, revision)
        return epoch, revision

    def _kept(self) -> tuple[int, int]:
        """The oldest revision in the history (the next one where it is empty), and its bytes."""
        oldest, size = self._connection.execute("SELECT min(revision), total(size) FROM past").fetchone()
        return (self._revision + 1 if oldest is None else int(oldest)), int(size)


class Writing:
    """One transaction under way: SQL, the revision it'll have, and what it changed (the last word on each id)."""

    __slots__ = ("changes", "connection", "revision")

    def __init__(self, connection: sqlite3.Connection, revision: int) -> None:
        self.connection = connection
        self.revision = revision
        self.changes: dict[str, Change] = {}


class _Head:
    """A small file that knows how far the store had come; its lock keeps a second registry out."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StoreError(f"{path}: another registry has this store open") from None

    def read(self) -> tuple[str, int]:
        """Epoch and revision, ("", 0) where there are none."""
        epoch, _, number = os.pread(self._fd, 128, 0).decode("ascii", "replace").partition(" ")
        return (epoch, int(number)) if number.strip().isdigit() else ("", 0)

    def write(self, epoch: str, revision: int) -> None:
        """Remember; of fixed length, so that no crash leaves half a number. Not synced: lagging behind the store is harmless."""
        os.pwrite(self._fd, f"{epoch} {revision:020d}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def _view(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


@contextmanager
def _immediate(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("COMMIT")
