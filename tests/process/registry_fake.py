"""A registry that holds what the test says, served on the mesh road; streams state, then commits."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2_grpc

KINDS = {
    "tenant": pb.KIND_TENANT,
    "user": pb.KIND_USER,
    "device": pb.KIND_DEVICE,
    "virtual_network": pb.KIND_VIRTUAL_NETWORK,
    "route": pb.KIND_ROUTE,
    "policy": pb.KIND_POLICY,
    "zone": pb.KIND_ZONE,
}


class RegistryFake(registry_service_pb2_grpc.RegistryServiceServicer):
    """Resources by id; `commit` is a transaction. Every watch starts over with the whole state."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "mesh" / "registry.sock"
        self.items: dict[str, pb.Resource] = {}
        self.number = 0
        self._lock = threading.Lock()
        self._watches: list[queue.Queue[pb.WatchResponse | None]] = []

    def start(self) -> None:
        """Serve."""
        self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(8))
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()

    def stop(self) -> None:
        """End every watch, and the server."""
        with self._lock:
            for watch in self._watches:
                watch.put(None)
            self._watches.clear()
        self._server.stop(None).wait()

    def commit(self, *changed: pb.Resource, removed: Sequence[str] = ()) -> int:
        """One transaction; its revision."""
        with self._lock:
            tombstones = [pb.Tombstone(kind=_kind(self.items.pop(identity)), id=identity) for identity in removed]
            for resource in changed:
                self.items[_metadata(resource).id] = resource
            self.number += 1
            for watch in self._watches:
                watch.put(pb.WatchResponse(revision=self._revision(), changed=changed, removed=tombstones))
            return self.number

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.WatchResponse]:
        """The state, then commits."""
        if request.HasField("resume_after"):
            context.abort(grpc.StatusCode.OUT_OF_RANGE, "this fake forgets its history")
        mine: queue.Queue[pb.WatchResponse | None] = queue.Queue()
        with self._lock:
            self._watches.append(mine)
            state = [resource for resource in self.items.values() if _kind(resource) in request.kinds]
            yield pb.WatchResponse(revision=self._revision(), changed=state, synced=True)
        while (response := mine.get()) is not None:
            yield response

    def _revision(self) -> net_pb2.Revision:
        return net_pb2.Revision(epoch="e", number=self.number)


def _metadata(resource: pb.Resource) -> Any:
    return getattr(resource, str(resource.WhichOneof("resource"))).metadata


def _kind(resource: pb.Resource) -> pb.Kind:
    return KINDS[str(resource.WhichOneof("resource"))]


def resource(kind: str, identity: str, name: str, **fields: Any) -> pb.Resource:
    """A resource of the tenant "acme"."""
    of_tenant = {} if kind == "tenant" else {"tenant": "acme", "tenant_id": "t"}
    return pb.Resource(**{kind: {"metadata": {"id": identity, "name": name, **of_tenant}, **fields}})


@contextlib.contextmanager
def serving(run_dir: Path) -> Iterator[RegistryFake]:
    """A registry with the tenant "acme" and its default virtual network."""
    fake = RegistryFake(run_dir)
    fake.commit(
        resource("tenant", "t", "acme"),
        resource("virtual_network", "n", "default", is_default=True),
        resource("virtual_network", "m", "lab"),
    )
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()
