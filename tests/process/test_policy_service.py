"""The policy service as a process: rules from the registry, decisions, snapshots, and starting without a registry."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2 as pb
from falkirk.decide.rules import RuleTable
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.wire.context import TunnelContext
from tests.process.policy_mesh import DEADLINE, Policy, Registry, policy, tenant, until

RULES = [
    ("no-ssh", 'net.port == 22 && net.dst.inCidr("10.0.0.0/8")', "deny"),
    ("web", 'net.port in [80, 443] && net.protocol == "tcp"', "allow"),
    ("disk", 'device.posture["disk"] == "encrypted" && net.port == 5432', "allow"),
]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path)
    made.apply(tenant("acme"), tenant("other"))
    made.apply(policy("base", RULES), policy("off", [("all", "true", "allow")], priority=-1, disabled=True))
    yield made
    made.stop()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Policy]:
    made = Policy(tmp_path)
    yield made
    made.stop()


def question(port: int, destination: str = "10.1.2.3", **context: Any) -> pb.Question:
    return pb.Question(
        context=net_pb2.TunnelContext(**({"tenant": "acme"} | context)),
        destination_address=destination,
        destination_port=port,
    )


def decide(stub: Any, port: int, destination: str = "10.1.2.3", **context: Any) -> pb.Verdict:
    request = pb.DecideRequest(question=question(port, destination, **context))
    verdict: pb.Verdict = stub.Decide(request, timeout=DEADLINE).verdict
    return verdict


def refused(call: Any, *arguments: Any) -> FalkirkError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return from_rpc(caught.value)


def snapshot(stream: Any) -> tuple[int, bytes]:
    """The next whole snapshot of a WatchRules stream: its revision and bytes."""
    pieces = b""
    for response in stream:
        pieces += response.chunk
        if response.complete:
            assert hashlib.sha256(pieces).digest() == response.sha256
            return response.revision.number, pieces
    raise AssertionError("the stream ended")


def load(data: bytes) -> RuleTable:
    loading = RuleTable.load(data)
    for _ in loading:
        pass
    assert loading.table is not None
    return loading.table


def test_rules_come_from_the_registry_and_are_answered_pushed_and_changed(registry: Registry, mesh: Policy) -> None:
    mesh.start()
    until(mesh.serving)
    stub = mesh.policy()
    read = mesh.policy("read")
    assert decide(read, 443).rule == "base/web"
    assert decide(read, 22).why.startswith("denied by base/no-ssh: ")
    assert decide(read, 22, "192.0.2.1").why == "no rule of tenant acme matched (default deny)"
    assert not decide(read, 443, tenant="other").allowed
    assert not decide(read, 443, tenant="other", tenant_id="t-other").allowed
    assert decide(read, 5432, posture={"disk": "encrypted"}).allowed

    explained = read.Explain(pb.ExplainRequest(question=question(5432)), timeout=DEADLINE)
    assert [(trace.rule, trace.outcome) for trace in explained.rules] == [
        ("base/no-ssh", "skipped_by_index"),
        ("base/web", "skipped_by_index"),
        ("base/disk", "error"),
    ]
    assert "disk" in explained.rules[2].error
    assert (explained.replica.name, explained.replica.revision.number, explained.replica.live) == ("rules", 2, True)

    watch = stub.WatchRules(pb.WatchRulesRequest())
    number, data = snapshot(watch)
    assert number == 2
    context = TunnelContext("t-acme", "acme", "d", "laptop", "v", "default", ())
    assert load(data).decide(context, bytes([10, 1, 2, 3]), 443, 6).rule == "base/web"

    registry.apply(policy("late", [("all", "true", "allow")], priority=9))
    number, data = snapshot(watch)
    assert number == 3
    assert load(data).decide(context, bytes([10, 1, 2, 3]), 9, 6).rule == "late/all"
    until(lambda: decide(read, 9).allowed)
    registry.apply(removed=["p-acme-late"])
    number, data = snapshot(watch)
    assert (number, load(data).decide(context, bytes([10, 1, 2, 3]), 9, 6).allowed) == (4, False)
    registry.apply(tenant("third"))
    moved = next(watch)
    assert (moved.unchanged, moved.revision.number) == (True, 5)
    watch.cancel()

    stats = read.Stats(pb.StatsRequest(), timeout=DEADLINE)
    assert {counter.name: counter.value for counter in stats.rules} == {"acme": 3}
    assert {replica.name: replica.revision.number for replica in stats.replicas} == {"resources": 5, "rules": 5}
    assert stats.processes[0].name == "policy"
    assert mesh.signal(signal.SIGTERM) == 0


def test_questions_that_cannot_be_asked_say_why(registry: Registry, mesh: Policy) -> None:
    mesh.start()
    until(mesh.serving)
    stub = mesh.policy("read")
    assert refused(decide, stub, 443, "10.1").reason == "INVALID_ADDRESS"
    assert refused(decide, stub, 70000).reason == "INVALID_PORT"
    unknown = refused(stub.Decide, pb.DecideRequest(question=pb.Question(destination_address="10.0.0.1")))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_TENANT")
    assert refused(list, stub.WatchRules(pb.WatchRulesRequest())).reason == "ROAD_FORBIDDEN"
    checked = stub.Check(
        pb.CheckRequest(
            rules=[
                pb.CheckRequest.Rule(name="good", when="true"),
                pb.CheckRequest.Rule(name="bad", when="net.port == 1 &&\n  net.prt == 2"),
            ]
        ),
        timeout=DEADLINE,
    )
    (error,) = checked.errors
    assert (error.rule, error.line, error.column) == ("bad", 2, 6)


def test_without_a_registry_it_decides_from_disk_or_says_that_it_cannot(mesh: Policy, tmp_path: Path) -> None:
    mesh.start()
    stub = mesh.policy("read")
    unready = until(lambda: not_ready(stub))
    assert unready is not None
    assert (unready.code, unready.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
    assert not mesh.serving()
    registry = Registry(tmp_path)
    registry.apply(tenant("acme"), policy("base", RULES))
    until(mesh.serving)
    registry.stop()
    assert decide(stub, 443).allowed
    assert mesh.signal(signal.SIGTERM) == 0

    mesh.start()
    until(mesh.serving)
    again = mesh.policy("read")
    assert decide(again, 443).rule == "base/web"
    status = again.Stats(pb.StatsRequest(), timeout=DEADLINE).replicas[1]
    assert (status.source, status.live, status.revision.number) == ("disk", False, 1)


def not_ready(stub: Any) -> FalkirkError | None:
    """What Decide is refused with; None while nobody answers."""
    failed = refused(decide, stub, 443)
    return failed if failed.reason != "UNAVAILABLE" else None
