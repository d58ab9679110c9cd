"""A service as a process, as `falkirk up` starts it, and a channel to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import falkirk
from tests.process.onramp_rig import eventually

DEADLINE_S = 15.0


@contextlib.contextmanager
def running(
    service: str, run_dir: Path, data_dir: Path, config: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, until the block ends; it must then drain and exit with 0 unless it has ended before."""
    arguments = ["--run-dir", str(run_dir), "--data-dir", str(data_dir), *(["--config", str(config)] if config else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", f"falkirk.{service}", *arguments],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(falkirk.__file__).parents[1])},
    )
    try:
        yield process
        ended_by_itself = process.poll() is not None
        process.terminate()
        assert ended_by_itself or process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def channel(service: str, run_dir: Path, road: str = "admin") -> Iterator[grpc.Channel]:
    """A channel by a road."""
    with grpc.insecure_channel(f"unix:{run_dir}/{road}/{service}.sock") as made:
        yield made


def serving(service: str, run_dir: Path) -> bool:
    """Does health say SERVING?"""
    with channel(service, run_dir, "read") as made:
        try:
            answer = health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def until_serving(service: str, run_dir: Path) -> None:
    """Wait for it."""
    eventually(lambda: serving(service, run_dir))
