"""Messages to values and back: the services of resources, which are one class, and RegistryService.

Requests of all kinds have the same fields but for the resource's own (`device`, `devices`), which the table of kinds
knows. What the engine refuses becomes a `FalkirkError` here, in one table.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf import descriptor_pool, message_factory

from falkirk.api.net.v1.net_pb2 import Counter, ProcessInfo, Revision
from falkirk.api.registry.v1 import registry_service_pb2 as registry_pb2
from falkirk.registry import engine, kinds, ownership, pages
from falkirk.registry.engine import Engine, Surroundings
from falkirk.registry.kinds import BY_NAME, BY_NUMBER, KINDS, Kind
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.store import Store, Writing
from falkirk.registry.watch import Event, Feed, Interest, Piece, Step, Synced
from falkirk.runtime import callers, supervised
from falkirk.runtime.errors import FalkirkError

T = TypeVar("T")

_CODES = {
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.NAME_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.PREFIX_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.ADDRESS_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.KEY_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.TOKEN_UNKNOWN: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOKEN_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOKEN_USED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PROOF_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.SIGN_IN_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.TOO_MANY_TOKENS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.POOL_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_WATCHES: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WATCH_TOO_SLOW: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.REVISION_CONFLICT: grpc.StatusCode.ABORTED,
    Reason.IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.IS_DEFAULT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TARGET_NOT_BUILT: grpc.StatusCode.UNIMPLEMENTED,
    Reason.TREATMENT_NOT_BUILT: grpc.StatusCode.UNIMPLEMENTED,
    Reason.REVISION_GONE: grpc.StatusCode.OUT_OF_RANGE,
    Reason.AUTHORITY_LOCKED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_FIRST: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NO_CERTIFICATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LOGIN_REFUSED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.NODE_FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
}
"""What isn't listed is INVALID_ARGUMENT."""


class DryRun(Exception):
    """Ends a write without a trace, with its answer."""

    def __init__(self, answer: registry_pb2.ApplyResponse) -> None:
        super().__init__()
        self.answer = answer


class Desk:
    """The store as the services use it: writes through the engine, reads, errors translated."""

    def __init__(self, store: Store, feed: Feed, surroundings: Surroundings) -> None:
        self.store = store
        self.feed = feed
        self._surroundings = surroundings

    async def write(self, work: Callable[[Engine], T]) -> T:
        """Run engine work as one transaction."""

        def inside(writing: Writing) -> T:
            return work(Engine(writing, self._surroundings))

        return await self.transaction(inside)

    async def transaction(self, work: Callable[[Writing], T]) -> T:
        """Run work that needs no engine as one transaction."""
        return await self._outcome(self.store.write(work))

    async def read(self, work: Callable[[Any], T]) -> T:
        """Run a read in one consistent view."""
        return await self._outcome(self.store.read(work))

    def now_ns(self) -> int:
        """Wall-clock time, nanoseconds since 1970."""
        return self._surroundings.now_ns()

    def revision(self, number: int | None = None) -> Revision:
        """A revision of this store; the newest one where no number is given."""
        return Revision(epoch=self.store.epoch, number=self.store.revision if number is None else number)

    async def tenant(self, given: str) -> kinds.Value:
        """A tenant by name or id."""
        found = await self.read(lambda connection: engine.find(connection, BY_NAME["tenant"], "", given))
        if found is None:
            raise refusal(engine.not_found(BY_NAME["tenant"], given))
        return found

    async def watch(self, interest: Interest, request: Any) -> AsyncGenerator[Event, None]:
        """The feed's events for a watch request of either shape."""
        resume = (request.resume_after.epoch, request.resume_after.number) if request.HasField("resume_after") else None
        try:
            async with aclosing(self.feed.watch(interest, resume)) as events:
                async for event in events:
                    yield event
        except Refused as refused:
            raise refusal(refused) from refused

    @staticmethod
    async def _outcome(future: Future[T]) -> T:
        try:
            return await asyncio.wrap_future(future)
        except Refused as refused:
            raise refusal(refused) from refused


class ResourceService:
    """Create, Get, List, Update, Delete and Watch of one kind; the generated base classes have the same methods."""

    def __init__(self, kind: Kind, desk: Desk) -> None:
        self._kind = kind
        self._desk = desk
        package = kind.service.rpartition(".")[2]
        self._responses = {
            method: _message(f"{package}{method}Response")
            for method in ("Create", "Get", "List", "Update", "Delete", "Watch")
        }

    async def Create(self, request: Any, context: Any) -> Any:
        """See the proto."""
        value = getattr(request, self._kind.name)
        made, revision = await self._desk.write(lambda work: (work.create(self._kind, value), work.writing.revision))
        return self._responses["Create"](**{self._kind.name: made, "revision": self._desk.revision(revision)})

    async def Get(self, request: Any, context: Any) -> Any:
        """See the proto."""
        tenant = await self._tenant_name(request)
        if self._kind.scoped and not tenant:
            raise refusal(
                Refused(Reason.INVALID_FIELD, f"tenant: a {self._kind.label} lives in a tenant", field="tenant")
            )
        found = await self._desk.read(lambda connection: engine.find(connection, self._kind, tenant, request.name))
        if found is None or not ownership.may(found):
            raise refusal(engine.not_found(self._kind, request.name, tenant))
        return self._responses["Get"](**{self._kind.name: found})

    async def List(self, request: Any, context: Any) -> Any:
        """See the proto."""
        tenant = await self._tenant_name(request)
        page = await self._desk.read(
            lambda connection: pages.read(connection, self._kind, tenant, request.page_size, request.page_token)
        )
        response: Any = self._responses["List"](
            next_page_token=page.next_token, revision=self._desk.revision(page.revision)
        )
        items = getattr(response, self._kind.plural)
        for body in page.bodies:
            if ownership.narrow() and not ownership.may(kinds.parse(self._kind, body)):
                continue
            items.add().ParseFromString(body)
        return response

    async def Update(self, request: Any, context: Any) -> Any:
        """See the proto."""
        value = getattr(request, self._kind.name)
        stored, revision = await self._desk.write(lambda work: (work.update(self._kind, value), reached(work)))
        return self._responses["Update"](**{self._kind.name: stored, "revision": self._desk.revision(revision)})

    async def Delete(self, request: Any, context: Any) -> Any:
        """See the proto."""
        tenant = getattr(request, "tenant", "")
        own = await self._tenant_name(request) if ownership.narrow() else None
        caller = callers.current.get()

        def work(work: Engine) -> int:
            if own is not None:
                found = engine.find(work.connection, self._kind, own, request.name)
                if found is not None and not ownership.may_caller(found, caller):
                    raise engine.not_found(self._kind, request.name, own)
            work.delete(self._kind, tenant, request.name, request.revision)
            return work.writing.revision

        return self._responses["Delete"](revision=self._desk.revision(await self._desk.write(work)))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """See the proto. Transactions that changed nothing of this kind (and tenant) send nothing."""
        given = getattr(request, "tenant", "")
        tenant_id = (await self._desk.tenant(given)).metadata.id if given else ""
        async with aclosing(self._desk.watch(Interest((self._kind.number,), tenant_id), request)) as events:
            async for event in events:
                response = self._watched(event)
                if response is not None:
                    yield response

    def _watched(self, event: Event) -> Any:
        response: Any = self._responses["Watch"](revision=self._desk.revision(event.revision))
        match event:
            case Piece(bodies=bodies):
                for _, body in bodies:
                    response.changed.add().ParseFromString(body)
            case Synced():
                response.synced = True
            case Step(changes=changes):
                for change in changes:
                    if change.body is None:
                        response.removed_ids.append(change.id)
                    else:
                        response.changed.add().ParseFromString(change.body)
                if not changes:
                    return None
        return response

    async def _tenant_name(self, request: Any) -> str:
        """The name of the tenant that a request names by name or id; "" where it names none."""
        given = getattr(request, "tenant", "")
        return (await self._desk.tenant(given)).metadata.name if given else ""


class RegistryService:
    """The store as a whole."""

    def __init__(self, desk: Desk, started_ns: int) -> None:
        self._desk = desk
        self._started_ns = started_ns

    async def Watch(
        self, request: registry_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        """See the proto. A transaction without any of the asked kinds still sends its revision, so that a replica knows how far it is."""
        asked = set(request.kinds)
        for number in asked - BY_NUMBER.keys():
            raise refusal(Refused(Reason.INVALID_FIELD, f"kinds: {number} isn't a kind", field="kinds"))
        interest = Interest(tuple(kind.number for kind in KINDS if not asked or kind.number in asked))
        async with aclosing(self._desk.watch(interest, request)) as events:
            async for event in events:
                yield self._watched(event)

    async def Apply(self, request: registry_pb2.ApplyRequest, context: Any) -> registry_pb2.ApplyResponse:
        """See the proto."""

        def work(work: Engine) -> registry_pb2.ApplyResponse:
            results, outcomes = work.apply(request.resources)
            answer = registry_pb2.ApplyResponse(outcomes=outcomes, revision=self._desk.revision(reached(work)))
            for kind, value in results:
                getattr(answer.resources.add(), kind.name).CopyFrom(value)
            if request.dry_run:
                answer.revision.number = work.writing.revision - 1
                raise DryRun(answer)
            return answer

        try:
            return await self._desk.write(work)
        except DryRun as dry:
            return dry.answer

    async def Stats(self, request: registry_pb2.StatsRequest, context: Any) -> registry_pb2.StatsResponse:
        """See the proto."""
        rows = await self._desk.read(
            lambda connection: connection.execute("SELECT kind, count(*) FROM resource GROUP BY kind").fetchall()
        )
        counts: dict[int, int] = dict(rows)
        process = ProcessInfo(name="registry", pid=os.getpid(), generation=supervised.generation())
        process.start_time.FromNanoseconds(self._started_ns)
        return registry_pb2.StatsResponse(
            revision=self._desk.revision(),
            oldest_resumable=self._desk.store.oldest_resumable,
            resources=[Counter(name=kind.plural, value=counts.get(kind.number, 0)) for kind in KINDS],
            watches=self._desk.feed.watches,
            schema_version=self._desk.store.schema,
            processes=[process],
        )

    def _watched(self, event: Event) -> registry_pb2.WatchResponse:
        response = registry_pb2.WatchResponse(revision=self._desk.revision(event.revision))
        match event:
            case Piece(bodies=bodies):
                for number, body in bodies:
                    getattr(response.changed.add(), BY_NUMBER[number].name).ParseFromString(body)
            case Synced():
                response.synced = True
            case Step(changes=changes):
                for change in changes:
                    if change.body is None:
                        response.removed.add(kind=change.kind, id=change.id)
                    else:
                        getattr(response.changed.add(), BY_NUMBER[change.kind].name).ParseFromString(change.body)
        return response


def surroundings() -> Surroundings:
    """The real ones."""
    return Surroundings(now_ns=time.time_ns, new_id=lambda: str(uuid.uuid4()), random=os.urandom)


def refusal(refused: Refused) -> FalkirkError:
    """What the engine refuses, as gRPC says it."""
    code = _CODES.get(refused.reason, grpc.StatusCode.INVALID_ARGUMENT)
    error = FalkirkError(code, refused.reason, refused.message)
    error.metadata.update(refused.about)
    return error


def reached(work: Engine) -> int:
    """The revision at which a write is visible: the one before where nothing changed."""
    return work.writing.revision if work.writing.changes else work.writing.revision - 1


def _message(name: str) -> type[Any]:
    return message_factory.GetMessageClass(
        descriptor_pool.Default().FindMessageTypeByName(f"falkirk.api.registry.v1.{name}")
    )
