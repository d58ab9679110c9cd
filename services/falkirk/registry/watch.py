"""Watches: the state first, then every transaction, each exactly once.

`Feed` holds the newest transactions in memory, in commit order; it lives on the event loop and hears of commits
through the loop, so it may lag behind the store by a moment but is never out of order. A watcher is pulled along by
its reader: it asks the feed for what comes after its own revision, and the store's history where the feed no longer
reaches back that far. Nothing is queued for a watcher, so a slow or stopped one costs nothing but its snapshot and is
never ahead, never skips and never repeats. One that falls behind the history itself is cut: WATCH_TOO_SLOW
(RESOURCE_EXHAUSTED), and it watches again.

A resumed watch gets its SYNCED first, at the revision that it resumes from, and then what it missed, one message a
transaction. Limits: `max_watches` at once; the feed keeps `FEED_BYTES`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.store import Change, Store, Transaction

FEED_BYTES = 8 << 20
"""Transactions in memory."""
_PAGE_BYTES = 4 << 20
_PIECE_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the first state: (kind, body)."""

    revision: int
    bodies: list[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class Synced:
    """The first state is complete."""

    revision: int


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction, as far as the watcher asked for its kinds and tenant; may be empty."""

    revision: int
    changes: tuple[Change, ...]


Event = Piece | Synced | Step


@dataclass(frozen=True, slots=True)
class Interest:
    """What a watcher wants to hear of."""

    kinds: tuple[int, ...]
    """In the order in which the first state is sent."""
    tenant_id: str = ""
    """Empty: of every tenant."""

    def select(self, transaction: Transaction) -> Step:
        """A transaction's changes that are of interest."""
        wanted = tuple(
            change
            for change in transaction.changes
            if change.kind in self.kinds and self.tenant_id in ("", change.tenant_id)
        )
        return Step(transaction.revision, wanted)


class Feed:
    """The newest transactions, and who waits for the next one. Used on the event loop only."""

    def __init__(self, store: Store, max_watches: int, feed_bytes: int = FEED_BYTES) -> None:
        self._store = store
        self._max_watches = max_watches
        self._limit = feed_bytes
        self._recent: deque[Transaction] = deque()
        self._size = 0
        self._newest = store.revision
        self._changed = asyncio.Event()
        self.watches = 0
        """Open watches."""

    def publish(self, transaction: Transaction) -> None:
        """Hear of a commit. Called once for each, in order."""
        assert transaction.revision == self._newest + 1, "commits come in order"
        self._newest = transaction.revision
        self._recent.append(transaction)
        self._size += transaction.size
        while self._size > self._limit and len(self._recent) > 1:
            self._size -= self._recent.popleft().size
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, interest: Interest, resume_after: tuple[str, int] | None) -> AsyncGenerator[Event, None]:
        """The events of one watch, without end. Raises `Refused` (TOO_MANY_WATCHES, REVISION_GONE, WATCH_TOO_SLOW)."""
        if self.watches >= self._max_watches:
            raise Refused(
                Reason.TOO_MANY_WATCHES,
                f"the registry has {self.watches} watchers, as many as it may have (registry.max_watches)",
            )
        self.watches += 1
        try:
            if resume_after is None:
                snapshot = await asyncio.wrap_future(self._store.snapshot(interest.kinds, interest.tenant_id))
                cursor = snapshot.revision
                for piece in _pieces(snapshot.revision, snapshot.bodies):
                    yield piece
                del snapshot
            else:
                cursor = self._resume(*resume_after)
            yield Synced(cursor)
            while True:
                for transaction in await self._after(cursor):
                    yield interest.select(transaction)
                    cursor = transaction.revision
        finally:
            self.watches -= 1

    def _resume(self, epoch: str, revision: int) -> int:
        if epoch != self._store.epoch:
            raise Refused(
                Reason.REVISION_GONE,
                "the revision is of another store; watch again without it",
                epoch=self._store.epoch,
            )
        oldest, newest = self._store.oldest_resumable, self._store.revision
        if not oldest <= revision <= newest:
            message = f"a watch can resume after revisions {oldest} to {newest}, not {revision}; watch again without it"
            raise Refused(Reason.REVISION_GONE, message, oldest=str(oldest), newest=str(newest))
        return revision

    async def _after(self, cursor: int) -> list[Transaction]:
        """At least one transaction after `cursor`, the next ones in order; waits for it."""
        while self._newest <= cursor:
            await self._changed.wait()
        if self._recent and self._recent[0].revision <= cursor + 1:
            skip = cursor + 1 - self._recent[0].revision
            # One at a time: the reader may be slow, and the deque moves on meanwhile.
            return [self._recent[skip]]
        found = await asyncio.wrap_future(self._store.history(cursor, _PAGE_BYTES))
        if not found:
            raise Refused(
                Reason.WATCH_TOO_SLOW, f"revision {cursor + 1} is no longer kept; watch again", revision=str(cursor)
            )
        return found


def _pieces(revision: int, bodies: list[tuple[int, bytes]]) -> Iterator[Piece]:
    """A snapshot cut into messages."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for item in bodies:
        batch.append(item)
        size += len(item[1])
        if size >= _PIECE_BYTES:
            yield Piece(revision, batch)
            batch, size = [], 0
    if batch:
        yield Piece(revision, batch)
