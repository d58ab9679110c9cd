"""Replicas: what an owner pushes, kept in memory and on disk, so that decisions go on while the owner is away.

`ResourceReplica` mirrors some kinds of the registry's resources; `BlobReplica` holds the newest compiled snapshot of policy or router; `BlobPublisher`
is the owner's side of that. Both replicas follow the same life: read the disk copy and tell of it, watch the owner, tell of every change, write the
disk copy, and watch again (50 ms to 500 ms apart) whenever the stream ends, resuming from what they have. Nothing is ever thrown away
because the owner went away.

Callbacks are awaited one after another in the loop; while one runs, the stream waits. A callback that raises ends `run`, and with it the service.

Revisions are the registry's, (epoch, number). Within one epoch a replica never goes back: an owner that restarts from an older disk copy than ours
is ignored until it has caught up. A new epoch (a restored store) always wins.

Limits: a resource replica's disk copy lags at most `FLUSH_SECONDS` behind; a crash resumes from there. A disk that can't be written is logged and
tried again at the next change, except that a blob that can't be written isn't passed on, since its readers open the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import grpc
import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import registry_service_pb2, registry_service_pb2_grpc
from falkirk.runtime import blob
from falkirk.runtime.errors import from_rpc

CHUNK_BYTES: Final = 256 * 1024
FLUSH_SECONDS: Final = 1.0
FIRST_WAIT: Final = 0.05
LONGEST_WAIT: Final = 0.5

Revision = net_pb2.Revision
R = TypeVar("R")
log = structlog.get_logger()

KINDS: Final[Mapping[str, int]] = {
    "tenant": registry_service_pb2.KIND_TENANT,
    "user": registry_service_pb2.KIND_USER,
    "device": registry_service_pb2.KIND_DEVICE,
    "virtual_network": registry_service_pb2.KIND_VIRTUAL_NETWORK,
    "route": registry_service_pb2.KIND_ROUTE,
    "policy": registry_service_pb2.KIND_POLICY,
    "node": registry_service_pb2.KIND_NODE,
    "zone": registry_service_pb2.KIND_ZONE,
}
"""Kind by the name of its field in Resource."""


TAG_BYTES: Final = 4
"""Bytes of the set of kinds in a disk copy: kinds are below 32."""


class SnapshotRefused(Exception):
    """Raised by an `on_snapshot` that can't read the bytes (of another format): they are forgotten and asked for again."""


class _Distrust(Exception):
    """What came can't be used; watch again from nothing."""


class _Replica:
    """The life that both replicas share."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.path = directory / f"{name}.bin"
        self.revision: Revision | None = None
        """What is applied; None before there is anything."""
        self.live = False
        """True while the owner's watch is connected and past its first state."""
        self.loaded = asyncio.Event()
        """Set once there is anything, from disk or from the owner."""
        self._source = "none"
        self._read = False

    async def run(self) -> None:
        """Follows the owner until cancelled."""
        await self._begin()
        wait = FIRST_WAIT
        try:
            while True:
                try:
                    await self._follow()
                    why = "the stream ended"
                except grpc.RpcError as error:
                    failed = from_rpc(error)
                    if failed.code is grpc.StatusCode.OUT_OF_RANGE:
                        self._forget()
                    why = str(failed)
                except _Distrust as error:
                    self._forget()
                    self.live, why, wait = False, str(error), LONGEST_WAIT
                    log.error("replica_distrusted", replica=self.name, why=why)
                except OSError as error:
                    why = f"{self.path}: {error}"
                if self.live:
                    self.live = False
                    log.warning("replica_away", replica=self.name, why=why)
                    wait = FIRST_WAIT
                else:
                    log.debug("replica_away", replica=self.name, why=why)
                await asyncio.sleep(wait)
                wait = min(LONGEST_WAIT, 2 * wait)
        finally:
            self.live = False

    def _synced(self) -> None:
        if not self.live:
            self.live = True
            log.info("replica_live", replica=self.name, revision=self.revision.number if self.revision else 0)

    def _load(self) -> blob.Blob | None:
        try:
            found = blob.load(self.path)
        except FileNotFoundError:
            return None
        except (blob.BlobError, OSError) as error:
            log.warning("replica_unreadable", replica=self.name, path=str(self.path), why=str(error))
            return None
        self.revision = Revision(epoch=found.epoch, number=found.number)
        self._source = "disk"
        return found

    def _status(self, items: int) -> net_pb2.ReplicaStatus:
        return net_pb2.ReplicaStatus(
            name=self.name, revision=self.revision, live=self.live, source=self._source, items=items
        )

    async def _begin(self) -> None:
        raise NotImplementedError

    async def _follow(self) -> None:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError


class BlobReplica(_Replica):
    """The newest snapshot of an owner, in `directory/<name>.bin` (`falkirk.runtime.blob`), usually `shell.data(service) / "replica"`.

    `watch(have)` opens the stream, for example `lambda have: stub.WatchRules(pb.WatchRulesRequest(have=have), wait_for_ready=True)`.
    `on_snapshot(path, revision)` is awaited for the disk copy at the start of `run` and for each newer one; the file is in place by then, and
    may already be a newer one when it is opened. It may raise `SnapshotRefused`. `items` is for `status` alone: whoever reads the bytes may set it.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        watch: Callable[[Revision | None], AsyncIterable[Any]],
        on_snapshot: Callable[[Path, Revision], Awaitable[None]],
    ) -> None:
        super().__init__(name, directory)
        self.items = 0
        self._watch, self._on_snapshot = watch, on_snapshot
        self._sha256 = b""

    async def load_disk(self) -> tuple[Path, Revision] | None:
        """Reads the disk copy's head, before `run` if wanted early; None where there is none that is whole."""
        if not self._read:
            self._read = True
            found = self._load()
            if found is not None:
                self._sha256 = hashlib.sha256(found.data).digest()
        return None if self.revision is None else (self.path, self.revision)

    def status(self) -> net_pb2.ReplicaStatus:
        """For Stats."""
        return self._status(self.items)

    async def _begin(self) -> None:
        found = await self.load_disk()
        if found is not None:
            await self._tell(found[1])

    async def _tell(self, revision: Revision) -> None:
        try:
            await self._on_snapshot(self.path, revision)
        except SnapshotRefused as refused:
            log.warning("snapshot_refused", replica=self.name, revision=revision.number, why=str(refused))
            self._forget()
            if self.live:
                raise _Distrust(str(refused)) from refused
            return
        self.loaded.set()

    def _forget(self) -> None:
        self.revision, self._sha256, self._source = None, b"", "none"
        blob.remove(self.path)

    async def _follow(self) -> None:
        pieces: list[bytes] = []
        pieces_of: Revision | None = None
        async with _stream(self._watch(self.revision)) as responses:
            async for response in responses:
                if response.unchanged:
                    await self._confirm(response.revision)
                    continue
                if response.revision != pieces_of:
                    pieces, pieces_of = [], Revision()
                    pieces_of.CopyFrom(response.revision)
                pieces.append(response.chunk)
                if response.complete:
                    whole, pieces = pieces, []
                    await self._take(pieces_of, whole, response.sha256)

    async def _confirm(self, revision: Revision) -> None:
        """Our bytes are current, at this revision."""
        if self.revision is None:
            raise _Distrust("the owner takes us to have what we don't have")
        if revision != self.revision and not _older(revision, self.revision):
            data = (await asyncio.to_thread(blob.load, self.path)).data
            await self._save(revision, data)
        self._source = "owner"
        self._synced()

    async def _take(self, revision: Revision, pieces: list[bytes], sha256: bytes) -> None:
        data = b"".join(pieces)
        # Whoever waits for the next one must not hold on to this one.
        pieces.clear()
        if hashlib.sha256(data).digest() != sha256:
            raise _Distrust("a snapshot's SHA-256 doesn't match")
        if self.revision is not None and _older(revision, self.revision):
            log.warning("snapshot_older", replica=self.name, revision=revision.number, ours=self.revision.number)
            self._synced()
            return
        changed = sha256 != self._sha256
        await self._save(revision, data)
        self._sha256, self._source = sha256, "owner"
        self._synced()
        if changed:
            await self._tell(revision)

    async def _save(self, revision: Revision, data: bytes) -> None:
        await asyncio.to_thread(blob.save, self.path, blob.Blob(revision.epoch, revision.number, data))
        self.revision = Revision(epoch=revision.epoch, number=revision.number)


class ResourceReplica(_Replica):
    """Some kinds of resources, as the registry has them; disk copy in `directory/<name>.bin`.

    `items[kind][id]` is a resource as the disk copy has it, and `messages` reads it; kinds as in registry.v1.Kind. `on_change(changed, removed, revision)`, a
    function or a coroutine function, is told of the disk copy, of the difference to it once the first state is complete, and of each transaction, all after
    `items` has them; both lists are empty where a transaction touched none of these kinds and only the revision moved.

    What is kept is encoded, since a message takes five times as much, and one of a transaction holds on to the whole of it. Limit: 0.25 kB a resource beside its own bytes.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        channel: grpc.aio.Channel,
        kinds: Sequence[int],
        on_change: Callable[
            [Sequence[registry_service_pb2.Resource], Sequence[registry_service_pb2.Tombstone], Revision],
            Awaitable[None] | None,
        ],
    ) -> None:
        super().__init__(name, directory)
        self.kinds = tuple(kinds)
        self.items: dict[int, dict[str, bytes]] = {kind: {} for kind in self.kinds}
        self._stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self._on_change = on_change
        self._dirty = asyncio.Event()
        self._resumable = True

    async def run(self) -> None:
        """Follows the registry until cancelled; the disk copy is written a last time then."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._flush_always())
                await super().run()
        finally:
            await self._flush()

    async def load_disk(self) -> Revision | None:
        """Reads the disk copy into `items`, before `run` if wanted early; None where there is none that is whole."""
        if not self._read:
            self._read = True
            found = self._load()
            if found is not None and found.data[:TAG_BYTES] != self._kinds_tag():
                self.revision, self._source = None, "none"  # written for other kinds: some of ours would be missing
            elif found is not None:
                for resource in registry_service_pb2.WatchResponse.FromString(found.data[TAG_BYTES:]).changed:
                    self._put(self.items, resource)
        return self.revision

    def messages(self, kind: int) -> Iterator[Any]:
        """The resources of a kind, as their own messages (Tenant, Device, …)."""
        return (_inner(_resource(encoded))[1] for encoded in self.items[kind].values())

    def _kinds_tag(self) -> bytes:
        """The head of the disk copy's data: the kinds in it."""
        return sum(1 << kind for kind in set(self.kinds)).to_bytes(TAG_BYTES, "big")

    def status(self) -> net_pb2.ReplicaStatus:
        """For Stats."""
        return self._status(sum(len(of_kind) for of_kind in self.items.values()))

    async def _begin(self) -> None:
        if await self.load_disk() is not None:
            await self._tell(_resources(self.items), [])

    def _forget(self) -> None:
        """Resume from nothing; what we have stays in force until the whole state has come."""
        self._resumable = False

    async def _follow(self) -> None:
        request = registry_service_pb2.WatchRequest(kinds=[registry_service_pb2.Kind.Name(kind) for kind in self.kinds])
        resuming = self.revision is not None and self._resumable
        if self.revision is not None and resuming:
            request.resume_after.CopyFrom(self.revision)
        whole: dict[int, dict[str, bytes]] = {kind: {} for kind in self.kinds}
        complete = resuming
        async with _stream(self._stub.Watch(request, wait_for_ready=True)) as responses:
            async for response in responses:
                if complete:
                    await self._transaction(response)
                else:
                    for resource in response.changed:
                        self._put(whole, resource)
                    if response.synced:
                        complete = self._resumable = True
                        await self._replace(whole, response.revision)
                if response.synced:
                    self._source = "owner"
                    self._synced()

    async def _transaction(self, response: registry_service_pb2.WatchResponse) -> None:
        if self.revision is not None and (
            response.revision == self.revision or _older(response.revision, self.revision)
        ):
            return  # seen before the stream was resumed, or SYNCED alone
        changed = [resource for resource in response.changed if self._put(self.items, resource)]
        removed = [tombstone for tombstone in response.removed if tombstone.kind in self.items]
        for tombstone in removed:
            self.items[tombstone.kind].pop(tombstone.id, None)
        self._applied(response.revision)
        await self._tell(changed, removed)

    async def _replace(self, whole: dict[int, dict[str, bytes]], revision: Revision) -> None:
        """A complete first state: only what differs from ours is told."""
        removed = [
            registry_service_pb2.Tombstone(kind=registry_service_pb2.Kind.Name(kind), id=identity)
            for kind, of_kind in self.items.items()
            for identity in of_kind.keys() - whole[kind].keys()
        ]
        changed = _resources(
            {
                kind: {identity: new for identity, new in of_kind.items() if self.items[kind].get(identity) != new}
                for kind, of_kind in whole.items()
            }
        )
        for kind, of_kind in whole.items():  # in place, so that whoever holds a kind's dict keeps the right one
            self.items[kind].clear()
            self.items[kind].update(of_kind)
        self._applied(revision)
        await self._tell(changed, removed)

    def _applied(self, revision: Revision) -> None:
        self.revision = Revision(epoch=revision.epoch, number=revision.number)
        self._dirty.set()

    async def _tell(self, changed: Sequence[Any], removed: Sequence[Any]) -> None:
        assert self.revision is not None
        self.loaded.set()
        result = self._on_change(changed, removed, self.revision)
        if inspect.isawaitable(result):
            await result

    async def _flush_always(self) -> None:
        while True:
            await self._dirty.wait()
            await self._flush()
            await asyncio.sleep(FLUSH_SECONDS)

    async def _flush(self) -> None:
        if not self._dirty.is_set() or self.revision is None:
            return
        self._dirty.clear()
        revision, items = self.revision, {kind: dict(of_kind) for kind, of_kind in self.items.items()}

        def write() -> None:
            state = registry_service_pb2.WatchResponse(revision=revision, synced=True).SerializeToString()
            # Encodings that follow one another are those of one message.
            data = b"".join(
                (self._kinds_tag(), state, *(encoded for of_kind in items.values() for encoded in of_kind.values()))
            )
            blob.save(self.path, blob.Blob(revision.epoch, revision.number, data))

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            log.error("replica_not_written", replica=self.name, path=str(self.path), why=str(error))

    def _put(self, items: dict[int, dict[str, bytes]], resource: registry_service_pb2.Resource) -> bool:
        """False for a kind that wasn't asked for (a newer owner, or a disk copy of other kinds)."""
        name, message = _inner(resource)
        of_kind = items.get(KINDS.get(name, 0))
        if of_kind is None:
            return False
        one = registry_service_pb2.WatchResponse(changed=[resource])
        # Deterministic, as two encodings are compared.
        of_kind[sys.intern(message.metadata.id)] = one.SerializeToString(deterministic=True)
        return True


class BlobPublisher(Generic[R]):
    """The owner's side of a BlobReplica: holds the newest snapshot and streams it to whoever watches.

    `BlobPublisher(policy_service_pb2.WatchRulesResponse)`; in the servicer::

        async def WatchRules(self, request, context):
            async for response in self.publisher.watch(request.have if request.HasField("have") else None):
                yield response

    A watcher gets whole snapshots; those that came and went while it was busy are left out. Where the bytes are the ones that it was sent already and
    only the revision moved, it gets one response with `unchanged` and the new revision.
    """

    def __init__(self, response: Callable[..., R]) -> None:
        self._response = response
        self._current: tuple[Revision, bytes, bytes] | None = None
        self._changed = asyncio.Event()
        self.watchers = 0
        """Open streams."""

    @property
    def revision(self) -> Revision | None:
        """Of the newest snapshot; None before the first."""
        return None if self._current is None else self._current[0]

    def set(self, revision: Revision, data: bytes) -> None:
        """A new snapshot, for every watcher."""
        copy = Revision(epoch=revision.epoch, number=revision.number)
        self._current = (copy, data, hashlib.sha256(data).digest())
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, have: Revision | None) -> AsyncIterator[R]:
        """Responses for one watcher, without end."""
        has_revision, has_sha256 = have, b""
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                if self._current is not None:
                    revision, data, sha256 = self._current
                    if (revision == has_revision and not has_sha256) or (
                        sha256 == has_sha256 and revision != has_revision
                    ):
                        yield self._response(revision=revision, unchanged=True)
                    elif sha256 != has_sha256:
                        for response in self._pieces(revision, data, sha256):
                            yield response
                    has_revision, has_sha256 = revision, sha256
                    if self._current[0] is not revision:
                        continue
                await changed.wait()
        finally:
            self.watchers -= 1

    def _pieces(self, revision: Revision, data: bytes, sha256: bytes) -> list[R]:
        last = max(0, (len(data) - 1) // CHUNK_BYTES)
        return [
            self._response(
                revision=revision,
                chunk=data[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES],
                complete=place == last,
                sha256=sha256 if place == last else b"",
            )
            for place in range(last + 1)
        ]


@contextlib.asynccontextmanager
async def _stream(call: AsyncIterable[R]) -> AsyncIterator[AsyncIterable[R]]:
    """A response stream that is cancelled when the block ends."""
    try:
        yield call
    finally:
        if isinstance(call, grpc.aio.Call):
            call.cancel()


def _older(one: Revision, other: Revision) -> bool:
    return one.epoch == other.epoch and one.number < other.number


def _inner(resource: registry_service_pb2.Resource) -> tuple[str, Any]:
    """The kind's field and its message."""
    name = resource.WhichOneof("resource")
    return (name, getattr(resource, name)) if name else ("", resource)


def _resource(encoded: bytes) -> registry_service_pb2.Resource:
    """One of a replica's items."""
    return registry_service_pb2.WatchResponse.FromString(encoded).changed[0]


def _resources(items: Mapping[int, Mapping[str, bytes]]) -> list[registry_service_pb2.Resource]:
    return [_resource(encoded) for of_kind in items.values() for encoded in of_kind.values()]
