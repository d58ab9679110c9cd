"""Revisions, history, epochs, one writer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from falkirk.registry.refusal import Reason
from falkirk.registry.store import Store, StoreError
from tests.unit.registry.conftest import Ledger, make, refused

KINDS = (1, 2, 3, 4, 5, 6)


def test_a_transaction_that_changes_something_raises_the_revision_by_one(acme: Ledger) -> None:
    assert acme.store.revision == 1
    acme.create("user", "ann", "acme")
    assert acme.store.revision == 2
    acme.apply(make("user", "ann", "acme"))
    assert acme.store.revision == 2
    assert [transaction.revision for transaction in acme.told] == [1, 2]


def test_history_is_what_was_told(acme: Ledger) -> None:
    acme.create("user", "ann", "acme")
    acme.delete("user", "ann", "acme")
    assert acme.store.history(0, 1 << 20).result() == acme.told
    assert acme.store.history(1, 1).result() == acme.told[1:2]
    assert acme.store.history(3, 1).result() == []
    assert acme.told[-1].changes[0].body is None


def test_history_is_cut_by_size_but_keeps_the_newest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.db", history_bytes=1000)
    ledger.create("tenant", "acme")
    for number in range(20):
        ledger.create("user", f"u{number}", "acme")
    kept = ledger.store.oldest_resumable
    assert 0 < kept < 21
    assert ledger.store.history(kept, 1 << 20).result() == ledger.told[kept:]
    assert ledger.store.history(kept - 1, 1 << 20).result() is None
    ledger.create("user", "big", "acme", groups=[f"{number:0100}" for number in range(60)])
    assert ledger.store.oldest_resumable == ledger.store.revision - 1
    ledger.store.close()
    again = Ledger(tmp_path / "x.db", history_bytes=1000)
    assert again.store.oldest_resumable == again.store.revision - 1
    again.store.close()


def test_a_snapshot_is_of_one_revision_and_of_the_kinds_and_tenant_asked_for(acme: Ledger) -> None:
    acme.create("tenant", "other")
    acme.create("user", "ann", "acme")
    found = acme.store.snapshot((2, 1)).result()
    assert (found.revision, [kind for kind, _ in found.bodies]) == (3, [2, 1, 1])
    other = acme.get("tenant", "other").metadata.id
    assert acme.store.snapshot((2,), other).result().bodies == []


def test_a_transaction_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.db", transaction_bytes=2000)
    ledger.create("tenant", "acme")
    values = [make("user", f"u{number}", "acme") for number in range(40)]
    assert refused(lambda: ledger.apply(*values)).reason is Reason.TRANSACTION_TOO_LARGE
    assert ledger.store.revision == 1
    assert ledger.get("user", "u0", "acme") is None
    ledger.store.close()


def test_everything_is_there_after_a_restart_in_the_same_epoch(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.db")
    ledger.create("tenant", "acme")
    epoch, told = ledger.store.epoch, ledger.told
    ledger.store.close()
    again = Ledger(tmp_path / "x.db")
    assert (again.store.epoch, again.store.revision) == (epoch, 1)
    assert again.store.history(0, 1).result() == told
    again.store.close()


def test_a_store_that_was_set_back_gets_a_new_epoch(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.db")
    ledger.create("tenant", "acme")
    epoch = ledger.store.epoch
    ledger.store.close()
    shutil.copy(tmp_path / "x.db", tmp_path / "backup")
    ledger = Ledger(tmp_path / "x.db")
    ledger.create("tenant", "other")
    ledger.store.close()
    shutil.copy(tmp_path / "backup", tmp_path / "x.db")
    restored = Ledger(tmp_path / "x.db")
    assert restored.store.epoch != epoch
    assert restored.store.revision == 1
    kept = restored.store.epoch
    restored.store.close()
    again = Ledger(tmp_path / "x.db")
    assert again.store.epoch == kept
    again.store.close()


def test_a_second_registry_on_the_same_store_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another registry"):
        Store(tmp_path / "falkirk.db", history_bytes=1, transaction_bytes=1)
