"""The registry over gRPC on its unix sockets: resources, errors, watches, restarts."""

from __future__ import annotations

import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.net.v1.net_pb2 import Revision
from falkirk.api.registry.v1 import (
    device_service_pb2,
    node_service_pb2,
    policy_document_service_pb2,
    registry_service_pb2,
    route_service_pb2,
    tenant_service_pb2,
    user_service_pb2,
    virtual_network_service_pb2,
    zone_service_pb2,
)
from falkirk.registry.migrations import SCHEMA
from tests.process.registry_process import DEADLINE_S, Registry, Stubs, refused, running

MODULES: dict[str, Any] = {
    "tenant": tenant_service_pb2,
    "user": user_service_pb2,
    "device": device_service_pb2,
    "virtual_network": virtual_network_service_pb2,
    "route": route_service_pb2,
    "policy": policy_document_service_pb2,
    "node": node_service_pb2,
    "zone": zone_service_pb2,
}
VALUES: dict[str, dict[str, Any]] = {
    "tenant": {"display_name": "Acme"},
    "user": {"email": "ann@example.com", "groups": ["eng"]},
    "device": {"posture": {"os": "linux"}, "max_flows": 7},
    "virtual_network": {"comment": "second"},
    "route": {"prefix": "2001:db8::/32", "target": {"internet": {"egress_address6": "2001:db8::1"}}},
    "policy": {"priority": -3, "rules": [{"name": "web", "when": "net.port == 443", "action": 1}]},
    "node": {"endpoints": ["192.0.2.1:51820"], "mtu": 1380},
    "zone": {"domain": "corp.internal", "records": [{"name": "www", "type": 1, "value": "10.1.0.2"}]},
}


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("r")) as started:
        yield started


@pytest.fixture
def stubs(registry: Registry) -> Stubs:
    return registry.stubs()


def request(kind: str, method: str, **values: Any) -> Any:
    """A request of a kind's service."""
    service = "".join(part.capitalize() for part in kind.split("_")) + "Service"
    return getattr(MODULES[kind], f"{service}{method}Request")(**values)


def create(stubs: Stubs, kind: str, name: str, tenant: str = "acme", **values: Any) -> Any:
    """Make one; the response."""
    metadata = {"name": name, "tenant": "" if kind in ("tenant", "node") else tenant}
    return getattr(stubs, kind).Create(
        request(kind, "Create", **{kind: {"metadata": metadata, **values}}), timeout=DEADLINE_S
    )


class Watching:
    """A watch that is read on a thread; `next` waits for a message."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._messages: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                self._messages.put(message)
        except grpc.RpcError as error:
            self._messages.put(error)

    def next(self) -> Any:
        """The next message, or the error that ended the watch."""
        return self._messages.get(timeout=DEADLINE_S)

    def until_synced(self) -> list[Any]:
        """All messages up to the one that ends the first state."""
        found = [self.next()]
        while not found[-1].synced:
            found.append(self.next())
        return found

    def close(self) -> None:
        """End the watch."""
        self.call.cancel()
        self._thread.join(DEADLINE_S)


@pytest.mark.parametrize("kind", list(MODULES))
def test_each_kind_is_created_read_listed_changed_watched_and_removed(stubs: Stubs, kind: str) -> None:
    if kind not in ("tenant", "node"):
        create(stubs, "tenant", "acme")
    of = {} if kind in ("tenant", "node") else {"tenant": "acme"}
    stub = getattr(stubs, kind)
    made = create(stubs, kind, "one", **VALUES[kind])
    value = getattr(made, kind)
    assert value.metadata.id
    assert value.metadata.revision == made.revision.number
    for name in ("one", value.metadata.id):
        assert getattr(stub.Get(request(kind, "Get", name=name, **of)), kind) == value
    watching = Watching(stub.Watch(request(kind, "Watch", **of)))
    assert watching.until_synced()[-1].revision == made.revision
    listed = stub.List(request(kind, "List", **of))
    assert value in list(next(items for field, items in listed.ListFields() if field.is_repeated))
    assert listed.revision == made.revision
    value.metadata.labels["colour"] = "blue"
    value.metadata.name = "two"
    updated = stub.Update(request(kind, "Update", **{kind: value}))
    assert getattr(updated, kind).metadata.labels["colour"] == "blue"
    told = watching.next()
    assert (list(told.changed), told.revision) == ([getattr(updated, kind)], updated.revision)
    error = refused(lambda: stub.Update(request(kind, "Update", **{kind: value})))
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "REVISION_CONFLICT")
    error = refused(lambda: stub.Delete(request(kind, "Delete", name="one", **of)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    removed = stub.Delete(request(kind, "Delete", name="two", **of))
    told = watching.next()
    assert (list(told.removed_ids), told.revision) == ([value.metadata.id], removed.revision)
    watching.close()


def test_errors_carry_code_reason_and_field(stubs: Stubs) -> None:
    create(stubs, "tenant", "acme")
    create(stubs, "route", "r", prefix="10.0.0.0/8", target={"blackhole": {}})
    table = [
        (lambda: create(stubs, "tenant", "acme"), grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN", "metadata.name"),
        (lambda: create(stubs, "tenant", "Acme"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NAME", "metadata.name"),
        (lambda: create(stubs, "user", "ann", "nobody"), grpc.StatusCode.NOT_FOUND, "NOT_FOUND", None),
        (lambda: create(stubs, "route", "s", prefix="10.0.0.0/8", target={"blackhole": {}}), grpc.StatusCode.ALREADY_EXISTS, "PREFIX_TAKEN", "prefix"),
        (lambda: create(stubs, "route", "s", prefix="10.0.0.1/8", target={"blackhole": {}}), grpc.StatusCode.INVALID_ARGUMENT, "HOST_BITS_SET", "prefix"),
        (lambda: create(stubs, "route", "s", prefix="::/0", target={"node": {}}), grpc.StatusCode.UNIMPLEMENTED, "TARGET_NOT_BUILT", "target.node"),
        (lambda: create(stubs, "policy", "p", rules=[{"name": "x", "when": "net.", "action": 1}]), grpc.StatusCode.INVALID_ARGUMENT, "RULE_INVALID", "rules[0].when"),
        (lambda: stubs.tenant.Delete(request("tenant", "Delete", name="acme")), grpc.StatusCode.FAILED_PRECONDITION, "IN_USE", None),
    ]  # fmt: skip
    for call, code, reason, field in table:
        error = refused(call)
        assert (error.code, error.reason, error.metadata.get("field")) == (code, reason, field)
    assert refused(table[3][0]).metadata["code"] == "1014"


def test_roads_allow_what_they_should(registry: Registry) -> None:
    create(registry.stubs("admin"), "tenant", "acme")
    for road in ("mesh", "read"):
        stubs = registry.stubs(road)
        assert stubs.tenant.Get(request("tenant", "Get", name="acme")).tenant.metadata.name == "acme"
        assert refused(lambda stubs=stubs: create(stubs, "tenant", "other")).reason == "ROAD_FORBIDDEN"  # type: ignore[misc]
    watching = Watching(registry.stubs("mesh").registry.Watch(registry_service_pb2.WatchRequest()))
    assert watching.until_synced()
    watching.close()
    assert (
        refused(lambda: next(registry.stubs("read").registry.Watch(registry_service_pb2.WatchRequest()))).reason
        == "ROAD_FORBIDDEN"
    )


def test_a_watch_of_all_kinds_resumes_across_a_kill(registry: Registry) -> None:
    stubs = registry.stubs()
    create(stubs, "tenant", "acme")
    watching = Watching(stubs.registry.Watch(registry_service_pb2.WatchRequest()))
    state = watching.until_synced()
    seen = state[-1].revision
    assert sum(len(message.changed) for message in state) == 2
    create(stubs, "user", "ann")
    message = watching.next()
    assert (message.revision.number, message.changed[0].user.metadata.name) == (seen.number + 1, "ann")
    seen = message.revision
    create(stubs, "user", "bob")
    create(stubs, "user", "cid")
    registry.stop(kill=True)
    registry.start()
    stubs = registry.stubs()
    watching = Watching(stubs.registry.Watch(registry_service_pb2.WatchRequest(resume_after=seen)))
    messages = [watching.next() for _ in range(3)]
    assert [message.synced for message in messages] == [True, False, False]
    assert [message.revision.number for message in messages] == [seen.number, seen.number + 1, seen.number + 2]
    assert [message.changed[0].user.metadata.name for message in messages[1:]] == ["bob", "cid"]
    watching.close()
    wrong = Revision(epoch="elsewhere", number=1)
    error = refused(lambda: next(stubs.registry.Watch(registry_service_pb2.WatchRequest(resume_after=wrong))))
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_GONE")


def test_a_watch_of_one_tenant_hears_of_no_other(stubs: Stubs) -> None:
    create(stubs, "tenant", "acme")
    create(stubs, "tenant", "other")
    watching = Watching(stubs.user.Watch(request("user", "Watch", tenant="acme")))
    watching.until_synced()
    create(stubs, "user", "ann", "other")
    made = create(stubs, "user", "ann", "acme")
    assert watching.next().revision == made.revision
    watching.close()


def test_a_watcher_that_stops_reading_delays_nobody_and_misses_nothing(registry: Registry) -> None:
    stubs = registry.stubs()
    create(stubs, "tenant", "acme")
    stalled = stubs.registry.Watch(registry_service_pb2.WatchRequest())
    assert next(stalled).changed
    big: dict[str, Any] = {"posture": {f"fact-{number}": "x" * 1000 for number in range(60)}}
    for number in range(60):
        create(stubs, "device", f"d{number}", **big)
    assert next(stalled).synced
    revisions = [next(stalled).revision.number for _ in range(60)]
    assert revisions == list(range(revisions[0], revisions[0] + 60))
    stalled.cancel()


def test_a_watcher_that_falls_behind_the_history_is_cut_and_starts_over(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running(tmp_path_factory.mktemp("r"), "registry: {history_bytes: 200000}\n") as registry:
        stubs = registry.stubs()
        create(stubs, "tenant", "acme")
        stalled = registry.stubs().registry.Watch(registry_service_pb2.WatchRequest(), timeout=60)
        assert next(stalled).changed
        resume = next(stalled).revision
        big: dict[str, Any] = {"posture": {f"fact-{number}": "x" * 1000 for number in range(60)}}
        # 12 MB, more than flow control lets through unread; feed and history hold 200 kB.
        for number in range(200):
            create(stubs, "device", f"d{number}", **big)
        seen = [resume]
        error = refused(lambda: seen.extend(message.revision for message in stalled))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCH_TOO_SLOW")
        assert [revision.number for revision in seen] == list(range(resume.number, resume.number + len(seen)))
        resume = seen[-1]
        again = registry.stubs().registry.Watch(registry_service_pb2.WatchRequest(resume_after=resume))
        assert refused(lambda: next(again)).code is grpc.StatusCode.OUT_OF_RANGE
        whole = Watching(registry.stubs().registry.Watch(registry_service_pb2.WatchRequest()))
        assert sum(len(message.changed) for message in whole.until_synced()) == 202
        whole.close()


def test_stats_tell_revision_counts_and_process(registry: Registry) -> None:
    stubs = registry.stubs()
    create(stubs, "tenant", "acme")
    stats = stubs.registry.Stats(registry_service_pb2.StatsRequest())
    counts = {counter.name: counter.value for counter in stats.resources}
    assert (counts["tenants"], counts["virtual_networks"], counts["routes"]) == (1, 1, 0)
    assert (stats.revision.number, stats.oldest_resumable, stats.schema_version) == (1, 0, SCHEMA)
    assert (stats.processes[0].name, stats.processes[0].pid) == ("registry", registry.pid)


def test_a_store_of_a_newer_version_ends_the_process_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "data" / "registry").mkdir(parents=True)
    connection = sqlite3.connect(tmp_path / "data" / "registry" / "falkirk.db")
    connection.execute("PRAGMA application_id=0x464B5247")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    command = [
        sys.executable,
        "-m",
        "falkirk.registry",
        "--run-dir",
        str(tmp_path / "run"),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert "schema 99" in done.stderr


def test_it_drains_on_sigterm_with_watches_open(registry: Registry) -> None:
    watching = Watching(registry.stubs("mesh").registry.Watch(registry_service_pb2.WatchRequest()))
    watching.until_synced()
    os.kill(registry.pid, signal.SIGTERM)
    ended = watching.next()
    assert ended.code() is grpc.StatusCode.UNAVAILABLE
    assert registry.stop() == 0
    registry.start()
