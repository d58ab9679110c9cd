"""When what is due, for very many things of which nearly none ever is. PURE.

A ring of buckets, one a tick. A thing lies in one bucket; moving its deadline later costs nothing (it is looked at when
its bucket comes, and filed again), which suits idle time-outs that every byte moves. Deadlines beyond the ring's reach are
looked at once a round.

Limits: a deadline is seen up to one tick late; `add` puts things at least one tick ahead; a thing whose deadline moves
*earlier* must be filed again by its owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

TICK_S: Final = 0.1
"""Seconds a bucket covers."""
BUCKETS: Final = 512
"""The ring's reach is this many ticks."""


class Timed(Protocol):
    """What can be filed. `due` belongs to `Deadlines`: the bucket's number, -1 where it isn't filed."""

    due: int

    def expires(self) -> float:
        """Seconds on the same clock as `now`."""


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """Things by the time at which they must be looked at."""

    def __init__(self, now: float) -> None:
        self._cursor = int(now / TICK_S)
        self._buckets: list[set[T] | None] = [None] * BUCKETS
        self._count = 0
        self._next = 0
        """No bucket before this tick has anything in it."""

    def __len__(self) -> int:
        return self._count

    def add(self, thing: T) -> None:
        """File a thing by its `expires()`; one that is filed already moves."""
        if thing.due >= 0:
            self.remove(thing)
        tick = int(thing.expires() / TICK_S) + 1
        tick = min(max(tick, self._cursor + 1), self._cursor + BUCKETS - 1)
        bucket = self._buckets[tick % BUCKETS]
        if bucket is None:
            self._buckets[tick % BUCKETS] = {thing}
        else:
            bucket.add(thing)
        thing.due = tick
        self._next = tick if self._count == 0 else min(self._next, tick)
        self._count += 1

    def remove(self, thing: T) -> None:
        """Forget a thing; one that isn't filed is no error."""
        if thing.due < 0:
            return
        place = thing.due % BUCKETS
        bucket = self._buckets[place]
        if bucket is not None:
            bucket.discard(thing)
            if not bucket:
                self._buckets[place] = None
        thing.due = -1
        self._count -= 1

    def wait(self, now: float) -> float:
        """Seconds until something may be due; -1 where nothing is filed."""
        if self._count == 0:
            return -1.0
        while self._buckets[self._next % BUCKETS] is None:
            self._next += 1
        return max(0.0, self._next * TICK_S - now)

    def expire(self, now: float) -> Iterator[T]:
        """Take out, one by one, the things whose time has come by `now`; the caller ends them, and no others meanwhile."""
        today = int(now / TICK_S)
        if today <= self._cursor:
            return
        self._cursor = max(self._cursor, today - BUCKETS)
        while self._cursor < today:
            self._cursor += 1
            bucket = self._buckets[self._cursor % BUCKETS]
            if bucket is None:
                continue
            self._buckets[self._cursor % BUCKETS] = None
            self._count -= len(bucket)
            for thing in bucket:
                thing.due = -1
            for thing in bucket:
                if thing.expires() <= now:
                    yield thing
                else:
                    self.add(thing)
