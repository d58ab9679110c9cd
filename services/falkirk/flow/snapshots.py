"""Rules and routes come as files and are loaded in slices, so that no packet waits for ten thousand rules.

The parent says where a snapshot lies; a slice of at most `SLICE` is loaded a turn, and the table decides once it is whole. A newer
snapshot of the same name takes the place of one that is still being loaded. What can't be read is refused, and the old one stays. Once a
new one decides, the flows that live are reviewed by it (`falkirk.flow.review`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from falkirk.decide.routes import RouteTable
from falkirk.decide.rules import RuleTable
from falkirk.flow import control
from falkirk.runtime import blob

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

SLICE: Final = 2_000_000
"""Nanoseconds a turn."""
NAMES: Final = frozenset(("rules", "routes"))


class Snapshots:
    """Loads into the worker's `rules` and `routes`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loaded: set[str] = set()
        self.loading: list[tuple[control.Load, Iterator[None]]] = []
        """What is being loaded, first come, first served."""

    @property
    def complete(self) -> bool:
        """Whether both have been loaded once."""
        return self._loaded == NAMES

    def begin(self, message: control.Load) -> None:
        """Start with a new snapshot."""
        try:
            # The parent has checked it, which takes too long here.
            data = blob.mapped(Path(message.path), checked=False)
        except (OSError, blob.BlobError) as error:
            self._say(message, str(error))
            return
        self.loading = [entry for entry in self.loading if entry[0].name != message.name]
        steps = self._routes(data) if message.name == "routes" else self._rules(bytes(data))
        self.loading.append((message, steps))

    def step(self) -> None:
        """One slice."""
        message, steps = self.loading[0]
        until = time.monotonic_ns() + SLICE
        error = ""
        try:
            for _ in steps:
                if time.monotonic_ns() > until:
                    return
        except ValueError as failed:
            error = str(failed)
        self.loading.pop(0)
        if not error:
            self._loaded.add(message.name)
            self._worker.review.everything()
        self._say(message, error)

    def _routes(self, data: memoryview) -> Iterator[None]:
        table = RouteTable()
        yield from table.load(data)
        self._worker.routes = table

    def _rules(self, data: bytes) -> Iterator[None]:
        loading = RuleTable.load(data)
        yield from loading
        assert loading.table is not None
        self._worker.rules = loading.table

    def _say(self, message: control.Load, error: str) -> None:
        self._worker.tell(control.Loaded(message.name, message.epoch, message.number, error))
