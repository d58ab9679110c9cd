"""Replicas and their owner's side: first state, changes, resume, disk, distrust."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.policy.v1 import policy_service_pb2
from falkirk.api.registry.v1 import (
    device_service_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
    resource_pb2,
    tenant_service_pb2,
)
from falkirk.runtime import blob
from falkirk.runtime.replica import BlobPublisher, BlobReplica, ResourceReplica, Revision, SnapshotRefused
from tests.process.in_loop import in_loop

DEADLINE = 15.0
TENANT = registry_service_pb2.KIND_TENANT
DEVICE = registry_service_pb2.KIND_DEVICE


class Changes:
    """What callbacks were told, and a way to wait for it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.changed = asyncio.Event()

    def add(self, item: Any) -> None:
        self.seen.append(item)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.changed.clear()
                with contextlib.suppress(TimeoutError):  # some conditions change without a callback
                    await asyncio.wait_for(self.changed.wait(), 0.05)


@asynccontextmanager
async def running(target: BlobReplica | ResourceReplica) -> AsyncIterator[None]:
    task = asyncio.create_task(target.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled(), task.exception()


# Blobs. The stream is the publisher's own, without gRPC between.


class Owner:
    """A publisher that can go away; its streams end then."""

    def __init__(self) -> None:
        self.publisher = BlobPublisher(policy_service_pb2.WatchRulesResponse)
        self.asked: list[Revision | None] = []
        self.sent: list[policy_service_pb2.WatchRulesResponse] = []
        self.gone = asyncio.Event()

    async def watch(self, have: Revision | None) -> AsyncIterator[policy_service_pb2.WatchRulesResponse]:
        self.asked.append(have)
        stream = self.publisher.watch(have)
        while not self.gone.is_set():
            answer = asyncio.ensure_future(anext(stream))
            gone = asyncio.ensure_future(self.gone.wait())
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not answer.done():
                answer.cancel()
                return
            self.sent.append(answer.result())
            yield answer.result()


def blobs(directory: Path, owner: Owner, told: Changes) -> BlobReplica:
    async def on_snapshot(path: Path, revision: Revision) -> None:
        found = blob.load(path)
        if found.data == b"refused":
            raise SnapshotRefused("not this format")
        told.add((revision.number, found.data))

    return BlobReplica("rules", directory, owner.watch, on_snapshot)


@in_loop
async def test_snapshots_arrive_whole_and_in_order(tmp_path: Path) -> None:
    owner, told = Owner(), Changes()
    rules = blobs(tmp_path, owner, told)
    assert rules.status().source == "none"
    async with running(rules):
        big = bytes(range(256)) * 4096  # 1 MiB: four pieces
        owner.publisher.set(Revision(epoch="e", number=5), big)
        await told.until(lambda: told.seen == [(5, big)])
        assert len(owner.sent) == 4
        owner.publisher.set(Revision(epoch="e", number=6), b"")
        await told.until(lambda: told.seen[1:] == [(6, b"")])
        assert (rules.live, rules.status().source, rules.status().revision.number) == (True, "owner", 6)
        owner.publisher.set(Revision(epoch="other", number=1), b"restored")
        await told.until(lambda: told.seen[2:] == [(1, b"restored")])
    assert not rules.live
    assert owner.publisher.watchers == 1


@in_loop
async def test_the_disk_copy_is_told_first_and_not_sent_again(tmp_path: Path) -> None:
    blob.save(tmp_path / "rules.bin", blob.Blob("e", 7, b"old"))
    owner, told = Owner(), Changes()
    rules = blobs(tmp_path, owner, told)
    found = await rules.load_disk()
    assert found is not None
    assert found[1].number == 7
    owner.publisher.set(Revision(epoch="e", number=7), b"old")
    async with running(rules):
        await told.until(lambda: rules.live)
        assert told.seen == [(7, b"old")]
        assert [answer.unchanged for answer in owner.sent] == [True]
        # Only the revision moves: no bytes are sent, and a restart knows the newer one.
        owner.publisher.set(Revision(epoch="e", number=8), b"old")
        owner.publisher.set(Revision(epoch="e", number=9), b"new")
        await told.until(lambda: told.seen == [(7, b"old"), (9, b"new")])


@in_loop
async def test_a_moved_revision_alone_sends_no_bytes(tmp_path: Path) -> None:
    publisher = BlobPublisher(policy_service_pb2.WatchRulesResponse)
    publisher.set(Revision(epoch="e", number=1), b"bytes")
    stream = publisher.watch(None)
    assert (await anext(stream)).chunk == b"bytes"
    publisher.set(Revision(epoch="e", number=2), b"bytes")
    answer = await anext(stream)
    assert (answer.unchanged, answer.revision.number, answer.chunk) == (True, 2, b"")
    await stream.aclose()  # type: ignore[attr-defined]
    assert publisher.watchers == 0


@in_loop
async def test_an_owner_that_is_behind_is_ignored(tmp_path: Path) -> None:
    blob.save(tmp_path / "rules.bin", blob.Blob("e", 7, b"ours"))
    owner, told = Owner(), Changes()
    rules = blobs(tmp_path, owner, told)
    owner.publisher.set(Revision(epoch="e", number=6), b"older")
    async with running(rules):
        await told.until(lambda: rules.live)
        owner.publisher.set(Revision(epoch="e", number=8), b"newer")
        await told.until(lambda: told.seen == [(7, b"ours"), (8, b"newer")])


@in_loop
async def test_it_watches_again_from_what_it_has(tmp_path: Path) -> None:
    owner, told = Owner(), Changes()
    rules = blobs(tmp_path, owner, told)
    owner.publisher.set(Revision(epoch="e", number=1), b"one")
    async with running(rules):
        await told.until(lambda: len(told.seen) == 1)
        owner.gone.set()
        owner.publisher.set(Revision(epoch="e", number=2), b"two")
        owner.gone = asyncio.Event()
        await told.until(lambda: told.seen == [(1, b"one"), (2, b"two")])


@in_loop
async def test_refused_and_damaged_bytes_are_asked_for_again(tmp_path: Path) -> None:
    blob.save(tmp_path / "rules.bin", blob.Blob("e", 1, b"refused"))
    owner, told = Owner(), Changes()
    rules = blobs(tmp_path, owner, told)
    owner.publisher.set(Revision(epoch="e", number=1), b"good")
    async with running(rules):
        await told.until(lambda: told.seen == [(1, b"good")])
    assert owner.asked == [None]


# Resources, over gRPC.


class Registry(registry_service_pb2_grpc.RegistryServiceServicer):
    """Plays one script a Watch: responses, or a status to end with. The last script stays open."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[registry_service_pb2.WatchRequest] = []

    async def Watch(
        self, request: registry_service_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[registry_service_pb2.WatchResponse]:
        self.asked.append(request)
        script = self.scripts.pop(0)
        for step in script:
            if isinstance(step, grpc.StatusCode):
                await context.abort(step, "as the script says")
            yield step
        await asyncio.Event().wait()


@asynccontextmanager
async def serving(directory: Path, registry: Registry) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
    server.add_insecure_port(f"unix:{directory}/registry.sock")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{directory}/registry.sock") as channel:
            yield channel
    finally:
        await server.stop(None)


def tenant(identity: str, name: str) -> registry_service_pb2.Resource:
    return registry_service_pb2.Resource(
        tenant=tenant_service_pb2.Tenant(metadata=resource_pb2.Metadata(id=identity, name=name))
    )


def device(identity: str) -> registry_service_pb2.Resource:
    return registry_service_pb2.Resource(device=device_service_pb2.Device(metadata=resource_pb2.Metadata(id=identity)))


def message(
    number: int,
    changed: Sequence[registry_service_pb2.Resource] = (),
    removed: Sequence[registry_service_pb2.Tombstone] = (),
    synced: bool = False,
    epoch: str = "e",
) -> registry_service_pb2.WatchResponse:
    return registry_service_pb2.WatchResponse(
        revision=Revision(epoch=epoch, number=number), changed=changed, removed=removed, synced=synced
    )


def gone(kind: int, identity: str) -> registry_service_pb2.Tombstone:
    return registry_service_pb2.Tombstone(kind=registry_service_pb2.Kind.Name(kind), id=identity)


def resources(directory: Path, channel: grpc.aio.Channel, told: Changes) -> ResourceReplica:
    def on_change(
        changed: Sequence[registry_service_pb2.Resource],
        removed: Sequence[registry_service_pb2.Tombstone],
        revision: Revision,
    ) -> None:
        kinds = [resource.WhichOneof("resource") for resource in changed]
        told.add((revision.number, sorted(map(str, kinds)), [tombstone.id for tombstone in removed]))

    return ResourceReplica("resources", directory / "replica", channel, (TENANT, DEVICE), on_change)


@in_loop
async def test_first_state_then_transactions_then_resume(tmp_path: Path) -> None:
    told = Changes()
    registry = Registry(
        [
            message(3, [tenant("1", "acme")]),
            message(3, [device("2")]),
            message(3, synced=True),
            message(4, [tenant("1", "acme2")]),
            grpc.StatusCode.UNAVAILABLE,
        ],
        [message(4, synced=True), message(5, removed=[gone(DEVICE, "2")]), message(6)],
    )
    async with serving(tmp_path, registry) as channel:
        mirror = resources(tmp_path, channel, told)
        async with running(mirror):
            await told.until(lambda: len(told.seen) == 4)
            assert told.seen == [(3, ["device", "tenant"], []), (4, ["tenant"], []), (5, [], ["2"]), (6, [], [])]
            assert [item.metadata.name for item in mirror.messages(TENANT)] == ["acme2"]
            assert mirror.items[DEVICE] == {}
            assert (mirror.live, mirror.status().source, mirror.status().items) == (True, "owner", 1)
    assert [request.resume_after.number for request in registry.asked] == [0, 4]
    assert list(registry.asked[0].kinds) == [TENANT, DEVICE]

    # A restart decides from the disk copy, while the owner is away.
    again = Changes()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/nobody.sock") as channel:
        mirror = resources(tmp_path, channel, again)
        async with running(mirror):
            await again.until(lambda: again.seen == [(6, ["tenant"], [])])
            assert (mirror.live, mirror.status().source) == (False, "disk")
        others = ResourceReplica("resources", tmp_path / "replica", channel, (TENANT,), lambda *_: None)
        assert await others.load_disk() is None


@in_loop
async def test_too_old_a_revision_lists_again_and_tells_the_difference(tmp_path: Path) -> None:
    told = Changes()
    registry = Registry(
        [message(3, [tenant("1", "acme"), device("2"), device("3")], synced=True), grpc.StatusCode.UNAVAILABLE],
        [grpc.StatusCode.OUT_OF_RANGE],
        [message(1, [tenant("1", "acme"), device("3"), device("4")], epoch="f"), message(1, synced=True, epoch="f")],
    )
    async with serving(tmp_path, registry) as channel:
        mirror = resources(tmp_path, channel, told)
        of_devices = mirror.items[DEVICE]
        async with running(mirror):
            await told.until(lambda: len(told.seen) == 2)
            assert told.seen[1] == (1, ["device"], ["2"])
            assert sorted(of_devices) == ["3", "4"]
            assert mirror.revision == Revision(epoch="f", number=1)
    assert [request.HasField("resume_after") for request in registry.asked] == [False, True, False]


@in_loop
async def test_a_callback_that_fails_ends_the_replica(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the parent's fault")

    async with serving(tmp_path, Registry([message(1, synced=True)])) as channel:
        mirror = ResourceReplica("resources", tmp_path, channel, (TENANT,), fail)
        with pytest.raises(ExceptionGroup):
            await asyncio.wait_for(mirror.run(), DEADLINE)
