"""Who uses most: sums of flows by device, user, group or destination, and what passed since the last look. PURE.

A look is at every live flow, and at the flows that ended since the one before. What a flow carried between two looks is the difference of its
counts; one that is new since then counts whole, and one that ended counts what it carried after it was last seen. The first look only learns where
everything stands.

Limit: remembers each live flow by its id, about 150 bytes; counts are of the workers' last checkpoints, up to a second old.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Whose(NamedTuple):
    """What a row stands for."""

    tenant: str
    name: str
    user: str = ""
    groups: tuple[str, ...] = ()


class Observed(NamedTuple):
    """A flow: the rows that it counts for (several for groups), and its IP bytes since it began."""

    flow_id: bytes
    whose: tuple[Whose, ...]
    bytes_up: int
    bytes_down: int


class Row:
    """A row's sums. `passed_*` are bytes since the last look, `bytes_*` those of live flows since they began."""

    __slots__ = ("bytes_down", "bytes_up", "flows", "passed_down", "passed_up")

    def __init__(self) -> None:
        self.flows = self.bytes_up = self.bytes_down = self.passed_up = self.passed_down = 0

    @property
    def passed(self) -> int:
        """Bytes in both directions since the last look."""
        return self.passed_up + self.passed_down


class Tally:
    """One watcher's looks: `live` and `ended` of one, in any order, then `close`."""

    def __init__(self) -> None:
        self._before: dict[bytes, tuple[int, int]] = {}
        self._now: dict[bytes, tuple[int, int]] = {}
        self._lost: dict[bytes, tuple[int, int]] = {}
        """Flows that were gone at the last look, whose ends hadn't been told by then."""
        self._gone: set[bytes] = set()
        self._first = True
        self._rows: dict[Whose, Row] = {}
        self._total = Row()

    def live(self, flow: Observed) -> None:
        """A live flow."""
        if flow.flow_id in self._gone or flow.flow_id in self._now:
            # It ended while the tables were gone through, or a worker's place was met twice.
            return
        self._now[flow.flow_id] = flow.bytes_up, flow.bytes_down
        for row in self._of(flow):
            row.flows += 1
            row.bytes_up += flow.bytes_up
            row.bytes_down += flow.bytes_down
        self._pass(flow, self._seen(flow))

    def ended(self, flow: Observed) -> None:
        """A flow that ended since the last look; its counts are its last ones."""
        if flow.flow_id in self._gone:
            return
        self._gone.add(flow.flow_id)
        seen = self._now.pop(flow.flow_id, None)
        if seen is not None:
            for row in self._of(flow):
                row.flows -= 1
                row.bytes_up -= seen[0]
                row.bytes_down -= seen[1]
            self._pass(flow, seen)
        else:
            self._pass(flow, self._seen(flow))

    def close(self, most: int) -> tuple[list[tuple[Whose, Row]], Row, int]:
        """The end of a look: the largest `most` rows in order, the sum of all, and how many there are. The next look begins."""
        ordered = sorted(
            self._rows.items(), key=lambda item: (-item[1].passed, -item[1].flows, item[0].tenant, item[0].name)
        )
        found = ordered[:most], self._total, len(ordered)
        self._lost = {
            flow_id: seen
            for flow_id, seen in self._before.items()
            if flow_id not in self._now and flow_id not in self._gone
        }
        self._before, self._now, self._gone = self._now, {}, set()
        self._rows, self._total, self._first = {}, Row(), False
        return found

    def _seen(self, flow: Observed) -> tuple[int, int]:
        return self._before.get(flow.flow_id) or self._lost.get(flow.flow_id) or (0, 0)

    def _of(self, flow: Observed) -> Iterable[Row]:
        return [self._total, *(self._rows.setdefault(whose, Row()) for whose in flow.whose)]

    def _pass(self, flow: Observed, before: tuple[int, int]) -> None:
        if self._first:
            before = flow.bytes_up, flow.bytes_down
        # A checkpoint may be older than an end's record, never the other way round; what isn't more isn't counted.
        up, down = max(flow.bytes_up - before[0], 0), max(flow.bytes_down - before[1], 0)
        for row in self._of(flow):
            row.passed_up += up
            row.passed_down += down
