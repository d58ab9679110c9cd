"""Messages to values and back: AuditService, and who hears of stored records.

Deliver keeps up to `PIPELINE` requests of a stream in the store's hands at once and acknowledges them in order. Tail
subscribers have a bounded queue each; one that can't follow is ended and told so, nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any, Final

import grpc
import msgspec

from falkirk.api.policy.v1 import policy_service_pb2 as pb
from falkirk.api.policy.v1 import policy_service_pb2_grpc as pb_grpc
from falkirk.policy import query, segment
from falkirk.policy.records import Filter, Key, Record, accept
from falkirk.policy.store import AuditStore, Stored
from falkirk.runtime import telemetry
from falkirk.runtime.errors import FalkirkError

MAX_RECORDS: Final = 1000
"""Records of one Deliver request."""
PIPELINE: Final = 16
DEFAULT_LIMIT: Final = 1000
MAX_LIMIT: Final = 100_000
TAIL_QUEUE: Final = 20_000
"""Records that a Tail may be behind."""
_SAMPLED: Final = b'"sampled":true'


class _Traced(msgspec.Struct):
    """What a sampled record says of its trace."""

    flow_id: str = ""
    span_id: str = ""
    sampled: bool = False
    tenant: str = ""
    rule: str = ""


_traced: Final = msgspec.json.Decoder(_Traced)


class Subscriber:
    """A Tail in progress."""

    def __init__(self, wanted: Filter) -> None:
        self.wanted = wanted
        self.needles = wanted.needles()
        self.queue: asyncio.Queue[Record] = asyncio.Queue(TAIL_QUEUE)
        self.overrun = asyncio.Event()


class Announcer:
    """Takes what the store's thread has made durable to the loop: to subscribers and to traces."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.subscribers: set[Subscriber] = set()

    def stored(self, stored: Stored) -> None:
        """For `AuditStore.on_stored`. Called in the store's thread; does nothing once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._announce, stored)

    def _announce(self, stored: Stored) -> None:
        if telemetry.exporting():
            for record in stored.records:
                if _SAMPLED in record.json:
                    _span(record, stored)
        for subscriber in self.subscribers:
            for record in stored.records:
                if all(needle in record.json for needle in subscriber.needles) and subscriber.wanted.matches(
                    record.json
                ):
                    if subscriber.queue.full():
                        subscriber.overrun.set()
                        break
                    subscriber.queue.put_nowait(record)


class AuditService(pb_grpc.AuditServiceServicer):
    """Delivery, queries and tails; see the proto."""

    def __init__(self, store: AuditStore, announcer: Announcer) -> None:
        self._store = store
        self._announcer = announcer

    async def Deliver(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.DeliverResponse]:
        """See the proto."""
        pending: asyncio.Queue[Future[dict[Key, int]] | None] = asyncio.Queue()
        room = asyncio.Semaphore(PIPELINE)

        async def receive() -> None:
            async for request in request_iterator:
                await room.acquire()
                pending.put_nowait(self._append(request))

        receiver = asyncio.create_task(receive())
        receiver.add_done_callback(lambda _: pending.put_nowait(None))
        try:
            while (future := await pending.get()) is not None:
                try:
                    marks = await asyncio.wrap_future(future)
                except OSError as error:
                    raise FalkirkError(
                        grpc.StatusCode.UNAVAILABLE,
                        "AUDIT_NOT_STORED",
                        f"the audit log can't be written: {error.strerror}",
                    ) from error
                room.release()
                for (node, worker, epoch), sequence in marks.items():
                    yield pb.DeliverResponse(node=node, worker=worker, epoch=epoch, sequence=sequence)
            await receiver
        finally:
            receiver.cancel()
            await asyncio.wait((receiver,))

    def _append(self, request: pb.DeliverRequest) -> Future[dict[Key, int]]:
        if len(request.records) > MAX_RECORDS:
            raise _invalid(
                "TOO_MANY_RECORDS", f"{len(request.records)} records in a request; the most is {MAX_RECORDS}"
            )
        records = []
        for record in request.records:
            if not record.sequence:
                raise _invalid("INVALID_SEQUENCE", "sequence: counts from 1")
            records.append(accept(record.node, record.worker, record.epoch, record.sequence, record.json))
        return self._store.append(records)

    async def Query(self, request: pb.QueryRequest, context: Any) -> AsyncIterator[pb.QueryResponse]:
        """See the proto."""
        limit = request.limit or DEFAULT_LIMIT
        if limit > MAX_LIMIT:
            raise _invalid("LIMIT_TOO_LARGE", f"limit: {limit} is more than {MAX_LIMIT}")
        wanted = _filter(request.filter)
        cancelled = threading.Event()
        try:
            found = await asyncio.to_thread(query.newest, self._store, wanted, limit, cancelled)
        finally:
            cancelled.set()
        for stored_at, json in found:
            response = pb.QueryResponse(record=_record(json))
            response.stored_at.FromJsonString(stored_at.decode())
            yield response

    async def Tail(self, request: pb.TailRequest, context: Any) -> AsyncIterator[pb.TailResponse]:
        """See the proto. The initial metadata is sent at once: what is stored from then on will come."""
        subscriber = Subscriber(_filter(request.filter))
        self._announcer.subscribers.add(subscriber)
        try:
            await context.send_initial_metadata(())
            while True:
                record = await subscriber.queue.get()
                yield pb.TailResponse(record=_record(record.json))
                if subscriber.overrun.is_set() and subscriber.queue.empty():
                    raise FalkirkError(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        "TAIL_TOO_SLOW",
                        f"more than {TAIL_QUEUE} records behind; read what was missed with Query",
                    )
        finally:
            self._announcer.subscribers.discard(subscriber)


def _span(record: Record, stored: Stored) -> None:
    """The span `audit` in the trace of the record's flow: from its arrival to its fsync."""
    try:
        traced = _traced.decode(record.json)
        trace_id, parent = bytes.fromhex(traced.flow_id), bytes.fromhex(traced.span_id)
    except ValueError:
        return
    if traced.sampled and len(trace_id) == 16:
        attributes: dict[str, str | bool | int | float] = {"event": record.event, "tenant": traced.tenant}
        if traced.rule:
            attributes["rule"] = traced.rule
        telemetry.emit_span(
            "audit",
            trace_id,
            parent if len(parent) == 8 else None,
            None,
            stored.received_at,
            stored.stored_at,
            attributes,
        )


def _record(json: bytes) -> pb.AuditRecord:
    ids = segment.ids(json)
    return pb.AuditRecord(node=ids.node, worker=ids.worker, epoch=ids.epoch, sequence=ids.sequence, json=json.decode())


def _filter(given: pb.AuditFilter) -> Filter:
    """Raises FalkirkError, INVALID_ARGUMENT."""
    destination = given.destination_address
    if destination:
        try:
            destination = str(ipaddress.ip_address(destination))
        except ValueError as error:
            raise _invalid("INVALID_ADDRESS", f"filter.destination_address: {error}") from error
    return Filter(
        tenant=given.tenant,
        device=given.device,
        event=given.event,
        flow_id=given.flow_id.lower(),
        destination=destination,
        start=given.time.start.ToNanoseconds(),
        end=given.time.end.ToNanoseconds(),
    )


def _invalid(reason: str, message: str) -> FalkirkError:
    return FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
