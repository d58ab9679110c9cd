"""FlowService.Top: looks at the workers' live tables and at the records of ends, once an interval, for one watcher (`falkirk.flow.top`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import grpc

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.flow.events import EventFeed, Subscription
from falkirk.flow.fleet import Fleet
from falkirk.flow.text import address_text
from falkirk.flow.top import Observed, Row, Tally, Whose
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.spool import AuditRecord
from falkirk.wire.context import TunnelContext

WATCHERS: Final = 8
"""Open at once: each goes through all flows once an interval."""
SLICE: Final = 2048
"""Flows that are looked at before the loop gets its turn."""
LIMIT: Final = 20
MAX_LIMIT: Final = 1000
MAX_INTERVAL_S: Final = 60
NOBODY: Final = ""
RESOLVER: Final = "resolver"


class Tops:
    """All watchers of one service."""

    def __init__(self, fleet: Fleet, feed: EventFeed) -> None:
        self._fleet, self._feed = fleet, feed
        self._open = 0

    async def watch(self, request: pb.TopRequest) -> AsyncIterator[pb.TopResponse]:
        """Messages for one watcher, without end."""
        interval = request.interval_s or 1
        if interval > MAX_INTERVAL_S:
            raise _invalid("INVALID_INTERVAL", f"interval_s: at most {MAX_INTERVAL_S}")
        limit = request.limit or LIMIT
        if limit > MAX_LIMIT:
            raise _invalid("LIMIT_TOO_LARGE", f"limit: at most {MAX_LIMIT}")
        if self._open >= WATCHERS:
            raise FalkirkError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_TOPS", f"{WATCHERS} are open already; close one"
            )
        self._open += 1
        try:
            with self._feed.subscribe() as subscription:
                look = _Look(self._fleet, request.by or pb.TOP_BY_DEVICE, request.tenant)
                begun = due = time.monotonic()
                while True:
                    await look.at(subscription)
                    now = time.monotonic()
                    yield look.message(limit, now - begun)
                    begun, due = now, max(due + interval, now)
                    await asyncio.sleep(due - now)
        finally:
            self._open -= 1


class _Look:
    """One watcher's."""

    def __init__(self, fleet: Fleet, by: int, tenant: str) -> None:
        self._fleet, self._by, self._tenant = fleet, by, tenant
        self._tally = Tally()

    async def at(self, subscription: Subscription) -> None:
        """Everything that is there, and what ended until it was looked at."""
        fleet = self._fleet
        for worker in range(fleet.workers):
            table = fleet.live(worker)
            for number, (tunnel, flow_id, destination, up, down) in enumerate(
                table.sums() if table is not None else ()
            ):
                context = fleet.context(worker, tunnel)
                if context is not None and self._tenant in ("", context.tenant):
                    self._tally.live(Observed(flow_id, self._whose(context, destination), up, down))
                if number % SLICE == SLICE - 1:
                    await asyncio.sleep(0)
        for record in subscription.waiting():
            if record.event == "ended" and self._tenant in ("", record.tenant):
                flow_id = bytes.fromhex(record.flow_id)
                self._tally.ended(Observed(flow_id, self._of_record(record), record.bytes_up, record.bytes_down))

    def message(self, limit: int, seconds: float) -> pb.TopResponse:
        """What passed in so many seconds."""
        rows, total, count = self._tally.close(limit)
        response = pb.TopResponse(
            rows=[_row(whose, row, seconds) for whose, row in rows],
            total=_row(Whose(self._tenant, NOBODY), total, seconds),
            count=count,
        )
        response.time.GetCurrentTime()
        return response

    def _whose(self, context: TunnelContext, destination: bytes) -> tuple[Whose, ...]:
        if self._by != pb.TOP_BY_DESTINATION:
            return self._initiator(context.tenant, context.device, context.user, context.groups)
        route = self._fleet.routes.lookup(context.virtual_network_id, destination)
        name = address_text(destination)
        if route is not None and route.device is not None:
            name = route.device.device
        elif route is not None and route.target == "resolver":
            name = RESOLVER
        return (Whose(context.tenant, name),)

    def _of_record(self, record: AuditRecord) -> tuple[Whose, ...]:
        if self._by != pb.TOP_BY_DESTINATION:
            return self._initiator(record.tenant, record.device, record.user, tuple(record.groups))
        return (Whose(record.tenant, record.destination_device or record.destination),)

    def _initiator(self, tenant: str, device: str, user: str, groups: tuple[str, ...]) -> tuple[Whose, ...]:
        if self._by == pb.TOP_BY_USER:
            return (Whose(tenant, user),)
        if self._by == pb.TOP_BY_GROUP:
            return tuple(Whose(tenant, group) for group in groups or (NOBODY,))
        return (Whose(tenant, device, user, groups),)


def _row(whose: Whose, row: Row, seconds: float) -> pb.TopResponse.Row:
    span = max(seconds, 1e-9)
    return pb.TopResponse.Row(
        tenant=whose.tenant,
        name=whose.name,
        user=whose.user,
        groups=whose.groups,
        flows=max(row.flows, 0),
        bytes_up_s=int(row.passed_up / span),
        bytes_down_s=int(row.passed_down / span),
        bytes_up=max(row.bytes_up, 0),
        bytes_down=max(row.bytes_down, 0),
    )


def _invalid(reason: str, message: str) -> FalkirkError:
    return FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
