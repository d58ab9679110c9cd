"""The README's table of questions: each line runs as it stands, and the table names everything that can be read."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from falkirk.api.net.v1 import access_pb2
from tests.process.running_mesh import RunningMesh, running_mesh
from tools.netlab import wait_for

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_EXCEEDED = 64 + 4
"""grpcurl's exit code for a stream that -max-time ended."""
RESOURCE_KINDS = (
    "TenantService",
    "UserService",
    "DeviceService",
    "VirtualNetworkService",
    "RouteService",
    "ZoneService",
)
"""The registry's services of one shape: one question of each is enough."""


class Line(NamedTuple):
    """A row of the table."""

    service: str
    question: str
    command: str


def table() -> list[Line]:
    """The rows below `## Asking with grpcurl`."""
    section = (ROOT / "README.md").read_text().split("## Asking with grpcurl")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| `([^`]+)` \|$", section, re.MULTILINE)
    return [Line(*(cell.strip() for cell in row)) for row in rows]


def values(text: str) -> list[Any]:
    """The JSON values of grpcurl's output, one after another."""
    found, decoder, place = [], json.JSONDecoder(), 0
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        value, place = decoder.raw_decode(text, place)
        found.append(value)
    return found


def shell(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line as a user would; grpcurl is the one beside this interpreter."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    whole = {**os.environ, **environment, "PATH": path}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False, env=whole)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMesh]:
    """One mesh for the module; under /tmp, since a unix socket's path is short."""
    with tempfile.TemporaryDirectory(prefix="fk-") as directory, running_mesh(Path(directory)) as mesh:
        yield mesh


def read_methods() -> Iterator[tuple[str, str]]:
    """(service, full method name with a slash) of everything that may be asked from read/."""
    access: Any = access_pb2.access
    for proto in sorted((ROOT / "protos" / "falkirk" / "api").glob("*/v1/*_service.proto")):
        module = ".".join(proto.relative_to(ROOT / "protos").with_suffix("").parts) + "_pb2"
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.GetOptions().Extensions[access] == access_pb2.ACCESS_READ:
                    yield proto.parent.parent.name, f"{service.full_name}/{method.name}"


def test_the_table_names_everything_that_can_be_read() -> None:
    lines = table()
    asked = {line.command.split()[-1] for line in lines}
    for service, method in read_methods():
        if service != "registry":
            assert method in asked
    for kind in (
        *RESOURCE_KINDS,
        "NodeService",
        "PolicyService",
        "PresenceService",
        "DeviceTokenService",
        "RegistryService",
    ):
        assert any(name.startswith(f"falkirk.api.registry.v1.{kind}/") for name in asked)
    for service in {line.service for line in lines}:
        commands = [line.command for line in lines if line.service == service]
        assert any(command.endswith(f"{service}.sock list") for command in commands)
        assert any(command.endswith("grpc.health.v1.Health/Check") for command in commands)


@pytest.mark.netns
def test_every_line_of_the_table_runs(running: RunningMesh) -> None:
    """In the table's order, which ends a flow and closes a tunnel last."""
    read = running.mesh.run_dir / "read"
    running.hold(2)  # one whose flow is ended, one whose tunnel is closed
    running.serve(8080)
    environment = {"R": str(running.mesh.run_dir)}
    listed = shell(f"grpcurl -plaintext -unix {read}/flow.sock falkirk.api.flow.v1.FlowService/List", {})
    first, second = json.loads(listed.stdout)["flows"]
    environment["FLOW"] = first["id"]
    environment["TUNNEL"] = str(second["tunnel_id"])
    asked = """grpcurl -plaintext -unix -d '{"tenant": "acme", "device": "laptop"}'"""
    explained = shell(f"{asked} {read}/onramp.sock falkirk.api.onramp.v1.OnrampService/Explain", {})
    environment["CONTEXT"] = json.dumps(json.loads(explained.stdout)["context"])
    lines = table()
    assert len(lines) > 40
    for line in lines:
        done = shell(line.command, environment)
        ended_in_time = {0, DEADLINE_EXCEEDED} if "-max-time" in line.command else {0}
        assert done.returncode in ended_in_time, f"{line.service}: {line.question}: {done.stderr}"
        if line.command.endswith(" list"):
            assert f"falkirk.api.{line.service}.v1." in done.stdout
            assert "grpc.health.v1.Health" in done.stdout
        elif line.command.endswith("Health/Check"):
            assert values(done.stdout) == [{"status": "SERVING"}]
        elif not line.command.endswith(("/Tail", "/Capture")):
            assert values(done.stdout) != [], line.command


@pytest.mark.netns
def test_one_flow_from_syn_to_close_with_grpcurl_alone(running: RunningMesh, tmp_path: Path) -> None:
    """Watch shows the flow begin and end, with its bytes; the audit log says the same."""
    read = running.mesh.run_dir / "read"
    output = tmp_path / "watched"
    grpcurl = [str(Path(sys.executable).parent / "grpcurl"), "-plaintext", "-unix"]
    watch = [*grpcurl, "-max-time", "60", "-d", '{"filter": {"destination_port": 80}}', f"{read}/flow.sock"]
    with output.open("wb") as file:
        watcher = running.lab.start([*watch, "falkirk.api.flow.v1.FlowService/Watch"], log=file)

    def seen(event: str) -> list[Any]:
        text = output.read_text()
        complete = text[: text.rfind("\n}") + 2]
        return [value for value in values(complete) if value.get("event") == event]

    # The watch begins whenever the server takes it: ask until one flow has been seen whole.
    def whole() -> bool:
        assert running.curl(f"http://{running.server}/bytes/100000").returncode == 0
        begun = {value["flow"]["id"] for value in seen("EVENT_STARTED")}
        return any(value["flow"]["id"] in begun for value in seen("EVENT_ENDED"))

    wait_for("a flow that was watched from SYN to close", whole, 40)
    watcher.terminate()
    begun = {value["flow"]["id"] for value in seen("EVENT_STARTED")}
    ended = next(value["flow"] for value in seen("EVENT_ENDED") if value["flow"]["id"] in begun)
    assert ended["key"]["destination_address"] == running.server
    assert ended["rule"] == "access/staff"
    assert int(ended["bytes_down"]) > 100_000
    query = f"""grpcurl -plaintext -unix -d '{{"filter": {{"flow_id": "{ended["id"]}"}}}}' {read}/policy.sock"""

    def recorded() -> list[str]:
        done = shell(f"{query} falkirk.api.policy.v1.AuditService/Query", {})
        return [json.loads(value["record"]["json"])["event"] for value in values(done.stdout)]

    wait_for("both audit records", lambda: recorded() == ["started", "ended"], 10)
