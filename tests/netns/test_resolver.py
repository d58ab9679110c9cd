"""The tenant's resolver as devices meet it: a real dig through `falkirk lower`, a whole mesh, real resolvers in the world.

laptop, nas (acme) ──lower──► falkirk up ──► the world's resolver 198.18.N.2:5353, the company's 198.18.N.2:5454
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns import dns_world
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, wait_for

pytestmark = pytest.mark.netns

RESOLVER4 = "100.96.0.53"


class World:
    """The mesh with its names."""

    def __init__(self, mesh: Mesh, lab: Lab) -> None:
        self.mesh, self.lab = mesh, lab

    def dig(self, *arguments: str, device: str = "laptop", server: str = RESOLVER4) -> str:
        """Dig's output as a device; one try of five seconds."""
        command = ["dig", f"@{server}", "+tries=1", "+timeout=5", *arguments]
        done = subprocess.run(self.mesh.lower(device, command), capture_output=True, text=True, timeout=30, check=False)
        return done.stdout + done.stderr

    def short(self, *arguments: str, **where: str) -> list[str]:
        """The records that it was answered with."""
        return sorted(self.dig("+short", *arguments, **where).split("\n"))[1:]

    def queries(self, name: str) -> list[dict[str, Any]]:
        """Audit's records of questions for a name."""
        return [
            record
            for record in self.mesh.ask_json("records", "audit", "query", "--event", "query")
            if record.get("query") == name
        ]


def documents(net: str) -> list[dict[str, Any]]:
    corp = [
        {"name": "www", "type": "A", "value": "10.1.0.2"},
        {"name": "www", "type": "AAAA", "value": "fd00:1::2"},
        {"name": "intranet", "type": "CNAME", "value": "www.corp.internal"},
        {"name": "outside", "type": "CNAME", "value": "www.world.test"},
        {"name": "_ldap._tcp", "type": "SRV", "value": "0 5 389 www.corp.internal"},
        {"name": "payroll", "type": "A", "value": "10.1.0.3"},
    ]
    rules = [
        rule("no-payroll", 'app.dns_name == "payroll.corp.internal" && !("staff" in identity.groups)', "deny"),
        rule("mute", 'device.name == "mute" && net.port == 53', "deny"),
        rule("staff", '"staff" in identity.groups', "allow"),
    ]
    return [
        resource("Tenant", "acme", devicePool6="fd01:203:405::/64"),
        resource("User", "alice", "acme", groups=["staff"]),
        resource("User", "bob", "acme"),
        resource("Device", "laptop", "acme", user="alice", addresses=["100.96.0.2", "fd01:203:405::2"]),
        resource("Device", "guest", "acme", user="bob"),
        resource("Device", "mute", "acme", user="alice"),
        resource("Device", "nas", "acme", addresses=["100.96.0.7", "fd01:203:405::7"]),
        resource("Tenant", "other"),
        resource("Device", "theirs", "other"),
        resource("Route", "company", "acme", prefix=f"{net}.0/24", target={"internet": {}}),
        resource("Zone", "corp", "acme", domain="corp.internal", records=corp),
        resource("Zone", "branch", "acme", domain="branch.internal", forwardTo=[f"{net}.2:5454"]),
        resource("Zone", "nowhere", "acme", domain="nowhere.internal", forwardTo=["10.9.9.9"]),
        resource("Policy", "access", "acme", priority=10, rules=rules),
    ]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="fk-") as directory, Lab() as lab:
        namespace = lab.namespace("resolvers")
        net = f"198.18.{lab.number}"
        lab.cable(None, namespace, [f"{net}.1/24"], [f"{net}.2/24"])
        for port, zone in ((5353, "world.test"), (5454, "branch.internal")):
            log = Path(directory) / f"{zone}.log"
            command = (sys.executable, str(Path(dns_world.__file__)), f"{net}.2", str(port), zone)
            with log.open("wb") as output:
                namespace.start(*command, log=output)
            wait_for(f"the resolver of {zone}", lambda log=log: log.read_text().startswith("ready"), 15)  # type: ignore[misc]
        mesh = Mesh(lab, Path(directory))
        mesh.start({"router": {"resolver_upstreams": [f"{net}.2:5353"], "resolver_timeout_ms": 1000}})
        mesh.apply(documents(net))
        yield World(mesh, lab)


def test_devices_have_names_both_ways(world: World) -> None:
    wait_for("the resolver to know the devices", lambda: world.short("nas.acme.falkirk", "A") == ["100.96.0.7"], 20)
    assert world.short("NAS.Acme.Falkirk", "AAAA") == ["fd01:203:405::7"]
    assert world.short("-x", "100.96.0.7") == ["nas.acme.falkirk."]
    assert world.short("-x", "fd01:203:405::7") == ["nas.acme.falkirk."]
    # By the resolver's IPv6 address, and by TCP.
    assert world.short("nas.acme.falkirk", "A", server="fd01:203:405::53") == ["100.96.0.7"]
    assert world.short("+tcp", "nas.acme.falkirk", "A") == ["100.96.0.7"]
    for missing in ("printer.acme.falkirk", "theirs.other.falkirk"):
        assert "status: NXDOMAIN" in world.dig(missing)
    assert "status: NOERROR" in world.dig("nas.acme.falkirk", "TXT")


def test_zones_answer_and_are_forwarded_by_the_networks_routes(world: World) -> None:
    assert world.short("www.corp.internal", "AAAA") == ["fd00:1::2"]
    assert world.short("intranet.corp.internal", "A") == ["10.1.0.2", "www.corp.internal."]
    assert world.short("_ldap._tcp.corp.internal", "SRV") == ["0 5 389 www.corp.internal."]
    assert world.short("www.branch.internal", "A") == ["192.0.2.80"]
    assert "status: NXDOMAIN" in world.dig("gone.branch.internal")
    # An alias that leads out is followed for the client.
    assert world.short("outside.corp.internal", "A") == ["192.0.2.80", "www.world.test."]
    # No route leads to that resolver: nobody else is asked instead.
    assert "status: SERVFAIL" in world.dig("www.nowhere.internal")
    (record, *_) = world.queries("www.nowhere.internal")
    assert record["why"] == "10.9.9.9: no route"


def test_the_world_is_asked_for_the_rest_and_long_answers_come_by_tcp(world: World) -> None:
    assert world.short("www.world.test", "A") == ["192.0.2.80"]
    assert len(world.short("long.world.test", "A")) == 40
    assert "Truncated, retrying in TCP mode" in world.dig("+noedns", "long.world.test", "A")
    assert "flags: qr" in world.dig("+noedns", "+ignore", "long.world.test", "A")


def test_a_rule_hides_a_name_from_whom_it_says(world: World) -> None:
    assert world.short("payroll.corp.internal", "A") == ["10.1.0.3"]
    hidden = world.dig("payroll.corp.internal", "A", device="guest")
    assert "status: NXDOMAIN" in hidden
    assert "10.1.0.3" not in hidden
    assert world.short("www.corp.internal", "A", device="guest") == ["10.1.0.2"]
    # A rule may deny DNS as such; only the resolver's port is there for everybody else.
    assert "no servers could be reached" in world.dig("www.corp.internal", "A", device="mute")


def test_every_question_is_on_record_with_who_asked(world: World) -> None:
    world.short("www.corp.internal", "TXT", device="guest")
    world.dig("payroll.corp.internal", "A", device="guest")

    def told() -> bool:
        return any(record["rcode"] == "NXDOMAIN" for record in world.queries("payroll.corp.internal"))

    wait_for("audit's record of the question", told, 15)
    record = next(record for record in world.queries("payroll.corp.internal") if record["rcode"] == "NXDOMAIN")
    assert (record["tenant"], record["device"], record["user"]) == ("acme", "guest", "bob")
    assert (record["query_type"], record["source_port"] > 0, record["rule"]) == ("A", True, "access/no-payroll")
    flow = world.mesh.ask_json("records", "audit", "query", "--flow", record["flow_id"])
    assert next(found["event"] for found in flow if found["event"] != "query") == "started"


def test_flows_name_who_they_are_for_wherever_they_are_told(world: World) -> None:
    """In the list, in `flow top`, in the audit log, in metrics and in captured packets' comments."""
    capture = world.mesh.run_dir.parent / "capture.pcapng"
    command = ["capture", "--tenant", "acme", "--write", str(capture), "--count", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "falkirk.cli.main", *command], env=world.mesh.environment
    ) as capturing:

        def captured() -> bool:
            world.short("nas.acme.falkirk", "A")
            return capturing.poll() is not None

        wait_for("two captured packets", captured, 30)
    assert b"device=laptop user=alice groups=staff" in capture.read_bytes()
    # A session stays for 20 s where its tunnel does.
    command = ["sh", "-c", f"dig @{RESOLVER4} nas.acme.falkirk >/dev/null; exec sleep 60"]
    world.lab.start(world.mesh.lower("laptop", command))
    chosen = ("flow", "list", "--device", "laptop", "--port", "53")

    def counted() -> bool:
        return any(int(flow["bytesUp"]) for flow in world.mesh.ask_json("flows", *chosen))

    wait_for("the flow in the list, with what it has carried", counted, 20)
    found = world.mesh.ask_json("flows", *chosen)
    assert {(flow["context"]["user"], *flow["context"]["groups"]) for flow in found} == {("alice", "staff")}
    for by, name in (("device", "laptop"), ("user", "alice"), ("group", "staff"), ("destination", "resolver")):
        (look,) = world.mesh.ask_json("looks", "flow", "top", "--by", by, "--count", "1")
        row = next(row for row in look["rows"] if row["name"] == name)
        assert row["flows"] >= 1
        assert int(row["bytesUp"]) > 0
    assert "laptop" in world.mesh.ask("flow", "top", "--count", "1")
    started = world.mesh.ask_json("records", "audit", "query", "--event", "started", "--device", "laptop")
    assert {(record["user"], *record["groups"]) for record in started} == {("alice", "staff")}
    scraped = subprocess.run(
        [
            "curl",
            "-s",
            "--unix-socket",
            str(world.mesh.run_dir / "read" / "flow.metrics.sock"),
            "http://metrics/metrics",
        ],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    ).stdout
    assert 'falkirk_flow_device_flows{device="laptop",groups="staff",tenant="acme",user="alice"}' in scraped
