"""A server as a process: roads, errors, deadlines, metrics, traces, drain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from falkirk.runtime import client
from falkirk.runtime.errors import FalkirkError, from_rpc

SERVICE = Path(__file__).with_name("runtime_service.py")
Start = Callable[..., "subprocess.Popen[str]"]


def start_service(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """The test service, SERVING."""
    process = subprocess.Popen(
        [sys.executable, str(SERVICE), "--run-dir", str(run_dir), "--data-dir", str(run_dir), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        with grpc.insecure_channel(f"unix:{run_dir}/read/registry.sock", options=client.OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            deadline = time.monotonic() + 20
            while True:
                left = deadline - time.monotonic()
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return process
    except BaseException:
        process.kill()
        print(process.communicate()[1])
        raise


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def service(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_service(run_dir)
    yield process
    process.kill()
    process.communicate(timeout=10)


def stub_on(run_dir: Path, road: str) -> Any:
    channel = grpc.insecure_channel(f"unix:{run_dir}/{road}/registry.sock", options=client.OPTIONS)
    return pb_grpc.RegistryServiceStub(channel)


def refusal(call: Callable[[], Any]) -> FalkirkError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc(caught.value)


def test_each_road_gives_what_its_methods_declare(service: subprocess.Popen[str], run_dir: Path) -> None:
    for road, watch, apply in (("read", False, False), ("mesh", True, False), ("admin", True, True)):
        stub = stub_on(run_dir, road)
        assert stub.Stats(pb.StatsRequest(), timeout=5).schema_version == 7
        if watch:
            stream = stub.Watch(pb.WatchRequest(), timeout=5)
            assert next(stream).synced
            stream.cancel()
        else:
            error = refusal(lambda stub=stub: next(stub.Watch(pb.WatchRequest(), timeout=5)))  # type: ignore[misc]
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROAD_FORBIDDEN")
            assert error.metadata == {"road": road, "needs": "mesh"}
        error = refusal(lambda stub=stub: stub.Apply(pb.ApplyRequest(), timeout=5))  # type: ignore[misc]
        assert error.code is (grpc.StatusCode.UNIMPLEMENTED if apply else grpc.StatusCode.PERMISSION_DENIED)


def test_directories_and_sockets_have_their_modes(service: subprocess.Popen[str], run_dir: Path) -> None:
    modes = {
        road: (
            oct((run_dir / road).stat().st_mode & 0o777),
            oct((run_dir / road / "registry.sock").stat().st_mode & 0o777),
        )
        for road in ("admin", "mesh", "read")
    }
    assert modes == {"admin": ("0o700", "0o600"), "mesh": ("0o750", "0o660"), "read": ("0o755", "0o666")}


def test_errors_carry_reason_and_metadata(service: subprocess.Popen[str], run_dir: Path) -> None:
    stub = stub_on(run_dir, "read")
    error = refusal(lambda: stub.Stats(pb.StatsRequest(), metadata=(("do", "refuse"),), timeout=5))
    assert (error.code, error.reason, error.metadata) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND", {"thing": "x"})
    error = refusal(lambda: stub.Stats(pb.StatsRequest(), metadata=(("do", "fail"),), timeout=5))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in error.message
    service.send_signal(signal.SIGTERM)
    _, stderr = service.communicate(timeout=10)
    assert service.returncode == 0
    logged = [line for line in stderr.splitlines() if error.metadata["id"] in line]
    assert len(logged) == 1
    assert "ZeroDivisionError" in logged[0]
    assert '"service":"registry"' in logged[0]


def test_deadlines_are_honoured(service: subprocess.Popen[str], run_dir: Path) -> None:
    stub = stub_on(run_dir, "read")
    error = refusal(lambda: stub.Stats(pb.StatsRequest(), metadata=(("do", "hang"),), timeout=0.2))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_reflection_lists_services(service: subprocess.Popen[str], run_dir: Path) -> None:
    with grpc.insecure_channel(f"unix:{run_dir}/read/registry.sock") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=5))
    names = {entry.name for entry in answer.list_services_response.service}
    assert {"falkirk.api.registry.v1.RegistryService", "grpc.health.v1.Health"} <= names


def test_metrics_count_calls(service: subprocess.Popen[str], run_dir: Path) -> None:
    stub_on(run_dir, "mesh").Stats(pb.StatsRequest(), timeout=5)
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(5)
        plain.connect(str(run_dir / "read/registry.metrics.sock"))
        plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: metrics\r\n\r\n")
        answer = b""
        while piece := plain.recv(65536):
            answer += piece
    text = answer.decode()
    assert text.startswith("HTTP/1.0 200 OK")
    assert (
        'falkirk_rpcs_total{code="OK",method="/falkirk.api.registry.v1.RegistryService/Stats",road="mesh",service="registry"} 1.0'
        in text
    )
    assert "process_resident_memory_bytes" in text


def test_a_second_instance_is_refused(service: subprocess.Popen[str], run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SERVICE), "--run-dir", str(run_dir), "--data-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode != 0
    assert f"pid {service.pid}" in done.stderr
    assert stub_on(run_dir, "read").Stats(pb.StatsRequest(), timeout=5).schema_version == 7


def test_a_killed_service_leaves_nothing_in_the_way(run_dir: Path) -> None:
    first = start_service(run_dir)
    first.kill()
    first.communicate(timeout=10)
    second = start_service(run_dir)
    second.terminate()
    second.communicate(timeout=10)
    assert second.returncode == 0
    assert not list(run_dir.glob("*/*.sock"))


def test_drain_finishes_calls_and_ends_streams(service: subprocess.Popen[str], run_dir: Path) -> None:
    assert service.stdout is not None
    stub = stub_on(run_dir, "mesh")
    stream = stub.Watch(pb.WatchRequest())
    assert next(stream).synced
    with grpc.insecure_channel(f"unix:{run_dir}/read/registry.sock") as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        call = stub.Stats.future(pb.StatsRequest(), metadata=(("do", "wait"),), timeout=10)
        assert service.stdout.readline() == "waiting\n"
        service.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = refusal(lambda: next(stream))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert call.result(timeout=5).schema_version == 7
    assert service.wait(timeout=10) == 0


def test_a_trace_context_reaches_the_handler(service: subprocess.Popen[str], run_dir: Path) -> None:
    header = ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")
    assert stub_on(run_dir, "read").Stats(pb.StatsRequest(), metadata=(header,), timeout=5).watches == 1
    assert stub_on(run_dir, "read").Stats(pb.StatsRequest(), timeout=5).watches == 0


def test_a_blocking_channel_takes_the_most_privileged_road(service: subprocess.Popen[str], run_dir: Path) -> None:
    assert client.open_road(run_dir, "registry")[1] == "admin"
    with client.sync_channel(run_dir, "registry") as channel:
        assert pb_grpc.RegistryServiceStub(channel).Stats(pb.StatsRequest(), timeout=5).schema_version == 7
    with pytest.raises(FalkirkError) as caught:
        client.sync_channel(run_dir, "flow")
    assert caught.value.reason == "SERVICE_UNREACHABLE"
    assert "falkirk up" in caught.value.message
