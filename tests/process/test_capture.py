"""`falkirk capture` on a whole mesh with two flow workers, its files read by dpkt and scapy."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dpkt
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.utils import RawPcapNgReader

from tests.process.cli_shell import Cli, Output
from tests.process.running_mesh import RunningMesh, running_mesh
from tools.netlab import wait_for

SYN, RST, ACK = 2, 4, 16


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMesh]:
    with tempfile.TemporaryDirectory(prefix="fk-") as directory, running_mesh(Path(directory), {"workers": 2}) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def cli(running: RunningMesh) -> Cli:
    return Cli(running.mesh.run_dir)


class Packet(NamedTuple):
    """A packet of a file as scapy reads it."""

    interface: str
    inbound: bool
    said: dict[str, str]
    ip: Any
    data: bytes


def packets(path: Path) -> list[Packet]:
    """A file's packets; dpkt must read the same."""
    content = path.read_bytes()
    found = []
    for data, meta in RawPcapNgReader(io.BytesIO(content)):
        assert meta.linktype == 101
        (comment,) = meta.comments
        said = dict(word.split("=", 1) for word in comment.decode().split())
        ip = IP(data) if data[0] >> 4 == 4 else IPv6(data)
        found.append(Packet(meta.ifname.decode(), meta.direction == 1, said, ip, data))
    assert [data for _, data in dpkt.pcapng.Reader(io.BytesIO(content))] == [packet.data for packet in found]
    return found


@contextmanager
def capturing(running: RunningMesh, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A capture for as long as the context lasts, begun before it is entered and complete when it is left."""
    command = [sys.executable, "-m", "falkirk.cli.main", "capture", "--run-dir", str(running.mesh.run_dir)]
    process = subprocess.Popen(
        [*command, "-w", str(path), *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    output = Output(process.stderr)
    try:
        output.wait("capturing")
        yield process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, "".join(output.lines)
        output.wait("captured, 0 lost")
    finally:
        process.kill()
        process.wait()
        output.close()
        process.stderr.close()


def captures(cli: Cli, path: Path) -> list[dict[str, Any]]:
    """The audit records of the capture that wrote to a file, by what it said."""
    return [r for r in cli.records("audit", "query") if str(path) in r.get("by", "")]


def test_a_connection_and_a_denial_on_both_sides_of_the_nat(running: RunningMesh, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "all.pcapng"
    with capturing(running, path, "--tenant", "acme", "--reason", f"into {path}"):
        assert running.curl(f"http://{running.server}/bytes/100000").returncode == 0
        assert running.curl(f"http://{running.server}:25/").returncode == 7
        wait_for("the flow's end", lambda: not cli.json("flow", "list").get("flows"), 20)
    found = packets(path)
    web = [packet for packet in found if packet.said.get("rule") == "access/staff"]
    (flow,) = {packet.said["flow"] for packet in web}
    assert flow in [record["flow_id"] for record in cli.records("audit", "query", "--event", "ended")]
    above = [packet for packet in web if packet.interface == "tunnel"]
    below = [packet for packet in web if packet.interface == "namespace"]
    assert above[0].said["fate"] == "held"
    assert (above[0].ip.src, above[0].ip.dst, above[0].ip[TCP].dport) == ("100.96.0.2", running.server, 80)
    assert int(above[0].ip[TCP].flags) == SYN
    assert int(below[0].ip[TCP].flags) == SYN
    assert below[0].ip.src.startswith("10.")
    assert {packet.said["fate"] for packet in web} == {"held", "forwarded", "sent"}
    # What went in came out on the other side, and the other way round.
    for one, other in ((above, below), (below, above)):
        assert sum(p.inbound for p in one) == sum(not p.inbound for p in other)
    for side in (above, below):
        assert b"".join(bytes(p.ip[TCP].payload) for p in side if b"GET /bytes/100000" in p.data)
        assert sum(p.ip.len - 40 for p in side if p.ip[TCP].sport != above[0].ip[TCP].sport) > 100_000
    super_packets = [packet for packet in web if int(packet.said.get("gso", 0))]
    assert super_packets
    assert all(packet.said["csum"] == "partial" for packet in super_packets)
    denied, answer = (packet for packet in found if packet.said.get("rule") == "access/no-mail")
    assert (denied.said["fate"], denied.said["outcome"], denied.inbound) == ("answered", "answer_rst", True)
    assert "flow" not in denied.said
    assert int(answer.ip[TCP].flags) & RST

    def recorded() -> list[str]:
        return sorted(record["event"] for record in captures(cli, path))

    # One of each worker.
    expected = ["capture_ended", "capture_ended", "capture_started", "capture_started"]
    wait_for("its records", lambda: recorded() == expected, 20)
    records = captures(cli, path)
    assert len({record["capture_id"] for record in records}) == 1
    assert re.match(rf".+ \(uid {os.getuid()}\): into ", records[0]["by"])
    assert sum(record.get("count", 0) for record in records) == len(found)
    assert "acme" in {record["tenant"] for record in records}


def test_it_ends_by_itself(running: RunningMesh, tmp_path: Path) -> None:
    path = tmp_path / "few.pcapng"
    with capturing(running, path, "--count", "3", "--filter", "net.port == 80", "--snaplen", "40") as process:
        assert running.curl(f"http://{running.server}/").returncode == 0
        assert process.wait(20) == 0
    assert [len(packet.data) for packet in packets(path)] == [40, 40, 40]
    with capturing(running, path, "--seconds", "0.2") as process:
        assert process.wait(20) == 0
    assert packets(path) == []


def test_one_flow_and_nothing_else(running: RunningMesh, cli: Cli, tmp_path: Path) -> None:
    running.hold(1)
    flow = cli.json("flow", "list")["flows"][0]["id"]
    path = tmp_path / "flow.pcapng"
    with capturing(running, path, "--flow", flow):
        assert running.curl(f"http://{running.server}/").returncode == 0
        cli.ok("flow", "kill", flow)
        wait_for("its end", lambda: flow not in [row["ID"] for row in cli.table("flow", "list")], 20)
    found = packets(path)
    assert {packet.said["flow"] for packet in found} == {flow}
    assert any(int(packet.ip[TCP].flags) & RST for packet in found)


def test_a_worker_that_is_killed_is_watched_again(running: RunningMesh, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "killed.pcapng"
    with capturing(running, path, "--filter", "net.port == 80", "--reason", f"into {path}"):
        report = json.loads(cli.run("doctor", "--json").stdout)
        for process in report["mesh"]["processes"]:
            if process["name"].startswith("flow.worker."):
                os.kill(process["pid"], signal.SIGKILL)
        wait_for("flow", lambda: running.curl(f"http://{running.server}/").returncode == 0, 30)
    assert any(packet.said["fate"] == "forwarded" for packet in packets(path))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--filter", "net.prot == 80"), "INVALID_FILTER"),
        (("--filter", "net.port"), "INVALID_FILTER"),
        (("--flow", "00" * 16), "FLOW_NOT_LIVE"),
        (("--flow", "x"), "INVALID_FLOW_ID"),
        (("--reason", "x" * 200), "REASON_TOO_LONG"),
    ],
)
def test_what_cannot_be_captured(cli: Cli, tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    assert f"({reason})" in cli.refused("capture", "-w", str(tmp_path / "x"), *options)
    assert not (tmp_path / "x").exists()


def test_payload_needs_the_admin_road(running: RunningMesh) -> None:
    grpcurl = str(Path(sys.executable).parent / "grpcurl")
    for road in ("read", "mesh"):
        command = [grpcurl, "-plaintext", "-unix", "-max-time", "5", str(running.mesh.run_dir / road / "flow.sock")]
        asked = [*command, "falkirk.api.flow.v1.FlowService/Capture"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
        assert "ROAD_FORBIDDEN" in done.stderr + done.stdout
        assert done.stdout.strip() == "" or "packet" not in done.stdout
