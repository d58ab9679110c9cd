"""Lifetime events for watchers, and spans for the trace exporter, both out of the spool's records.

A watcher that doesn't keep up loses the oldest events and is told how many. Spans are made from what the worker wrote
down: `flow` (the root, at the end), with `resolve` and `decide` below it; `onramp`, `upgrader` and `policy` add theirs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

import msgspec

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.net.v1 import net_pb2
from falkirk.flow.messages import PROTOCOLS, TREATMENTS
from falkirk.runtime import telemetry
from falkirk.runtime.spool import AuditRecord
from falkirk.wire.protocol import number as protocol_number

QUEUE: Final = 10_000
"""Events that wait for one watcher."""
_decode: Final = msgspec.json.Decoder(AuditRecord).decode
_EVENTS: Final = {
    "started": (pb.WatchResponse.EVENT_STARTED, pb.FLOW_STATE_HELD),
    "denied": (pb.WatchResponse.EVENT_DENIED, pb.FLOW_STATE_DENIED),
    "ended": (pb.WatchResponse.EVENT_ENDED, pb.FLOW_STATE_ENDED),
}


class Subscription:
    """One watcher's queue."""

    def __init__(self) -> None:
        self._queue: deque[AuditRecord] = deque()
        self._dropped = 0
        self._ready = asyncio.Event()

    def put(self, record: AuditRecord) -> None:
        """Add an event, at the price of the oldest where the queue is full."""
        if len(self._queue) == QUEUE:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(record)
        self._ready.set()

    def waiting(self) -> list[AuditRecord]:
        """All that waits, taken; what was lost before it isn't told."""
        taken = list(self._queue)
        self._queue.clear()
        return taken

    async def __aiter__(self) -> AsyncIterator[tuple[AuditRecord, int]]:
        while True:
            while self._queue:
                dropped, self._dropped = self._dropped, 0
                yield self._queue.popleft(), dropped
            self._ready.clear()
            await self._ready.wait()


class EventFeed:
    """Fans records out; costs nothing a record while nobody watches and it isn't sampled."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """A queue for as long as the context lasts."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def lines(self, lines: list[bytes]) -> None:
        """New lines of a spool."""
        for line in lines:
            sampled = b'"sampled":true' in line
            if not sampled and not self._subscriptions:
                continue
            record = _decode(line)
            if record.event not in _EVENTS:
                continue  # A capture is nothing that happened to a flow.
            for subscription in self._subscriptions:
                subscription.put(record)
            if sampled:
                spans(record)


def spans(record: AuditRecord) -> None:
    """Export what a sampled record tells."""
    trace_id, root = bytes.fromhex(record.flow_id), bytes.fromhex(record.span_id)
    time = nanoseconds(record.time)
    if record.event != "ended":
        # How long the two stages took is measured; they follow each other at the flow's start.
        resolved = time + record.resolve_ns
        found = {"falkirk.route_id": record.route_id}
        telemetry.emit_span("resolve", trace_id, root, None, time, resolved, found)
        decided = {"falkirk.rule": record.rule or "(default deny)", "falkirk.why": record.why}
        telemetry.emit_span("decide", trace_id, root, None, resolved, resolved + record.decide_ns, decided)
    if record.event != "started":
        attributes: dict[str, str | int] = {
            "falkirk.tenant": record.tenant,
            "falkirk.device": record.device,
            "falkirk.user": record.user,
            "falkirk.groups": ",".join(record.groups),
            "falkirk.tunnel_id": record.tunnel_id,
            "falkirk.reason": record.reason,
            "network.transport": record.protocol,
            "source.address": record.source,
            "source.port": record.source_port,
            "destination.address": record.destination,
            "destination.port": record.destination_port,
            "falkirk.bytes_up": record.bytes_up,
            "falkirk.bytes_down": record.bytes_down,
        }
        status = "" if record.event == "ended" else f"denied: {record.reason}"
        telemetry.emit_span("flow", trace_id, None, root, time - record.duration_ns, time, attributes, status)


def nanoseconds(text: str) -> int:
    """A record's RFC 3339 time as wall-clock nanoseconds."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(whole + "+00:00").timestamp()) * 1_000_000_000 + int(fraction.ljust(9, "0"))


def flow_of_record(record: AuditRecord) -> tuple[pb.WatchResponse.Event, pb.Flow]:
    """A record as an event."""
    event, state = _EVENTS[record.event]
    number = protocol_number(record.protocol)
    flow = pb.Flow(
        id=record.flow_id,
        key=net_pb2.FlowKey(
            source_address=record.source,
            source_port=record.source_port,
            destination_address=record.destination,
            destination_port=record.destination_port,
            protocol=PROTOCOLS.get(number, net_pb2.PROTOCOL_OTHER) if record.protocol else net_pb2.PROTOCOL_UNSPECIFIED,
            protocol_number=max(number, 0),
        ),
        state=state,
        tunnel_id=record.tunnel_id,
        context=net_pb2.TunnelContext(
            tenant_id=record.tenant_id,
            tenant=record.tenant,
            device_id=record.device_id,
            device=record.device,
            user=record.user,
            groups=record.groups,
            virtual_network=record.virtual_network,
        ),
        destination_device=record.destination_device,
        destination_user=record.destination_user,
        destination_groups=record.destination_groups,
        treatment=TREATMENTS.get(record.treatment, net_pb2.TREATMENT_UNSPECIFIED),
        rule=record.rule,
        route_id=record.route_id,
        worker=record.worker,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        packets_up=record.packets_up,
        packets_down=record.packets_down,
        reason=record.reason,
    )
    time = nanoseconds(record.time)
    flow.start_time.FromNanoseconds(time - record.duration_ns)
    flow.last_time.FromNanoseconds(time)
    if record.duration_ns:
        flow.duration.FromNanoseconds(record.duration_ns)
    return event, flow
