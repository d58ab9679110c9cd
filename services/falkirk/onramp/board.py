"""What the workers of an on-ramp know of each other without asking: how many tunnels each has, and the newest number that each has given out.

In shared memory of the parent's, in which each worker writes its own two numbers only. So `max_tunnels` holds for the node, and a tunnel that is admitted later has
the greater number, whichever worker admits it: those who must choose between two tunnels of a device take the greater.

A worker's numbers are those that leave its own number when divided by how many workers there are, so that two never give out the same.

Limits: two workers that admit in the same microseconds each don't count the other's, and may give their numbers in either order. After 2^32 - 1 numbers start over.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from falkirk.runtime.counters import Counters

LAST: Final = (1 << 32) - 1


def create(workers: int) -> Counters:
    """The memory, all zero."""
    return Counters.create(_names(workers))


class Board:
    """The memory as one of the workers has it."""

    def __init__(self, fd: int, worker: int, workers: int, first: int) -> None:
        """`fd` is the memory's descriptor, which this takes over; `first` is above every number of before. Raises ValueError where it is the memory of other workers."""
        self._view = Counters.attach(fd, _names(workers)).view
        self._worker, self._workers = worker, workers
        # What the process before had is held again before it counts.
        self.count(0)
        self.seen(first - 1)

    def tunnels(self) -> int:
        """Open ones of all workers."""
        return sum(self._view[: self._workers])

    def count(self, tunnels: int) -> None:
        """This worker has so many."""
        self._view[self._worker] = tunnels

    def seen(self, number: int) -> None:
        """A number that was given out, by whomever: greater ones follow."""
        mine = self._workers + self._worker
        self._view[mine] = max(self._view[mine], number)

    def take(self, taken: Container[int]) -> int:
        """A number for a new tunnel, none of those of this worker's that are `taken`."""
        above = max(self._view[self._workers :]) + 1
        number = above + (self._worker - above) % self._workers
        if number > LAST:
            number = self._worker or self._workers
        while number in taken:
            number += self._workers
        self._view[self._workers + self._worker] = number
        return number


def _names(workers: int) -> list[str]:
    return [f"{what}.{worker}" for what in ("tunnels", "newest") for worker in range(workers)]
