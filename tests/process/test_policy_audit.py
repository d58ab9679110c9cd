"""The audit service as a process: delivery over gRPC, once each across kill -9, queries, tails, the command line."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from falkirk.api.policy.v1 import policy_service_pb2 as pb
from falkirk.policy.records import format_time
from falkirk.runtime.errors import from_rpc
from tests.process.policy_mesh import DEADLINE, SERVICES, Policy, Registry, tenant, until

CLI = "import typer, falkirk.cli.audit as a; app = typer.Typer(); app.callback()(lambda: None); a.register(app); app()"
KILLS = 6


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Policy]:
    registry = Registry(tmp_path)
    registry.apply(tenant("acme"))
    made = Policy(tmp_path)
    made.start()
    until(made.serving)
    yield made
    made.stop()
    registry.stop()


def record(sequence: int, *, worker: int = 0, text: str | None = None, **fields: Any) -> pb.AuditRecord:
    values = {"event": "denied", "tenant": "acme", "time": format_time(time.time_ns())} | fields
    return pb.AuditRecord(node="local", worker=worker, epoch=7, sequence=sequence, json=text or json.dumps(values))


def deliver(stub: Any, *requests: list[pb.AuditRecord]) -> list[tuple[int, int]]:
    """(worker, sequence) of each answer."""
    stream = stub.Deliver((pb.DeliverRequest(records=records) for records in requests), timeout=DEADLINE)
    return [(answer.worker, answer.sequence) for answer in stream]


def query(stub: Any, limit: int = 0, **wanted: Any) -> list[pb.QueryResponse]:
    return list(stub.Query(pb.QueryRequest(filter=pb.AuditFilter(**wanted), limit=limit), timeout=DEADLINE))


def sequences(answers: list[pb.QueryResponse]) -> list[int]:
    return [answer.record.sequence for answer in answers]


def test_records_are_acknowledged_in_order_and_found_again(mesh: Policy) -> None:
    stub = mesh.audit()
    batches = [[record(n), record(n + 1)] for n in range(1, 100, 2)]
    assert deliver(stub, *batches) == [(0, n + 1) for n in range(1, 100, 2)]
    assert deliver(stub, batches[3], [], [record(1, worker=1, event="started", device="laptop")]) == [(0, 100), (1, 1)]
    read = mesh.audit("read")
    assert sequences(query(read, 3, event="denied")) == [98, 99, 100]
    (found,) = query(read, device="laptop")
    assert json.loads(found.record.json)["device"] == "laptop"
    assert (found.record.node, found.record.worker, found.record.epoch) == ("local", 1, 7)
    assert abs(found.stored_at.ToNanoseconds() - time.time_ns()) < 60 * 10**9


def test_bad_input_is_kept_or_refused_with_its_reason(mesh: Policy) -> None:
    stub = mesh.audit()
    assert deliver(stub, [record(1, text="rubbish"), record(2)]) == [(0, 2)]
    assert [json.loads(each.record.json)["event"] for each in query(stub)] == ["invalid", "denied"]
    refusals: dict[str, Callable[[], Any]] = {
        "TOO_MANY_RECORDS": lambda: deliver(stub, [record(n) for n in range(1, 1002)]),
        "INVALID_SEQUENCE": lambda: deliver(stub, [record(0)]),
        "INVALID_ADDRESS": lambda: query(stub, destination_address="web"),
        "LIMIT_TOO_LARGE": lambda: query(stub, 100_001),
        "ROAD_FORBIDDEN": lambda: deliver(mesh.audit("read"), [record(3)]),
    }
    for reason, call in refusals.items():
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert from_rpc(caught.value).reason == reason
    assert sequences(query(stub)) == [1, 2]


def test_a_tail_hears_of_what_it_asked_for(mesh: Policy) -> None:
    stub = mesh.audit("read")
    tail = stub.Tail(pb.TailRequest(filter=pb.AuditFilter(tenant="acme")), timeout=DEADLINE)
    assert tail.initial_metadata() is not None  # the subscription stands
    deliver(mesh.audit(), [record(1), record(2, tenant="other"), record(3)])
    assert [each.record.sequence for each in itertools.islice(tail, 2)] == [1, 3]
    tail.cancel()


def test_killed_while_records_come_each_is_stored_once(mesh: Policy) -> None:
    total, acknowledged = 0, 0
    stub = mesh.audit()
    for kill in range(KILLS):
        killed = threading.Event()

        def requests(first: int, killed: threading.Event = killed) -> Iterator[pb.DeliverRequest]:
            nonlocal total
            while not killed.is_set():
                total = max(total, first + 19)
                yield pb.DeliverRequest(records=[record(n, pad="x" * 300) for n in range(first, first + 20)])
                first += 20

        stream = stub.Deliver(requests(acknowledged + 1))
        for answer in itertools.islice(stream, 3 + kill):
            acknowledged = answer.sequence
        mesh.signal(signal.SIGKILL)
        killed.set()
        with contextlib.suppress(grpc.RpcError):  # what was still under way, then the end
            for answer in stream:
                acknowledged = answer.sequence
        mesh.start()
        until(mesh.serving)
        stub = mesh.audit()
    found = sequences(query(stub, 100_000))
    assert found == list(range(1, len(found) + 1))
    assert 20 * 3 * KILLS <= acknowledged <= len(found) <= total


def test_a_second_process_on_the_same_log_is_refused(mesh: Policy, tmp_path: Path) -> None:
    other = subprocess.run(
        [sys.executable, "-m", "falkirk.policy", "--run-dir", str(tmp_path / "r2"), "--data-dir", str(mesh.data_dir)],
        env={"PYTHONPATH": str(SERVICES)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert other.returncode == 1
    assert "another process writes this log" in other.stderr


def test_the_command_line(mesh: Policy) -> None:
    fields: dict[str, Any] = {
        "destination": "10.1.2.3",
        "destination_port": 22,
        "rule": "base/no-ssh",
        "why": "denied by base/no-ssh",
    }
    old = format_time(time.time_ns() - 7200 * 10**9)
    deliver(
        mesh.audit(), [record(1, time=old), record(2, **fields), record(3, event="started"), record(4, tenant="other")]
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CLI, "audit", *arguments],
            env={"PYTHONPATH": str(SERVICES), "FALKIRK_RUN_DIR": str(mesh.run_dir), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    done = run("query", "--event", "denied", "--tenant", "acme", "--since", "1h", "--json")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["sequence"] == 2
    assert json.loads(line)["stored_at"]
    table = run("query", "--dst", "10.1.2.3").stdout
    assert "10.1.2.3:22" in table
    assert "denied by base/no-ssh" in table
    wrong = run("query", "--dst", "web")
    assert (wrong.returncode, "INVALID_ADDRESS" in wrong.stderr) == (1, True)
    with subprocess.Popen(
        [sys.executable, "-c", CLI, "audit", "tail", "--json"],
        env={"PYTHONPATH": str(SERVICES), "FALKIRK_RUN_DIR": str(mesh.run_dir)},
        stdout=subprocess.PIPE,
        text=True,
    ) as tail:
        assert tail.stdout is not None
        sequence = itertools.count(5)
        first: list[str] = []
        reader = threading.Thread(target=lambda out=tail.stdout: first.append(out.readline()))
        reader.start()
        until(lambda: deliver(mesh.audit(), [record(next(sequence))]) and first)
        reader.join()
        tail.send_signal(signal.SIGINT)
        tail.stdout.read()
        assert tail.wait(DEADLINE) == 0
    assert json.loads(first[0])["tenant"] == "acme"
