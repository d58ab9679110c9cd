"""A replica of the mesh on the real registry, across a rename, a bulk write and a kill."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import pytest

from falkirk.api.net.v1.net_pb2 import Revision
from falkirk.api.registry.v1.registry_service_pb2 import (
    KIND_ROUTE,
    KIND_TENANT,
    KIND_VIRTUAL_NETWORK,
    ApplyRequest,
    Resource,
    Tombstone,
)
from falkirk.api.registry.v1.virtual_network_service_pb2 import (
    VirtualNetworkServiceGetRequest,
    VirtualNetworkServiceUpdateRequest,
)
from falkirk.runtime import client
from falkirk.runtime.replica import ResourceReplica
from tests.process.registry_process import DEADLINE_S, Registry, running


class Mirror:
    """What a replica was told; `until` waits for a revision."""

    def __init__(self) -> None:
        self.revisions: list[int] = []
        self._changed = asyncio.Event()

    def __call__(self, changed: Sequence[Resource], removed: Sequence[Tombstone], revision: Revision) -> None:
        self.revisions.append(revision.number)
        self._changed.set()

    async def until(self, revision: int) -> None:
        """Return once that revision, or a later one, was told."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.revisions or self.revisions[-1] < revision:
                self._changed.clear()
                await self._changed.wait()


def route(name: str, prefix: str) -> Resource:
    made = Resource()
    made.route.metadata.name, made.route.metadata.tenant = name, "acme"
    made.route.prefix = prefix
    made.route.target.blackhole.SetInParent()
    return made


def apply(registry: Registry, *resources: Resource) -> int:
    """Apply; the revision."""
    answer = registry.stubs().registry.Apply(ApplyRequest(resources=resources), timeout=DEADLINE_S)
    return int(answer.revision.number)


def rename(registry: Registry, old: str, new: str) -> int:
    """Rename a virtual network; the revision."""
    stubs = registry.stubs()
    request = VirtualNetworkServiceGetRequest(tenant="acme", name=old)
    network = stubs.virtual_network.Get(request, timeout=DEADLINE_S).virtual_network
    network.metadata.name = new
    answer = stubs.virtual_network.Update(
        VirtualNetworkServiceUpdateRequest(virtual_network=network), timeout=DEADLINE_S
    )
    return int(answer.revision.number)


async def _script(registry: Registry, directory: Path) -> None:
    async def do(work: Callable[..., int], *arguments: object) -> int:
        return await asyncio.to_thread(work, registry, *arguments)

    tenant = Resource()
    tenant.tenant.metadata.name = "acme"
    await do(apply, tenant, *(route(f"r{number}", f"10.{number // 256}.{number % 256}.0/24") for number in range(3000)))
    mirror = Mirror()
    address = f"unix:{registry.run_dir}/mesh/registry.sock"
    async with grpc.aio.insecure_channel(address, options=client.OPTIONS) as channel:
        kinds = (KIND_TENANT, KIND_VIRTUAL_NETWORK, KIND_ROUTE)
        replica = ResourceReplica("resources", directory, channel, kinds, mirror)
        task = asyncio.create_task(replica.run())
        await mirror.until(1)
        assert len(replica.items[KIND_ROUTE]) == 3000
        await mirror.until(await do(rename, "default", "main"))
        assert {item.virtual_network for item in replica.messages(KIND_ROUTE)} == {"main"}
        assert {item.metadata.name for item in replica.messages(KIND_VIRTUAL_NETWORK)} == {"main"}
        await asyncio.to_thread(registry.stop, kill=True)
        await asyncio.to_thread(registry.start)
        await mirror.until(await do(apply, route("late", "::/0")))
        assert len(replica.items[KIND_ROUTE]) == 3001
        assert mirror.revisions == [1, 2, 3]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_replica_follows_and_resumes(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("r")) as registry:
        asyncio.run(_script(registry, tmp_path_factory.mktemp("d")))
