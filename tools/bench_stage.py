"""Where the bench measures: a node's namespace and a server's, one veth between them, a mesh in the node's.

The congestion control is the same for every socket that crosses the veth, whoever made it: it is an attribute of the routes there, since
where /proc/sys can't be written nothing else reaches the sockets that peers make themselves (pasta's ran the machine's BBR, whose pacing a short
run catches at any point, while everyone else's ran what was asked for). Servers and iperf3's clients are told by option as well.

A configuration measured is the default one with N rules and M routes, of which the last rule and the shortest prefix decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from falkirk.cli.checks import optimised
from tools import contestants, go_peers, offloads
from tools.contestants import Contestant
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, Namespace, wait_for

IPERF_PORT = 5201
ECHO_PORTS = (7001, 7002, 7003, 7004)
LOAD = Path(__file__).resolve().parent / "load"
CONGESTION = ("cubic", "reno")
APPLIED = 20_000
"""Resources in one transaction."""
PEERS = ("pasta", "slirp4netns", "sing-box-system", "sing-box-gvisor", "tun2socks")
"""By the names of `contestants`."""
Samples = dict[str, dict[str, list[float]]]
"""By contestant and measurement."""


def say(text: str) -> None:
    """Progress, on standard error so that --json stays clean."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


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


def python() -> dict[str, Any]:
    """The interpreter that runs the mesh and the generators."""
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "optimised": optimised(sysconfig.get_config_vars(), sys.base_prefix),
        "prefix": sys.base_prefix,
    }


def processor() -> str:
    """The processor's model."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def resources(rules: int, routes: int) -> Iterator[dict[str, Any]]:
    """A tenant whose traffic is allowed by its last rule and routed by its shortest prefix, after all others."""
    yield resource("Tenant", "acme")
    yield resource("User", "alice", "acme", groups=["staff"])
    yield resource("Device", "laptop", "acme", user="alice")
    yield resource("Route", "all4", "acme", prefix="0.0.0.0/0", target={"internet": {}})
    yield resource("Route", "all6", "acme", prefix="::/0", target={"internet": {}})
    for number in range(routes - 2):
        # 10.0.0.0/8 in /27s, then 172.16.0.0/12 in /28s: none of them the server's.
        at = (10 << 24) + (number << 5) if number < 1 << 19 else (172 << 24) + (16 << 16) + ((number - (1 << 19)) << 4)
        text = ".".join(str(at >> shift & 255) for shift in (24, 16, 8, 0))
        prefix = f"{text}/{27 if number < 1 << 19 else 28}"
        yield resource("Route", f"site-{number}", "acme", prefix=prefix, target={"internet": {}})
    for group in range(rules // 100):
        some = [unrelated(group * 100 + number) for number in range(100)]
        if group == rules // 100 - 1:
            some[-1] = rule("staff", '"staff" in identity.groups && net.protocol in ["tcp", "udp"]', "allow")
        yield resource("Policy", f"policy-{group}", "acme", priority=group, rules=some)


def unrelated(number: int) -> dict[str, str]:
    """A rule such as people write, which doesn't match here."""
    network = f'net.dst.inCidr("172.{16 + (number >> 8 & 15)}.{number & 255}.0/24")'
    kinds = (
        (f"{network} && net.port == 443", "allow"),
        (f'{network} && "team-{number}" in identity.groups', "allow"),
        (f"net.port == {20000 + number}", "deny"),
        (f'device.name == "printer-{number}"', "deny"),
    )
    when, action = kinds[number % len(kinds)]
    return rule(f"rule-{number}", when, action)


class Stage:
    """The two namespaces, their servers running."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.node, self.server = lab.namespace("node"), lab.namespace("server")
        net = f"198.18.{lab.number}"
        self.addresses = tuple(f"{net}.{host}" for host in (2, 3, 4, 5))
        """The server's."""
        ends = lab.cable(
            self.node, self.server, [f"{net}.1/24"], [f"{net}.254/24", *(f"{one}/24" for one in self.addresses)]
        )
        self.interface = ends[0]
        # The default gateway is none of the server's measured addresses: pasta takes the gateway's for the host itself.
        self.node.run("ip", "route", "add", "default", "via", f"{net}.254")
        self.congestion = self._congestion(f"{net}.0/24", ends)
        self._servers()

    def _congestion(self, network: str, ends: tuple[str, str]) -> str:
        """Bind a congestion control to the veth's routes at both ends; which one it is."""
        for name in CONGESTION:
            try:
                for namespace, interface in zip((self.node, self.server), ends, strict=True):
                    namespace.run("ip", "route", "replace", network, "dev", interface, "congctl", name)
            except LabError:
                continue
            return name
        raise LabError("no congestion control could be bound to the routes of the veth")

    def _servers(self) -> None:
        """iperf3 and echo at the server, echo on the node's loopback."""
        # Bound, since a UDP server answers from the interface's first address otherwise.
        self.server.start("iperf3", "-s", "-p", str(IPERF_PORT), "-B", self.addresses[0])
        for namespace, ports in ((self.server, (IPERF_PORT, *ECHO_PORTS)), (self.node, ECHO_PORTS)):
            namespace.start(sys.executable, str(LOAD / "echo_server.py"), *map(str, ECHO_PORTS))

            def listening(namespace: Namespace = namespace, ports: tuple[int, ...] = ports) -> bool:
                shown = namespace.run("ss", "-Hltn")
                return all(f":{port} " in shown for port in ports)

            wait_for(f"servers in {namespace.name}", listening, 10)

    @property
    def targets(self) -> str:
        """Every echo server, for the load client."""
        return ",".join(f"{address}:{port}" for port in ECHO_PORTS for address in self.addresses)

    def mesh(self, rules: int, routes: int, settings: Mapping[str, Any] | None = None) -> Mesh:
        """`falkirk up` in the node's namespace, with its resources applied."""
        said = f" and {json.dumps(dict(settings))}" if settings else ""
        say(f"starting a mesh with {rules} rules and {routes} routes{said}")
        directory = Path(tempfile.mkdtemp(prefix="mesh-", dir=self.directory))
        mesh = Mesh(self.lab, directory, self.node)
        mesh.start(settings or {})
        documents = list(resources(rules, routes))
        for at in range(0, len(documents), APPLIED):
            mesh.apply(documents[at : at + APPLIED])
        return mesh

    def falkirk(self, mesh: Mesh, name: str = "falkirk", **options: Any) -> Contestant:
        """Commands behind `falkirk lower`."""
        return Contestant(
            name,
            lambda command: mesh.lower("laptop", command, congestion=self.congestion, **options),
            self.addresses,
        )

    def peers(self) -> list[Contestant]:
        """Those that are here, or can be built."""
        found = [
            contestants.pasta(self.node, self.addresses),
            contestants.slirp4netns(self.lab, self.node, self.addresses),
        ]
        if (path := go_peers.program(go_peers.SING_BOX, say)) is not None:
            found += [
                contestants.sing_box(self.lab, self.node, self.addresses, path, stack) for stack in ("system", "gvisor")
            ]
        if (path := go_peers.program(go_peers.TUN2SOCKS, say)) is not None:
            found.append(contestants.tun2socks(self.lab, self.node, self.addresses, path))
        return [peer for peer in found if peer is not None]

    def baseline(self) -> dict[str, Any]:
        """What the figures stand on."""
        link = json.loads(self.node.run("ip", "-json", "link", "show", self.interface))
        return {
            "mtu": link[0]["mtu"],
            "offloads": offloads.read(self.node, self.interface),
            "congestion_control": self.congestion,
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "cpu_model": processor(),
            "load_average": os.getloadavg()[0],
            "python": python(),
        }

    def throughput(self, who: Contestant, seconds: float, *options: str) -> dict[str, Any]:
        """iperf3's `end` object. It takes whole seconds, and 0 for no end."""
        length = str(max(1, round(seconds)))
        command = ["iperf3", "-J", "-c", who.addresses[0], "-p", str(IPERF_PORT), "-t", length, *options]
        result = measure(who.command(command), seconds)
        end: dict[str, Any] = result.get("end", {})
        if "error" in result or not end:
            raise LabError(f"iperf3 behind {who.name}: {result.get('error', 'no result')}")
        return end


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """A stage, taken down at the end."""
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="falkirk-bench-") as directory:
        yield Stage(lab, Path(directory))


def attempt(samples: Samples, who: str, sample: Any, *, may_fail: bool = False) -> bool:
    """Keep what `sample` gives, by measurement. A failure is tried once more; the second one ends the bench unless it may fail."""
    for again in (True, False):
        try:
            found: Mapping[str, float] = sample()
        except LabError as error:
            say(f"{who}: {error}{'; once more' if again else ''}")
            if not again and not may_fail:
                raise
            continue
        for name, value in found.items():
            samples.setdefault(who, {}).setdefault(name, []).append(value)
        return True
    return False


def medians(samples: Samples) -> dict[str, dict[str, float]]:
    """By contestant and measurement."""
    return {name: {key: median(values) for key, values in found.items()} for name, found in samples.items()}


def ratio(value: float | None, of: float | None) -> float | None:
    """To three digits; None where either is missing."""
    return round(value / of, 3) if value is not None and of else None


def shape(rules: int, routes: int, rounds: int, seconds: float, started: float) -> dict[str, Any]:
    """How it was measured."""
    return {
        "rules": rules,
        "routes": routes,
        "rounds": rounds,
        "seconds": seconds,
        "took_s": round(time.monotonic() - started, 1),
    }
