"""A registry without gRPC: engine and store on a temporary file, with a clock and ids that count."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.registry import engine, kinds
from falkirk.registry.engine import Engine, Surroundings
from falkirk.registry.kinds import BY_NAME, Value
from falkirk.registry.refusal import Refused
from falkirk.registry.store import Store, Transaction, Writing

T = TypeVar("T")


class Ledger:
    """Writes and reads, one after another; `told` is what watches would hear."""

    def __init__(self, path: Path, *, history_bytes: int = 1 << 20, transaction_bytes: int = 8 << 20) -> None:
        self.store = Store(path, history_bytes=history_bytes, transaction_bytes=transaction_bytes)
        self.told: list[Transaction] = []
        self.store.on_commit = self.told.append
        ids = itertools.count(self.store.revision * 1000 + 1)
        times = itertools.count(1_000_000_000, 1_000_000_000)
        self._surroundings = Surroundings(
            now_ns=lambda: next(times),
            new_id=lambda: f"00000000-0000-4000-8000-{next(ids):012x}",
            random=lambda count: bytes(range(1, count + 1)),
        )

    def write(self, work: Callable[[Engine], T]) -> T:
        """One transaction."""

        def inside(writing: Writing) -> T:
            return work(Engine(writing, self._surroundings))

        return self.store.write(inside).result(10)

    def create(self, kind: str, name: str, tenant: str = "", **values: Any) -> Any:
        """Make one of plain values."""
        value = make(kind, name, tenant, **values)
        return self.write(lambda work: work.create(BY_NAME[kind], value))

    def update(self, kind: str, value: Value) -> Any:
        """Replace one."""
        return self.write(lambda work: work.update(BY_NAME[kind], value))

    def delete(self, kind: str, name: str, tenant: str = "", revision: int = 0) -> None:
        """Remove one."""
        self.write(lambda work: work.delete(BY_NAME[kind], tenant, name, revision))

    def apply(self, *values: Value) -> tuple[list[Any], list[str]]:
        """Apply; results and outcomes by name."""
        resources = []
        for value in values:
            resource = pb.Resource()
            name = next(kind.name for kind in kinds.KINDS if isinstance(value, kind.message))
            getattr(resource, name).CopyFrom(value)
            resources.append(resource)
        results, outcomes = self.write(lambda work: work.apply(resources))
        names = [pb.ApplyResponse.Outcome.Name(outcome).removeprefix("OUTCOME_").lower() for outcome in outcomes]
        return [value for _, value in results], names

    def get(self, kind: str, name: str, tenant: str = "") -> Any:
        """One by name or id; None where there is none."""
        return self.store.read(lambda connection: engine.find(connection, BY_NAME[kind], tenant, name)).result(10)


def make(kind: str, name: str, tenant: str = "", **values: Any) -> Any:
    """A message of plain values."""
    value = BY_NAME[kind].message(**values)
    value.metadata.name, value.metadata.tenant = name, tenant
    return value


def refused(work: Callable[[], object]) -> Refused:
    """What a call is refused with."""
    with pytest.raises(Refused) as caught:
        work()
    return caught.value


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty registry."""
    made = Ledger(tmp_path / "falkirk.db")
    yield made
    made.store.close()


@pytest.fixture
def acme(ledger: Ledger) -> Ledger:
    """A registry with the tenant acme."""
    ledger.create("tenant", "acme")
    return ledger
