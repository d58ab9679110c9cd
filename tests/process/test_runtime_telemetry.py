"""Spans reach an OTLP receiver with the right links; explicit ids stay what they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import pytest

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from falkirk.cli.trace import Receiver, Span
from falkirk.runtime import client, sampling, telemetry, trace_context
from falkirk.runtime.settings import Shell, TelemetrySettings
from falkirk.runtime.trace_context import SpanContext
from tests.process.in_loop import in_loop
from tests.process.test_runtime_server import start_service

TRACE = bytes(range(16))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as found:
        yield found


def spans(receiver: Receiver, count: int) -> list[Span]:
    deadline = time.monotonic() + 15
    while True:
        found = [span for of_trace in receiver.traces().values() for span in of_trace]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        receiver.wait(0.2)


def test_explicit_ids_and_times(receiver: Receiver, tmp_path: Path) -> None:
    shell = Shell(run_dir=tmp_path, telemetry=TelemetrySettings(otlp_endpoint=receiver.endpoint))
    telemetry.setup("flow", shell)
    try:
        assert telemetry.exporting()
        root = telemetry.emit_span("flow", TRACE, None, b"rootroot", 1_000, 5_000, {"port": 80, "allowed": True})
        child = telemetry.emit_span("dial", TRACE, root, None, 2_000, 3_000, status="connection refused")
    finally:
        telemetry.shutdown()
    found = {span.name: span for span in spans(receiver, 2)}
    assert found["flow"] == Span(
        trace_id=TRACE.hex(),
        span_id=b"rootroot".hex(),
        parent_id="",
        service="falkirk-flow",
        name="flow",
        start_ns=1_000,
        end_ns=5_000,
        attributes={"port": 80, "allowed": True},
    )
    assert (found["dial"].parent_id, found["dial"].span_id) == (b"rootroot".hex(), child.hex())
    assert found["dial"].error == "connection refused"
    assert not telemetry.exporting()
    assert telemetry.emit_span("nothing", TRACE, None, b"rootroot", 0, 0) == b"rootroot"


def test_a_receiver_that_is_away_holds_nothing_up(tmp_path: Path) -> None:
    with Receiver() as gone:
        endpoint = gone.endpoint
    telemetry.setup("flow", Shell(run_dir=tmp_path, telemetry=TelemetrySettings(otlp_endpoint=endpoint)))
    telemetry.emit_span("flow", TRACE, None, None, 0, 1)
    last = threading.Thread(target=telemetry.shutdown)
    last.start()
    last.join(10 * telemetry.SHUTDOWN_SECONDS)
    assert not last.is_alive()


@in_loop
async def _call_within_a_trace(run_dir: Path) -> None:
    shell = Shell(run_dir=run_dir)
    trace_context.current.set(SpanContext(TRACE, b"callerid", True))
    async with client.channel(shell, "registry") as channel:
        stub = pb_grpc.RegistryServiceStub(channel)
        await stub.Stats(pb.StatsRequest(), timeout=5)
        watch = stub.Watch(pb.WatchRequest(), timeout=5)
        assert (await watch.read()).synced
        watch.cancel()


def test_calls_are_spans_of_their_callers_trace(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = tmp_path_factory.mktemp("r")
    config = run_dir / "falkirk.yaml"
    config.write_text(
        "apiVersion: falkirk.dev/v1alpha1\nkind: Settings\n"
        f"telemetry: {{otlp_endpoint: '{receiver.endpoint}', sample_ratio: 1.0}}\n"
    )
    service = start_service(run_dir, "--config", str(config))
    try:
        _call_within_a_trace(run_dir)
        with grpc.insecure_channel(f"unix:{run_dir}/read/registry.sock") as channel:
            pb_grpc.RegistryServiceStub(channel).Stats(pb.StatsRequest(), timeout=5)  # no trace: sampled by ratio 1.0
            unsampled = trace_context.render(SpanContext(bytes(15) + b"u", b"callerid", False))
            pb_grpc.RegistryServiceStub(channel).Stats(
                pb.StatsRequest(), timeout=5, metadata=((trace_context.HEADER, unsampled),)
            )
        found = spans(receiver, 3)
    finally:
        service.terminate()
        service.communicate(timeout=10)
    assert service.returncode == 0
    of_caller = [span for span in found if span.trace_id == TRACE.hex()]
    assert {(span.name.rpartition("/")[2], span.parent_id) for span in of_caller} == {
        ("Stats", b"callerid".hex()),
        ("Watch", b"callerid".hex()),
    }
    assert {span.service for span in found} == {"falkirk-registry"}
    (root,) = (span for span in found if span.trace_id != TRACE.hex())
    assert (root.parent_id, root.attributes["rpc.method"]) == ("", "Stats")


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        ("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01", True),
        ("cc-" + "ab" * 16 + "-" + "cd" * 8 + "-01-more", True),
        ("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01-more", False),
        ("ff-" + "ab" * 16 + "-" + "cd" * 8 + "-01", False),
        ("00-" + "00" * 16 + "-" + "cd" * 8 + "-01", False),
        ("00-" + "ab" * 16 + "-" + "00" * 8 + "-01", False),
        ("00-" + "AB" * 16 + "-" + "cd" * 8 + "-01", False),
        ("", False),
    ],
)
def test_traceparent(header: str, valid: bool) -> None:
    span = trace_context.parse(header)
    assert (span is not None) is valid
    if span is not None and header.startswith("00"):
        assert trace_context.render(span) == header


def test_sampling_goes_by_the_trace_id() -> None:
    ids = [bytes(8) + place.to_bytes(2, "big") + bytes(6) for place in range(65536)]
    assert sum(sampling.sampled(identity, sampling.bound(0.25)) for identity in ids) == 16384
    assert not any(sampling.sampled(identity, sampling.bound(0.0)) for identity in ids)
    assert all(sampling.sampled(b"\xff" * 16, sampling.bound(1.0)) for _ in range(1))


def test_logs_have_their_fields(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    import logging

    import structlog

    telemetry.setup("flow", Shell(run_dir=tmp_path))
    token = trace_context.current.set(SpanContext(TRACE, b"callerid", True))
    try:
        structlog.get_logger().warning("something_happened", count=3)
        structlog.get_logger().debug("not_written")
        logging.getLogger("library").error("said %s", "this")
    finally:
        trace_context.current.reset(token)
    lines = [msgspec.json.decode(line) for line in capfdbinary.readouterr().err.splitlines()]
    assert [list(line)[:4] for line in lines] == [["ts", "level", "service", "event"]] * 2
    assert lines[0] | {"ts": ""} == {
        "ts": "",
        "level": "warning",
        "service": "flow",
        "event": "something_happened",
        "count": 3,
        "trace_id": TRACE.hex(),
    }
    assert (lines[1]["level"], lines[1]["logger"], lines[1]["message"]) == ("error", "library", "said this")
