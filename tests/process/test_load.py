"""The load generators on loopback: what they measure is right before it is compared."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.load import http_server

LOAD = Path(http_server.__file__).resolve().parent


def free_port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def started(*command: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.communicate(timeout=10)


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """Targets of an echo server on two ports, both families."""
    ports = (free_port(), free_port())
    process = started(str(LOAD / "echo_server.py"), *map(str, ports))
    yield f"127.0.0.1:{ports[0]},127.0.0.1:{ports[1]},[::1]:{ports[0]}"
    ended(process)


@pytest.mark.parametrize(
    ("mode", "keys"),
    [("connections", {"per_s", "failed", "total"}), ("rtt", {"p50", "p99", "samples"}), ("messages", {"per_s"})],
)
def test_the_client_measures_an_echo_server(echo: str, mode: str, keys: set[str]) -> None:
    command = [sys.executable, str(LOAD / "client.py"), mode, echo, "--seconds", "0.5", "--parallel", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    result = json.loads(done.stdout)
    assert set(result) == keys
    assert result.get("failed", 0) == 0
    assert all(value > 0 for key, value in result.items() if key != "failed")


def test_connections_that_fail_are_counted_as_failed() -> None:
    target = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(LOAD / "client.py"), "connections", target, "--seconds", "0.3", "--parallel", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    result = json.loads(done.stdout)
    assert result["per_s"] == 0
    assert result["failed"] > 0


def test_the_http_server_serves_its_stream() -> None:
    port = free_port()
    process = started(str(LOAD / "http_server.py"), "--bind", "127.0.0.1", "--port", str(port))
    try:
        size = http_server.BLOCK + 12_345
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/bytes/{size}", timeout=20) as answer:
            body = answer.read()
        assert len(body) == size
        assert hashlib.sha256(body).hexdigest() == http_server.digest(size)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert answer.read() == b"Hello from the server. I see you as 127.0.0.1.\n"
    finally:
        ended(process)
