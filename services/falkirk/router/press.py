"""The press: makes a blob of the route book whenever it has changed, loads it here and publishes it.

Limit: one compilation at a time, in a thread that shares the interpreter: calls answer a little slower meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import registry_service_pb2
from falkirk.api.router.v1 import router_service_pb2
from falkirk.decide import routes
from falkirk.decide.routes import RouteConflict, RouteTable
from falkirk.router import name_table
from falkirk.router.book import RouteBook
from falkirk.router.name_book import NameBook
from falkirk.runtime.replica import BlobPublisher

log = structlog.get_logger()


class Press:
    """From changes of the registry to the table in force. `on_pressed` is called after each new table, `tell` with "names" and "routes" for the
    resolver."""

    def __init__(
        self,
        book: RouteBook,
        on_pressed: Callable[[], None],
        names: NameBook | None = None,
        tell: Callable[[str, bytes], None] = lambda name, data: None,
    ) -> None:
        self.book = book
        self._names = names or NameBook(book.devices)
        self._tell = tell
        self.table = RouteTable()
        self.revision: net_pb2.Revision | None = None
        """Of the table; None before the first."""
        self.publisher = BlobPublisher(router_service_pb2.WatchRoutesResponse)
        self._on_pressed = on_pressed
        self._newest: net_pb2.Revision | None = None
        self._dirty = asyncio.Event()

    def on_change(
        self,
        changed: Sequence[registry_service_pb2.Resource],
        removed: Sequence[registry_service_pb2.Tombstone],
        revision: net_pb2.Revision,
    ) -> None:
        """A transaction of the registry."""
        self.book.apply(changed, removed)
        self._names.apply(changed, removed)
        self._newest = revision
        self._dirty.set()

    async def run(self) -> None:
        """Compiles until cancelled."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._press()

    async def _press(self) -> None:
        """One compilation. What it needs for that is gone when it has ended."""
        revision, sources = self._newest, self.book.sources()
        assert revision is not None
        taken = {source.place for source in sources}
        sources += self._names.sources(taken)
        del taken
        if self._names.changed:
            self._tell("names", name_table.encode(self._names.networks()))
        try:
            data = await asyncio.to_thread(routes.compile, sources)
        except RouteConflict as error:
            # The registry refuses this; until it is mended there the old routes stay in force.
            log.error("routes_conflict", why=str(error), revision=revision.number)
            return
        for _ in self.table.load(data):
            await asyncio.sleep(0)
        self.revision = revision
        self.publisher.set(revision, data)
        self._tell("routes", data)
        log.info("routes_published", routes=self.table.routes, bytes=len(data), revision=revision.number)
        self._on_pressed()
