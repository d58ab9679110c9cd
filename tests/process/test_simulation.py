"""`falkirk explain` of whole packets on a whole mesh: every stage answers, a capture is judged, and nothing is sent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.cli_shell import Cli
from tests.process.running_mesh import RunningMesh, running_mesh
from tests.process.test_capture import capturing
from tools.mesh import resource
from tools.netlab import wait_for

LAPTOP = ("explain", "--tenant", "acme", "--device", "laptop")


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMesh]:
    with tempfile.TemporaryDirectory(prefix="fk-") as directory, running_mesh(Path(directory), {"workers": 2}) as mesh:
        mesh.mesh.apply([resource("Device", "printer", "acme")])
        yield mesh


@pytest.fixture(scope="module")
def cli(running: RunningMesh) -> Cli:
    return Cli(running.mesh.run_dir)


def asked(cli: Cli, *words: str, status: int = 0) -> Any:
    """The answer, as JSON."""
    result = cli.run(*LAPTOP, *words, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def stages(answer: Any) -> list[tuple[str, bool]]:
    return [(stage["name"], stage["passed"]) for stage in answer["flow"]["stages"]]


def counted(cli: Cli) -> list[Any]:
    """What would have changed if a packet had come."""
    stats = cli.json("flow", "stats")
    return [
        (worker["worker"], worker.get("received"), worker.get("answered"), worker.get("drops"), worker.get("counters"))
        for worker in stats["workers"]
    ]


def test_every_stage_answers_and_nothing_is_sent(running: RunningMesh, cli: Cli) -> None:
    assert running.curl(f"http://{running.server}/").returncode == 0
    wait_for("the flow's end", lambda: not cli.json("flow", "list").get("flows"), 20)
    before = counted(cli)
    to = ("--dst", running.server, "--port", "80")
    answer = asked(cli, *to)
    assert answer["outcome"] == "lift"
    assert [name for name, passed in stages(answer) if passed] == [
        "well_formed", "source", "ttl", "checksum", "flow", "route", "policy", "treatment", "limits", "slot", "off_ramp", "mtu"
    ]  # fmt: skip
    for words, outcome, stage, reference in (
        ((*to, "--ttl", "1"), "answer_time_exceeded", "ttl", "ttl"),
        ((*to, "--src", "100.96.9.9"), "drop", "source", "spoofed_source"),
        ((*to, "--flags", "A"), "answer_rst", "flow", "no_flow"),
        ((*to, "--flags", "SF"), "drop", "flow", "bad_tcp_flags"),
        ((*to, "--length", "1501"), "drop", "mtu", "syn_too_large"),
        (("--dst", running.server, "--port", "25"), "answer_rst", "policy", "access/no-mail"),
        (("--dst", running.server, "--port", "25", "--proto", "udp"), "answer_prohibited", "policy", "access/no-mail"),
        (("--dst", "127.0.0.1", "--port", "80"), "answer_unreachable", "route", "martian_destination"),
        (("--dst", "2001:db8::1", "--port", "80"), "answer_unreachable", "route", "no_route"),
        (("--dst", running.server, "--proto", "sctp"), "answer_unreachable", "treatment", "protocol_not_built"),
    ):
        answer = asked(cli, *words, status=1)
        last = answer["flow"]["stages"][-1]
        assert (answer["outcome"], last["name"], last["reference"], last["passed"]) == (
            outcome,
            stage,
            reference,
            False,
        )
        assert all(passed for _, passed in stages(answer)[:-1])
    for options in (("--port", "53", "--proto", "udp"), ("--port", "0", "--proto", "icmp")):
        assert asked(cli, "--dst", running.server, *options)["outcome"] == "lift"
    assert counted(cli) == before


def test_a_device_that_is_away_and_one_that_is_there(running: RunningMesh, cli: Cli) -> None:
    (printer,) = (
        d for d in cli.json("device", "list", "--tenant", "acme")["devices"] if d["metadata"]["name"] == "printer"
    )
    address = next(text for text in printer["addresses"] if "." in text)
    to = ("--dst", address, "--port", "631")
    answer = asked(cli, *to, status=1)
    assert (answer["outcome"], answer["flow"]["stages"][-1]["reference"]) == ("answer_unreachable", "device_offline")
    process = running.lab.start(running.mesh.lower("printer", ["sleep", "60"]))
    wait_for("the printer's tunnel", lambda: cli.run(*LAPTOP, *to).exit_code == 0, 20)
    answer = asked(cli, *to)
    assert answer["outcome"] == "forward"
    assert [name for name, _ in stages(answer)][-2:] == ["tunnel", "mtu"]
    assert asked(cli, *to, "--proto", "udp", "--length", "1501", status=1)["outcome"] == "answer_too_big"
    assert asked(cli, *to, "--proto", "udp", "--length", "1501", "--no-df")["outcome"] == "forward"
    process.terminate()
    process.wait(20)


def test_a_flow_that_there_is_takes_its_packets(running: RunningMesh, cli: Cli) -> None:
    running.hold(1)
    (flow,) = cli.json("flow", "list")["flows"]
    ends = ("--dst", running.server, "--port", "80", "--sport", str(flow["key"]["sourcePort"]))
    answer = asked(cli, *ends, "--flags", "A")
    last = answer["flow"]["stages"][-1]
    assert (answer["outcome"], last["name"], last["reference"]) == ("flow", "flow", flow["id"])
    cli.ok("flow", "kill", flow["id"])
    wait_for("its end", lambda: not cli.json("flow", "list").get("flows"), 20)
    assert asked(cli, *ends, "--flags", "A", status=1)["outcome"] == "answer_rst"


def test_what_was_captured_is_judged(running: RunningMesh, cli: Cli, tmp_path: Path) -> None:
    """The laptop's own packets, as `falkirk capture` wrote them: a SYN that would begin a flow anew, segments of a flow that is over."""
    path = tmp_path / "curl.pcapng"
    with capturing(running, path, "--filter", "net.port == 80"):
        assert running.curl(f"http://{running.server}/").returncode == 0
        wait_for("the flow's end", lambda: not cli.json("flow", "list").get("flows"), 20)
    answer = asked(cli, "--packet", str(path), "--fix-checksums", status=1)
    first, *others = (packet["outcome"] for packet in answer["packets"])
    assert first == "lift"
    # The laptop's own segments; and what it didn't send itself (the server's, and those behind the NAT).
    assert set(others) == {"answer_rst", "drop"}
    shown = cli.run(*LAPTOP, "--packet", str(path), "--count", "1").stdout
    assert "packet 1:" in shown
    assert "outcome: lift" in shown or "bad_l4_checksum" in shown


def test_a_device_that_would_not_be_admitted(cli: Cli) -> None:
    result = cli.run(
        "explain", "--tenant", "acme", "--device", "nobody", "--dst", "192.0.2.1", "--port", "80", "--json"
    )
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["outcome"], answer["flow"]) == (1, "refused", None)
