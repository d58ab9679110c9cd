"""The command line against a whole mesh with three workers: what it shows, filters, refuses and says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.cli_shell import Cli, Output
from tests.process.running_mesh import RunningMesh, descendants, running_mesh
from tools.mesh import SERVICES, resource, rule
from tools.netlab import stop, wait_for

LAPTOP = ("--tenant", "acme", "--device", "laptop")


@pytest.fixture(scope="module")
def receiver() -> str:
    """An address for spans; nobody listens there until a test does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def running(receiver: str) -> Iterator[RunningMesh]:
    settings = {
        "workers": 3,
        "telemetry": {"otlp_endpoint": receiver, "sample_ratio": 1.0},
        "log": {"level": "debug"},
    }
    with tempfile.TemporaryDirectory(prefix="fk-") as directory, running_mesh(Path(directory), settings) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def cli(running: RunningMesh) -> Cli:
    return Cli(running.mesh.run_dir)


@pytest.fixture(scope="module")
def denied(running: RunningMesh, cli: Cli) -> None:
    """One flow that rule no-mail denies and one that ended, both in the audit log."""
    assert running.curl(f"http://{running.server}/").returncode == 0
    assert running.curl(f"http://{running.server}:25/").returncode == 7
    wait_for("their records", lambda: {r["event"] for r in cli.records("audit", "query")} >= {"denied", "ended"}, 20)


@pytest.fixture
def drip(running: RunningMesh, cli: Cli) -> Iterator[dict[str, Any]]:
    """A flow that stays open, as `flow list` shows it."""
    known = {flow["id"] for flow in cli.json("flow", "list")["flows"]}
    command = ["curl", "--silent", "--no-buffer", "--noproxy", "*", f"http://{running.server}/drip/60"]
    process = running.lab.start(running.mesh.lower("laptop", command))

    def new() -> list[dict[str, Any]]:
        return [flow for flow in cli.json("flow", "list")["flows"] if flow["id"] not in known]

    wait_for("the flow", lambda: bool(new()), 20)
    yield {**new()[0], "process": process}
    stop(process)


def test_doctor_lists_every_process(running: RunningMesh, cli: Cli) -> None:
    report = json.loads(cli.run("doctor", "--json").stdout)
    told = {process["name"]: process["pid"] for process in report["mesh"]["processes"]}
    workers = {f"{service}.worker.{number}" for service in ("onramp", "flow", "upgrader") for number in range(3)}
    assert set(told) == {
        *SERVICES,
        *workers,
        "router.worker.0",
        "upgrader.helper",
        "upgrader.lower_helper",
    }
    really = descendants(running.pid)
    (nursery,) = set(really) - set(told.values())
    assert "-m falkirk.cli.nursery " in really[nursery], "what the others are forked from serves nobody, and isn't told"
    for service in SERVICES:
        assert f"-m falkirk.{service} " in really[told[service]]
    for name in workers:
        assert f"-m falkirk.{name.rpartition('.')[0]} " in really[told[name]]
    assert all(process["alive"] and process["rss_bytes"] > 1_000_000 for process in report["mesh"]["processes"])
    shown = cli.run("doctor").stdout
    for name, pid in told.items():
        assert any(line.split()[:2] == [name, str(pid)] for line in shown.splitlines()), shown


def test_resources_live_and_die(cli: Cli) -> None:
    of = ("--tenant", "zeta")
    kinds: tuple[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, str]], ...] = (
        (
            "user",
            ("ann", "--group", "eng"),
            ("--email", "ann@example.com"),
            {"EMAIL": "ann@example.com", "GROUPS": "eng"},
        ),
        ("vnet", ("blue",), ("--comment", "second"), {"COMMENT": "second", "DEFAULT": ""}),
        ("device", ("phone", "--user", "ann", "--vnet", "blue"), ("--disabled",), {"VNET": "blue", "DISABLED": "yes"}),
        (
            "route",
            ("web", "--prefix", "192.0.2.0/24", "--target", "internet"),
            ("--egress-address4", "198.51.100.7"),
            {"VNET": "default", "PREFIX": "192.0.2.0/24", "TARGET": "internet from 198.51.100.7"},
        ),
    )
    assert cli.ok("tenant", "create", "zeta") == "tenant/zeta created\n"
    for kind, create, update, row in kinds:
        cli.ok(kind, "create", *of, *create)
        assert cli.ok(kind, "update", *of, create[0], *update) == f"{kind}/zeta/{create[0]} updated\n"
        (shown,) = (line for line in cli.table(kind, "list", *of) if line["NAME"] == create[0])
        assert shown | row == shown
        listed = next(iter(cli.json(kind, "list", *of).values()))
        assert create[0] in [item["metadata"]["name"] for item in listed]
        assert cli.json(kind, "get", *of, create[0])["metadata"]["tenant"] == "zeta"
    for kind, create, *_ in reversed(kinds):
        cli.ok(kind, "delete", *of, create[0])
        assert "(NOT_FOUND)" in cli.refused(kind, "get", *of, create[0])
    cli.ok("tenant", "delete", "zeta")
    assert [line["NAME"] for line in cli.table("tenant", "list")] == ["acme"]


def test_flows_are_listed_and_shown(cli: Cli, running: RunningMesh, drip: dict[str, Any]) -> None:
    (shown,) = (row for row in cli.table("flow", "list") if row["ID"] == drip["id"])
    assert (shown["STATE"], shown["TENANT"], shown["DEVICE"]) == ("established", "acme", "laptop")
    assert (shown["DESTINATION"], shown["RULE"]) == (f"{running.server}:80", "access/staff")
    network = running.server.rpartition(".")[0] + ".0/24"
    for filters, there in (
        (("--tenant", "acme"), True),
        (("--tenant", "nobody"), False),
        (("--device", "laptop"), True),
        (("--device", "phone"), False),
        (("--dst", running.server), True),
        (("--dst", network), True),
        (("--dst", "2001:db8::/32"), False),
        (("--port", "80"), True),
        (("--port", "81"), False),
    ):
        assert (drip["id"] in [row["ID"] for row in cli.table("flow", "list", *filters)]) is there, filters
    flow = json.loads(cli.ok("flow", "get", drip["id"]))["flow"]
    assert (flow["id"], flow["context"]["user"], flow["rule"]) == (drip["id"], "alice", "access/staff")
    assert "(INVALID_FILTER)" in cli.refused("flow", "list", "--dst", "somewhere")
    assert "(INVALID_FLOW_ID)" in cli.refused("flow", "get", "xyz")
    assert "falkirk audit query --flow" in cli.refused("flow", "get", "0" * 32)


def test_a_killed_flow_is_reset_and_recorded(cli: Cli, drip: dict[str, Any]) -> None:
    assert cli.ok("flow", "kill", drip["id"], "--reason", "lunch") == ""
    assert drip["process"].wait(20) == 56  # curl: failure in receiving network data

    def ended() -> list[dict[str, Any]]:
        return cli.records("audit", "query", "--flow", drip["id"], "--event", "ended")

    wait_for("the record of its end", lambda: bool(ended()), 20)
    assert ended()[0]["reason"] == "terminated: lunch"
    assert "(FLOW_NOT_LIVE)" in cli.refused("flow", "kill", drip["id"])


def test_watches_tell_of_starts_denials_and_ends(cli: Cli, running: RunningMesh, drip: dict[str, Any]) -> None:
    with cli.stream("flow", "watch", *LAPTOP) as flows, cli.stream("audit", "tail", *LAPTOP, "--json") as audit:
        flows.wait("started", drip["id"], "by access/staff")
        seen = audit_is_open(running, audit)
        running.curl(f"http://{running.server}:25/")
        running.curl(f"http://{running.server}/")
        flows.wait("denied", f"-> {running.server}:25", "denied, by access/no-mail")
        flows.wait("ended", "finished", " B up, ")
        for event, port in (("denied", 25), ("started", 80), ("ended", 80)):
            record = json.loads(audit.wait(f'"event":"{event}"', f'"destination_port":{port}', after=seen))
            assert (record["tenant"], record["device"], record["user"]) == ("acme", "laptop", "alice")
    with cli.stream("device", "watch", "--tenant", "acme") as devices:
        devices.wait("exists device/acme/laptop")
    with cli.stream("flow", "watch", "--tenant", "acme", "--json") as events:
        event = json.loads(events.wait(drip["id"]))
        assert (event["event"], event["flow"]["id"]) == ("EVENT_STARTED", drip["id"])


def audit_is_open(running: RunningMesh, audit: Output) -> int:
    """Waits until a tail shows what happens now; the lines that it had shown by then."""

    def heard() -> bool:
        running.curl(f"http://{running.server}:25/")
        return bool(audit.lines)

    wait_for("the tail to be open", heard, 30)
    return len(audit.lines)


def test_flow_stats(cli: Cli, drip: dict[str, Any]) -> None:
    wait_for("the gauges", lambda: sum(int(w["flows"]) for w in cli.json("flow", "stats")["workers"]) >= 1, 20)
    shown = cli.ok("flow", "stats")
    for number in range(3):
        assert f"WORKER {number}" in shown
    assert "packets received" in shown
    stats = cli.json("flow", "stats")
    for worker in stats["workers"]:
        dropped = sum(int(drop["value"]) for drop in worker["drops"])
        assert int(worker["received"]) == int(worker["forwarded"]) + int(worker["answered"]) + dropped
    assert {replica["name"]: replica["live"] for replica in stats["replicas"]} == {"rules": True, "routes": True}


def test_audit_query_shows_and_filters(cli: Cli, running: RunningMesh, denied: None) -> None:
    everything = cli.table("audit", "query")
    (refused,) = {(row["DESTINATION"], row["RULE"], row["DETAIL"]) for row in everything if row["EVENT"] == "denied"}
    assert refused == (f"{running.server}:25", "access/no-mail", "denied by access/no-mail: net.port == 25")
    for filters, expected in (
        (("--event", "denied"), {"denied"}),
        (("--event", "ended", *LAPTOP), {"ended"}),
        (("--dst", running.server, "--since", "1h"), {"started", "denied", "ended"}),
        (("--dst", "192.0.2.1"), set()),
        (("--tenant", "nobody"), set()),
        (("--device", "phone"), set()),
        (("--until", "1h"), set()),
        (("--since", "2020-01-01T00:00:00Z", "--event", "started"), {"started"}),
    ):
        assert {row["EVENT"] for row in cli.table("audit", "query", *filters)} == expected, filters
        assert {record["event"] for record in cli.records("audit", "query", *filters)} == expected, filters
    assert len(cli.records("audit", "query", "--limit", "1")) == 1
    flow = cli.records("audit", "query", "--event", "ended")[0]["flow_id"]
    assert [record["event"] for record in cli.records("audit", "query", "--flow", flow)] == ["started", "ended"]


def test_explain_says_what_would_become_of_a_flow(cli: Cli, running: RunningMesh) -> None:
    cli.ok("route", "add", "--tenant", "acme", "203.0.113.0/24", "blackhole")
    try:
        for device, destination, port, status, outcome, words in (
            ("laptop", running.server, "80", 0, "lift", "allowed by access/staff"),
            ("laptop", running.server, "25", 1, "answer_rst", "denied by access/no-mail: net.port == 25"),
            ("laptop", "2001:db8::1", "80", 1, "answer_unreachable", "no route in virtual network default"),
            ("laptop", "203.0.113.9", "80", 1, "answer_unreachable", "to-203-0-113-0-24 leads nowhere"),
            ("laptop", "127.0.0.1", "80", 1, "answer_unreachable", "loopback"),
            ("phone", running.server, "80", 1, "refused", "UNKNOWN_DEVICE: tenant acme has no device"),
        ):
            asked = ("explain", "--tenant", "acme", "--device", device, "--dst", destination, "--port", port)
            told = cli.run(*asked)
            assert (told.exit_code, words in told.stdout) == (status, True), told.output
            answer = json.loads(cli.run(*asked, "--json").stdout)
            assert answer["outcome"] == outcome
            assert f"outcome: {outcome}" in told.stdout or outcome == "refused"
    finally:
        cli.ok("route", "delete", "--tenant", "acme", "to-203-0-113-0-24")
    assert "a destination port" in cli.refused("explain", *LAPTOP, "--dst", "192.0.2.1", status=2)


def test_a_trace_is_received_as_a_tree(cli: Cli, running: RunningMesh, receiver: str) -> None:
    with cli.stream("trace", "receive", "--listen", receiver, "--quiet", "3") as output:
        output.wait("listening on")

        def told() -> bool:
            running.curl(f"http://{running.server}/")
            return any(line.startswith("trace ") and "4 services" in line for line in output.lines)

        wait_for("a trace of four services", told, 45)
    lines = "".join(output.lines)
    for name in ("falkirk-flow", "falkirk-upgrader", "falkirk-onramp", "falkirk-policy"):
        assert name in lines


def test_errors_say_what_where_and_what_to_do(cli: Cli, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for words in (
        ("flow", "list"),
        ("flow", "stats"),
        ("audit", "query"),
        ("audit", "tail"),
        ("tenant", "list"),
        ("route", "add", "--tenant", "acme", "::/0", "internet"),
    ):
        said = cli.refused(*words, "--run-dir", nowhere)
        assert said.startswith("error: ")
        assert nowhere in said
        assert "(SERVICE_UNREACHABLE)" in said
        assert "falkirk up" in said
        assert "falkirk doctor" in said
    refusals: tuple[tuple[tuple[str, ...], int, str], ...] = (
        (("device", "create", "--tenant", "nobody", "x"), 1, "'nobody'"),
        (("user", "create", "--tenant", "acme", "No Good"), 1, "(INVALID_NAME)"),
        (("route", "add", "--tenant", "acme", "192.0.2.1/24", "internet"), 1, "(HOST_BITS_SET)"),
        (("audit", "query", "--dst", "somewhere"), 1, "(INVALID_ADDRESS)"),
        (("audit", "query", "--since", "yesterday"), 2, "90s, 15m, 1h, 2d"),
        (("audit", "query", "--event", "lost"), 2, "'started', 'denied', 'ended'"),
        (("trace", "receive", "--listen", "nonsense"), 2, "host:port"),
        (("apply", "-f", nowhere), 1, nowhere),
    )
    for typed, status, text in refusals:
        assert text in cli.refused(*typed, status=status), typed


def scraped(running: RunningMesh, service: str) -> str:
    path = running.mesh.run_dir / "read" / f"{service}.metrics.sock"
    command = ["curl", "--silent", "--unix-socket", str(path), "http://x/metrics"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def test_metrics_of_the_onramp_tell_answers_apart_from_what_workers_pass_on(running: RunningMesh) -> None:
    text = scraped(running, "onramp")
    results = {line.split('"')[1] for line in text.splitlines() if line.startswith("falkirk_onramp_admissions_total")}
    assert {"admitted", "closed", "UNKNOWN_DEVICE"} < results
    assert not any(result.startswith("wireguard_") for result in results)
    assert "falkirk_onramp_passed_on_total 0.0" in text.splitlines()


@pytest.mark.parametrize("service", ["flow", "upgrader", "onramp"])
def test_metrics_count_drops_by_reason(running: RunningMesh, service: str, denied: None) -> None:
    text = scraped(running, service)
    assert 'falkirk_drops_total{reason="' in text
    assert f'service="{service}"}} ' in text
    assert "process_resident_memory_bytes" in text
    assert f'method="/grpc.health.v1.Health/Check",road="read",service="{service}"' in text


def test_logs_are_json_lines_without_secrets(running: RunningMesh, denied: None) -> None:
    secrets = {value for name, value in os.environ.items() if "TOKEN" in name or "SECRET" in name or "PASSWORD" in name}
    services = set()
    for line in running.mesh.log.read_text().splitlines():
        assert not any(secret and secret in line for secret in secrets)
        if not line.startswith("{"):
            continue
        record = json.loads(line)
        assert {"ts", "level", "service", "event"} <= set(record), line
        # The span exporter's own words, until the receiver listens.
        assert record["level"] in ("debug", "info", "warning") or record["event"] == "library", line
        services.add(record["service"])
    assert set(SERVICES) <= services
    assert any(service.startswith("flow.worker.") for service in services)


def test_ten_thousand_routes_and_a_thousand_rules_in_one_file(running: RunningMesh, cli: Cli) -> None:
    rules = [rule(f"r{n}", f'net.port == {n + 1000} && net.dst.inCidr("10.0.0.0/8")', "allow") for n in range(1000)]
    routes = (
        resource("Route", f"r{n}", "large", prefix=f"10.{n // 250}.{n % 250}.0/24", target={"internet": {}})
        for n in range(10_000)
    )
    running.mesh.apply(
        [
            resource("Tenant", "large"),
            resource("Device", "box", "large"),
            resource("Policy", "many", "large", rules=rules),
            *routes,
        ],
        "large",
    )
    asked = ("explain", "--tenant", "large", "--device", "box", "--dst", "10.39.249.1", "--port")
    wait_for("the flow tracker to know it", lambda: cli.run(*asked, "1999").exit_code == 0, 60)
    assert cli.run(*asked, "2000").exit_code == 1
    items = {replica["name"]: replica["items"] for replica in cli.json("flow", "stats")["replicas"]}
    assert int(items["routes"]) > 10_000
    assert running.curl(f"http://{running.server}/").returncode == 0
