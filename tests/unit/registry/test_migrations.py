"""Numbered, forward-only steps."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from falkirk.registry.migrations import MIGRATIONS, SCHEMA
from falkirk.registry.store import Store, StoreError, migrate, open_database


def test_each_step_runs_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "x.db")
    assert migrate(connection) == 0
    connection.execute("INSERT INTO meta (key, value) VALUES ('epoch', 'e')")
    assert migrate(connection) == SCHEMA
    later = (*MIGRATIONS, ("ALTER TABLE meta ADD COLUMN note TEXT", "UPDATE meta SET note = 'seen'"))
    assert migrate(connection, later) == SCHEMA
    assert connection.execute("SELECT value, note FROM meta").fetchall() == [("e", "seen")]
    assert migrate(connection, later) == SCHEMA + 1
    connection.close()


def test_a_step_that_fails_leaves_the_version_before(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "x.db")
    migrate(connection)
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, (*MIGRATIONS, ("CREATE TABLE fresh (x)", "nonsense")))
    connection.execute("ROLLBACK")
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'fresh'").fetchone() == (0,)
    connection.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    connection = open_database(tmp_path / "falkirk.db")
    migrate(connection)
    connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    connection.close()
    with pytest.raises(StoreError, match=f"schema {SCHEMA + 1}.*knows {SCHEMA}"):
        Store(tmp_path / "falkirk.db", history_bytes=1, transaction_bytes=1)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "falkirk.db")
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(StoreError, match="not a Falkirk registry"):
        Store(tmp_path / "falkirk.db", history_bytes=1, transaction_bytes=1)
    (tmp_path / "noise.db").write_bytes(b"this is no database at all, not even nearly" * 40)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path / "noise.db", history_bytes=1, transaction_bytes=1)
