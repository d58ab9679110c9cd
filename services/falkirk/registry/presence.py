"""Which devices are at which nodes, under leases of the nodes. PURE: time (monotonic seconds) is an argument, an entry's details are opaque.

A node's report renews the lease of all that it has reported; when a lease ends, all of it goes at once. Reports are differences, except for those that say
they are complete; a node that is unknown here (its lease ended, or this process is new) is asked for a complete one. A device may be at
several nodes: one that roams is at the old one until that one notices.

Watchers are told what changed since they last asked, each (node, device) once, so a slow one costs at most one mark for each.
Limit: about 300 bytes an entry beside its details.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

Place = tuple[str, str]
"""(node, device id)"""


class Watcher:
    """What one watcher hasn't been told of yet."""

    __slots__ = ("changed",)

    def __init__(self) -> None:
        self.changed: dict[Place, None] = {}


class Presences(Generic[T]):
    """The table."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, T]] = {}
        self._leases: dict[str, float] = {}
        self._watchers: set[Watcher] = set()

    def __len__(self) -> int:
        return sum(map(len, self._nodes.values()))

    def knows(self, node: str) -> bool:
        """Whether a node's lease runs: such a node is alive, with or without devices."""
        return node in self._leases

    def report(
        self, node: str, present: Mapping[str, T], gone: Iterable[str], *, complete: bool, lease_s: float, now: float
    ) -> bool:
        """Take a report (by device id); False where the node must send a complete one, and nothing of this one was taken."""
        if not complete and node not in self._leases:
            return False
        held = self._nodes.setdefault(node, {})
        self._leases[node] = now + lease_s
        missing = [device for device in held if device not in present] if complete else [*gone]
        for device in missing:
            if held.pop(device, None) is not None:
                self._mark(node, device)
        for device, details in present.items():
            if held.get(device) != details:
                held[device] = details
                self._mark(node, device)
        return True

    def replace(self, device: str, change: Mapping[str, T] | None) -> None:
        """Change the details of a device at each node (new details by node), or drop it everywhere (None)."""
        for node in self.nodes_of(device):
            if change is None:
                del self._nodes[node][device]
            elif node in change:
                self._nodes[node][device] = change[node]
            self._mark(node, device)

    def nodes_of(self, device: str) -> list[str]:
        """Where a device is."""
        return [node for node, held in self._nodes.items() if device in held]

    def get(self, place: Place) -> T | None:
        """Details; None where the device isn't there."""
        return self._nodes.get(place[0], {}).get(place[1])

    def all(self) -> list[tuple[Place, T]]:
        """Everything."""
        return [((node, device), details) for node, held in self._nodes.items() for device, details in held.items()]

    def expire(self, now: float) -> list[str]:
        """Drop the nodes whose lease has ended; their names."""
        ended = [node for node, until in self._leases.items() if until <= now]
        for node in ended:
            del self._leases[node]
            for device in self._nodes.pop(node, {}):
                self._mark(node, device)
        return ended

    def next_deadline(self) -> float | None:
        """When `expire` has something to do; None where there is no lease."""
        return min(self._leases.values(), default=None)

    def watch(self) -> Watcher:
        """A watcher that has to be told everything."""
        watcher = Watcher()
        watcher.changed = dict.fromkeys(place for place, _ in self.all())
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Forget a watcher."""
        self._watchers.discard(watcher)

    def _mark(self, node: str, device: str) -> None:
        for watcher in self._watchers:
            watcher.changed[node, device] = None
