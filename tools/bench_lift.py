"""`tools/bench lift`: what lifting costs, as ratios measured in one run.

A node's namespace and a server's, one veth between. In each round every contestant runs every measurement in turn, so
that what else the machine does hits all of them; what is shown are medians over the rounds, and ratios of medians.

    veth        iperf3 from the node straight to the server: the limit on this machine
    loopback    the load generators on the node's own loopback: their own limit
    falkirk     `falkirk up` in its default configuration in the node's namespace (six services, audit on, 1,000 rules,
                10,000 routes), iperf3 and the generators through `falkirk lower` with vnet framing
    peers       pasta, slirp4netns

Forward is from the client to the server. Connections: connect, 1 byte there and back, 16 in flight, several server
addresses and ports, the client closes first. Round trip: 64 bytes on one connection. Small packets: 64-byte messages there
and back on 16 connections. Limits: rates include Python load generators, hence ratios to loopback; two cores share it all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tools import contestants, offloads
from tools.bench_report import report, show
from tools.contestants import Contestant
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, Namespace, guard_signals, wait_for

IPERF_PORT = 5201
ECHO_PORTS = (7001, 7002, 7003, 7004)
RULES = 1000
ROUTES = 10_000
STREAMS = (1, 8)
PEERS = ("pasta", "slirp4netns")
LOAD = Path(__file__).resolve().parent / "load"


def resources() -> Iterator[dict[str, Any]]:
    """A tenant whose traffic is allowed by its last rule and routed by its shortest prefix, after 999 and 9,998 others."""
    yield resource("Tenant", "acme")
    yield resource("User", "alice", "acme", groups=["staff"])
    yield resource("Device", "laptop", "acme", user="alice")
    yield resource("Route", "all4", "acme", prefix="0.0.0.0/0", target={"internet": {}})
    yield resource("Route", "all6", "acme", prefix="::/0", target={"internet": {}})
    for number in range(ROUTES - 2):
        prefix = f"172.{16 + (number >> 12)}.{number >> 4 & 255}.{(number & 15) << 4}/28"
        yield resource("Route", f"site-{number}", "acme", prefix=prefix, target={"internet": {}})
    for group in range(RULES // 100):
        rules = [_unrelated(group * 100 + number) for number in range(100)]
        if group == RULES // 100 - 1:
            rules[-1] = rule("staff", '"staff" in identity.groups && net.protocol == "tcp"', "allow")
        yield resource("Policy", f"policy-{group}", "acme", priority=group, rules=rules)


def _unrelated(number: int) -> dict[str, str]:
    """A rule such as people write, which doesn't match here."""
    network = f'net.dst.inCidr("172.{16 + number % 16}.{number // 16}.0/24")'
    kinds = (
        (f"{network} && net.port == 443", "allow"),
        (f'{network} && "team-{number}" in identity.groups', "allow"),
        (f"net.port == {20000 + number}", "deny"),
        (f'device.name == "printer-{number}"', "deny"),
    )
    when, action = kinds[number % len(kinds)]
    return rule(f"rule-{number}", when, action)


def congestion_control(namespaces: list[Namespace]) -> str:
    """Set one that every namespace takes: the machine's default may be BBR, which halves local throughput."""
    for name in ("cubic", "reno"):
        if all(namespace.sysctl("net.ipv4.tcp_congestion_control", name) for namespace in namespaces):
            return name
    return "reno"  # set on each of iperf3's sockets at least; every kernel has it


def measure(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a generator that prints JSON; its whole session is killed where it takes too long. Raises LabError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=seconds * 3 + 15)
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)}: not done in time") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    start = out.find("{")
    if process.returncode != 0 or start < 0:
        raise LabError(f"{' '.join(command)}: exit {process.returncode}: {(error.strip() or out.strip())[-1500:]}")
    value: dict[str, Any] = json.loads(out[start:])
    return value


class Bench:
    """The rounds and what they gave: samples[contestant][measurement] -> values."""

    def __init__(self, congestion: str, seconds: float) -> None:
        self.congestion = congestion
        self.seconds = seconds
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.failed: dict[str, int] = {}
        """Connections that failed within a measurement."""
        self.gave_up: dict[str, int] = {}
        """Measurements of a peer that gave nothing, twice."""

    def throughput(self, who: Contestant, streams: int, reverse: bool) -> float:
        """Gbit/s of payload that arrived."""
        options = ["-P", str(streams), *(["-R"] if reverse else []), "-C", self.congestion]
        command = [
            "iperf3",
            "-J",
            "-c",
            who.addresses[0],
            "-p",
            str(IPERF_PORT),
            "-t",
            f"{self.seconds:g}",
            "-O",
            "1",
            *options,
        ]
        result = measure(who.command(command), self.seconds)
        if "sum_received" not in result.get("end", {}):
            raise LabError(f"iperf3 behind {who.name}: {result.get('error', 'no result')}")
        return float(result["end"]["sum_received"]["bits_per_second"]) / 1e9

    def generator(self, who: Contestant, mode: str) -> dict[str, Any]:
        """What the load client prints."""
        bracket = [f"[{address}]" if ":" in address else address for address in who.addresses]
        targets = ",".join(f"{address}:{port}" for port in ECHO_PORTS for address in bracket)
        client = [sys.executable, str(LOAD / "client.py"), mode, targets, "--seconds", f"{self.seconds:g}"]
        return measure(who.command(client), self.seconds)

    def keep(self, who: Contestant, key: str, value: float) -> None:
        """Remember one sample."""
        self.samples.setdefault(who.name, {}).setdefault(key, []).append(value)

    def attempt(self, who: Contestant, key: str, sample: Callable[[], dict[str, float]]) -> None:
        """Keep what `sample` gives, by measurement. A second failure in a row is counted, and ends the bench unless a peer's."""
        for again in (True, False):
            try:
                found = sample()
            except LabError as error:
                say(f"{who.name}, {key}: {error}{'; once more' if again else ''}")
                if not again and who.name not in PEERS:
                    raise
                continue
            for name, value in found.items():
                self.keep(who, name, value)
            return
        self.gave_up[who.name] = self.gave_up.get(who.name, 0) + 1

    def round(self, everyone: list[Contestant]) -> None:
        """Every measurement of every contestant, the measurement outermost."""
        for streams in STREAMS:
            for direction, reverse in (("forward", False), ("reverse", True)):
                key = f"{direction}_{streams}"
                for who in everyone:
                    if who.name != "loopback":
                        self.attempt(who, key, lambda: {key: self.throughput(who, streams, reverse)})  # noqa: B023 - called at once
        for who in everyone:
            self.attempt(who, "connections", lambda: self.connections(who))  # noqa: B023
        for who in everyone:
            self.attempt(who, "rtt", lambda: self.round_trips(who))  # noqa: B023
        for who in everyone:
            self.attempt(who, "messages", lambda: {"messages": self.generator(who, "messages")["per_s"]})  # noqa: B023

    def connections(self, who: Contestant) -> dict[str, float]:
        """Connections a second; those that failed are counted."""
        result = self.generator(who, "connections")
        self.failed[who.name] = self.failed.get(who.name, 0) + result["failed"]
        return {"connections": result["per_s"]}

    def round_trips(self, who: Contestant) -> dict[str, float]:
        """Microseconds."""
        result = self.generator(who, "rtt")
        return {"rtt_p50": result["p50"], "rtt_p99": result["p99"]}

    def medians(self) -> dict[str, dict[str, float]]:
        """By contestant and measurement."""
        return {name: {key: median(values) for key, values in found.items()} for name, found in self.samples.items()}


def servers(node: Namespace, server: Namespace) -> None:
    """iperf3 and echo at the server, echo on the node's loopback; returns once they listen."""
    server.start("iperf3", "-s", "-p", str(IPERF_PORT))
    for namespace, ports in ((server, (IPERF_PORT, *ECHO_PORTS)), (node, ECHO_PORTS)):
        namespace.start(sys.executable, str(LOAD / "echo_server.py"), *map(str, ECHO_PORTS))

        def listening(namespace: Namespace = namespace, ports: tuple[int, ...] = ports) -> bool:
            shown = namespace.run("ss", "-Hltn")
            return all(f":{port} " in shown for port in ports)

        wait_for(f"servers in {namespace.name}", listening, 10)


def say(text: str) -> None:
    """Progress, on standard error so that --json stays clean."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def bench(rounds: int, seconds: float, without_falkirk: bool) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="falkirk-bench-") as directory:
        node, server = lab.namespace("node"), lab.namespace("server")
        net = f"198.18.{lab.number}"
        far = tuple(f"{net}.{host}" for host in (2, 3, 4, 5))
        interface, _ = lab.cable(
            node, server, [f"{net}.1/24"], [f"{net}.254/24", *(f"{address}/24" for address in far)]
        )
        # The default gateway is none of the server's measured addresses: pasta takes the gateway's for the host itself.
        node.run("ip", "route", "add", "default", "via", f"{net}.254")
        congestion = congestion_control([node, server])
        servers(node, server)
        everyone = [contestants.direct(node, far), contestants.loopback(node)]
        if not without_falkirk:
            say(f"starting a mesh with {RULES} rules and {ROUTES} routes")
            mesh = Mesh(lab, Path(directory), node)
            mesh.start({})
            mesh.apply(resources())
            everyone.append(
                Contestant("falkirk", lambda command: mesh.lower("laptop", command, congestion=congestion), far)
            )
        found = [contestants.pasta(node, far), contestants.slirp4netns(lab, node, far)]
        everyone += [peer for peer in found if peer is not None]
        run = Bench(congestion, seconds)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {', '.join(who.name for who in everyone)}")
            run.round(everyone)
        baseline = {
            "mtu": json.loads(node.run("ip", "-json", "link", "show", interface))[0]["mtu"],
            "offloads": offloads.read(node, interface),
            "congestion_control": congestion,
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
        }
        shape = {
            "rules": RULES,
            "routes": ROUTES,
            "framing": "vnet",
            "transport": "device",
            "rounds": rounds,
            "seconds": seconds,
        }
        return report(
            run.medians(), run.failed, run.gave_up, baseline, shape | {"took_s": round(time.monotonic() - started, 1)}
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lift"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--rounds", type=int, default=3, help="interleaved rounds, at least 3 for a result to be quoted"
    )
    parser.add_argument("--seconds", type=float, default=2, help="length of each measurement")
    parser.add_argument(
        "--peers-only", action="store_true", help="leave Falkirk out: what the machine and the peers give"
    )
    arguments = parser.parse_args()
    guard_signals()
    for tool in ("ip", "iperf3", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            say(f"{tool} is missing")
            return 2
    try:
        result = bench(arguments.rounds, arguments.seconds, arguments.peers_only)
    except LabError as error:
        say(str(error))
        return 1
    print(json.dumps(result, indent=2) if arguments.json else show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
