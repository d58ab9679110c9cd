"""`tools/bench wireguard`: the node as a WireGuard server, against wireguard-go as one, with the same client.

The client is Debian's wireguard-go in a namespace of its own, one for each server, all cabled to the node. Behind Falkirk its TCP is lifted to the
server; behind wireguard-go the node's kernel forwards it there. Gbit/s of payload up, down and both ways at once, and the same for a second of the server's
processor time: all processes of the mesh, or wireguard-go's.

What a transfer keeps under floods is `tools/bench_flood.py`'s part, with the same client.

Handshakes are of the engine alone (initiations of 500 keys answered in this process); small packets are 64-byte UDP from a client of our own, a second of
the on-ramp worker's processor time; idle devices are real ones, each with a session of its own, in all processes of the mesh.

Limit: client, servers and iperf3 share the machine, so what the client takes is missing at the server; hence figures per processor second.
"""

from __future__ import annotations

import base64
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from falkirk.wireguard import primitives
from falkirk.wireguard.guard import Guard
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from tools import bench_flood, go_peers
from tools.bench_cpu import Meter, memory, used_us
from tools.bench_stage import IPERF_PORT, LOAD, Samples, Stage, attempt, measure, medians, ratio, say, shape, stage
from tools.mesh import Mesh, resource
from tools.netlab import LabError, Namespace, wait_for
from tools.wg_device import StockDevice, key_pair, secret_file, start

RULES, ROUTES = 1000, 10_000
PORT = 51820
SINK_PORT = 51830
IDLE = 10_000
HANDSHAKES = 500
DIRECTIONS: dict[str, list[str]] = {"up": [], "down": ["-R"], "both": ["--bidir"]}
KINDS = (
    "onramp",
    "onramp.worker",
    "flow",
    "flow.worker",
    "registry",
    "policy",
    "router",
    "router.worker",
    "upgrader",
    "upgrader.worker",
)
DEBIAN, NEWEST = "debian_wireguard_go", "newest_wireguard_go"
WIREGUARD_GO = go_peers.GoPeer("wireguard", "golang.zx2c4.com/wireguard", "latest")


class Server:
    """A server and its client. `pid`: of wireguard-go; `mesh` where it is Falkirk."""

    def __init__(self, name: str, client: Namespace, mesh: Mesh | None, pid: int) -> None:
        self.name, self.client, self.mesh, self.pid = name, client, mesh, pid

    def cpu(self) -> Any:
        """A function that gives the server's processor seconds from now on."""
        if self.mesh is not None:
            meter = Meter(self.mesh.pid)
            return lambda: sum(every for every, _ in meter.used_us().values()) / 1e6
        before = used_us(self.pid) or (0, 0)
        return lambda: ((used_us(self.pid) or before)[0] - before[0]) / 1e6


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    with stage() as place:
        mesh = place.mesh(RULES, ROUTES, {"onramp": {"wireguard": {"port": PORT}, "max_tunnels": IDLE + FIRST + 100}})
        servers = [_falkirk(place, mesh), _wireguard_go(place, DEBIAN, "wireguard-go", 1)]
        newest = go_peers.program(WIREGUARD_GO, say)
        if newest is not None:
            servers.append(_wireguard_go(place, NEWEST, str(newest), 2))
        samples: dict[str, dict[str, list[float]]] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {', '.join(server.name for server in servers)}")
            for direction in DIRECTIONS:
                for server in servers:
                    attempt(samples, server.name, lambda: _throughput(place, server, direction, seconds))  # noqa: B023 - called at once
        found = medians(samples)
        floods = _floods(place, mesh, servers[0], rounds, seconds)
        small = _small_packets(place, mesh, seconds)
        idle = _idle(place, mesh)
        return report(
            found, floods, _handshakes(), small, idle, place.baseline(), shape(RULES, ROUTES, rounds, seconds, started)
        )


def _cabled(place: Stage, number: int, name: str) -> StockDevice:
    device = StockDevice(place.lab, name, place.directory)
    place.lab.cable(place.node, device.namespace, [f"198.19.{number}.1/24"], [f"198.19.{number}.2/24"])
    return device


def _status(mesh: Mesh) -> Any:
    """What the on-ramp says of its WireGuard side."""
    import grpc

    from falkirk.api.onramp.v1 import onramp_service_pb2, onramp_service_pb2_grpc

    with grpc.insecure_channel(f"unix:{mesh.run_dir / 'read' / 'onramp.sock'}") as channel:
        stats = onramp_service_pb2_grpc.OnrampServiceStub(channel).Stats(onramp_service_pb2.StatsRequest(), timeout=5)
    return stats.wireguard


def key_of(mesh: Mesh) -> str:
    """The node's public key."""
    return str(_status(mesh).public_key)


def _falkirk(place: Stage, mesh: Mesh) -> Server:
    device = _cabled(place, 0, "roamer")
    address = "100.96.200.1"
    mesh.apply(
        [resource("Device", "roamer", "acme", user="alice", publicKey=device.public_key, addresses=[address])], "roamer"
    )
    device.join(key_of(mesh), f"198.19.0.1:{PORT}", [address], allowed=["0.0.0.0/0"])
    # No rule allows the echo, which is what the handshake begins with.
    wait_for("a session with Falkirk", lambda: device.ping(place.addresses[0], seconds=1) or device.handshake() > 0, 20)
    return Server("falkirk", device.namespace, mesh, 0)


def _wireguard_go(place: Stage, name: str, program: str, number: int) -> Server:
    """wireguard-go as the server in the node's namespace, which forwards."""
    client = _cabled(place, number, f"stock{number}")
    private, public = key_pair()
    interface, inner = f"fks{os.getpid() % 100_000}{number}", f"10.66.{number}"
    process = start(place.lab, place.node, interface, program)
    key = secret_file(place.directory / f"{interface}.key", private)
    run = place.node.run
    run(
        "wg",
        "set",
        interface,
        "listen-port",
        str(PORT + number),
        "private-key",
        str(key),
        "peer",
        client.public_key,
        "allowed-ips",
        f"{inner}.2/32",
    )
    run("ip", "address", "add", f"{inner}.1/24", "dev", interface)
    run("ip", "link", "set", interface, "mtu", "1420", "up")
    if not place.node.sysctl("net.ipv4.ip_forward", "1"):
        raise LabError("the node's namespace can't be told to forward: /proc/sys is read-only")
    node = place.addresses[0].rpartition(".")[0] + ".1"
    place.server.run("ip", "route", "add", f"{inner}.0/24", "via", node)
    client.join(public, f"198.19.{number}.1:{PORT + number}", [f"{inner}.2"], allowed=["0.0.0.0/0"])
    wait_for(f"the first echo through {name}", lambda: client.ping(place.addresses[0]), 20)
    return Server(name, client.namespace, None, process.pid)


def _throughput(place: Stage, server: Server, direction: str, seconds: float) -> dict[str, float]:
    """Gbit/s of payload that arrived, and for a second of the server's processor time."""
    options = [*DIRECTIONS[direction], "-C", place.congestion]
    command = [
        "iperf3",
        "-J",
        "-c",
        place.addresses[0],
        "-p",
        str(IPERF_PORT),
        "-t",
        str(max(1, round(seconds))),
        *options,
    ]
    deadline = time.monotonic() + 10
    while True:
        spent = server.cpu()
        result = measure(server.client.command(*command), seconds)
        end = result.get("end", {})
        parts = [end[key] for key in ("sum_received", "sum_received_bidir_reverse") if key in end]
        if parts and "error" not in result:
            break
        # iperf3's server takes one test at a time, and may not be done with the one before.
        if time.monotonic() > deadline:
            raise LabError(f"iperf3 behind {server.name}: {result.get('error', 'no result')}")
        time.sleep(0.2)
    gigabits = sum(part["bytes"] for part in parts) * 8 / 1e9
    rate = sum(part["bits_per_second"] for part in parts) / 1e9
    return {direction: rate, f"{direction}_cpu": gigabits / max(spent(), 1e-3)}


def _floods(place: Stage, mesh: Mesh, server: Server, rounds: int, seconds: float) -> Samples:
    """A transfer of the stock client with and without floods, interleaved."""
    namespace = place.lab.namespace("flood")
    near, far = "198.19.5.1", [f"198.19.5.{host}" for host in range(2, 2 + bench_flood.SOURCES)]
    place.lab.cable(place.node, namespace, [f"{near}/24"], [f"{one}/24" for one in far])
    bench_flood.sink(place.node, near, SINK_PORT, place.directory / "sink.log")
    private, public = key_pair()
    mesh.apply([resource("Device", "flooding", "acme", user="alice", publicKey=public)], "flooding")
    device, log = secret_file(place.directory / "flooding.key", private), place.directory / "flood.log"
    flooder = bench_flood.Flooder(namespace, far, near, key_of(mesh), PORT)

    def transfer(direction: str) -> dict[str, float]:
        meter = Meter(mesh.pid)
        found = _throughput(place, server, direction, seconds)
        worker = meter.used_us().get("onramp.worker", (0, 0))[0] / 1e6
        return {"gbit_s": found[direction], "per_cpu_second": found[f"{direction}_cpu"], "worker_cpu_s": worker}

    def dropped() -> dict[str, int]:
        return {one.name: one.value for one in _status(mesh).dropped}

    samples: Samples = {}
    for number in range(rounds):
        say(f"floods, round {number + 1} of {rounds}")
        for kind in bench_flood.KINDS:

            def flood(kind: str = kind) -> subprocess.Popen[bytes]:
                return flooder.start(kind, SINK_PORT, device, log)

            one = None if kind == "quiet" else flood
            attempt(samples, kind, lambda: bench_flood.sample(transfer, one, dropped, log))  # noqa: B023 - called at once
    return samples


def _handshakes() -> dict[str, float]:
    """Initiations that the engine answers in a second of processor time: first ones of their keys, and those that renew a session."""
    server = Node(os.urandom(32), rng=os.urandom, guard=Guard(1e9))
    clients = []
    for _ in range(HANDSHAKES):
        client = Node(os.urandom(32), rng=os.urandom)
        server.add_peer(client.public_key)
        clients.append((client, client.add_peer(server.public_key, endpoint=("192.0.2.1", PORT))))
    rates = {}
    for name, now in (("first", 0.0), ("renewed", 10.0)):
        initiations = [client.initiate(peer, now, time.time_ns()) for client, peer in clients]
        arrivals = Arrivals()
        began = time.process_time()
        for number, (datagram,) in enumerate(initiations):
            server.receive(datagram, ("192.0.2.2", 1024 + number), now + 1, 1, arrivals)
        rates[name] = HANDSHAKES / (time.process_time() - began)
        if len(arrivals.datagrams) != HANDSHAKES:
            raise LabError(f"of {HANDSHAKES} initiations {len(arrivals.datagrams)} were answered")
    return rates


def _small_packets(place: Stage, mesh: Mesh, seconds: float) -> dict[str, float]:
    """Thousands of 64-byte packets a second of the on-ramp worker's processor time, and of the wall clock."""
    device = _cabled(place, 3, "small")
    address, port = "100.96.200.2", 9999
    mesh.apply(
        [resource("Device", "small", "acme", user="alice", publicKey=device.public_key, addresses=[address])], "small"
    )
    sink = f"import socket,time; s=socket.socket(2,2); s.bind(({place.addresses[0]!r},{port})); time.sleep(600)"
    place.server.start(sys.executable, "-c", sink)
    key = secret_file(place.directory / "small.key", device.private_key)
    meter = Meter(mesh.pid)
    load = [sys.executable, str(LOAD / "wireguard_packets.py"), str(key), key_of(mesh), f"198.19.3.1:{PORT}", address]
    load += [f"{place.addresses[0]}:{port}", "--seconds", f"{seconds:g}"]
    before = _received(mesh)
    result = measure(device.namespace.command(*load), seconds)
    spent = meter.used_us().get("onramp.worker", (0, 0))[0] / 1e6
    arrived = _received(mesh) - before
    return {"kpps_per_cpu_second": arrived / 1000 / max(spent, 1e-3), "kpps": arrived / 1000 / result["seconds"]}


def _received(mesh: Mesh) -> int:
    """Packets that the flow tracker was given."""
    return sum(int(worker.get("received", 0)) for worker in mesh.ask_json("workers", "flow", "stats"))


def _idle(place: Stage, mesh: Mesh) -> dict[str, Any]:
    """Bytes of an idle device with a session, by kind of process, and how long it took until all were here; then processor seconds of a minute in which
    nothing comes of them but a keepalive every 25 s, as routers between make it necessary.

    Some come before, which take what loading the configuration has left free in each process: the others are counted whole."""
    say(f"{IDLE} idle devices")
    client = place.lab.namespace("crowd")
    place.lab.cable(place.node, client, ["198.19.4.1/24"], ["198.19.4.2/24"])
    _crowd(place, mesh, client, "first", FIRST)
    time.sleep(REST_S)
    before = {kind: memory(mesh.pid, kind) for kind in KINDS}
    enrolled, joined = _crowd(place, mesh, client, "idle", IDLE)
    time.sleep(REST_S)
    grown = {kind: (memory(mesh.pid, kind) - before[kind]) / IDLE for kind in KINDS}
    meter = Meter(mesh.pid)
    time.sleep(60)
    used = {kind: every / 1e6 for kind, (every, _) in meter.used_us().items()}
    here = _status(mesh).devices
    if here < FIRST + IDLE:
        raise LabError(f"of {FIRST + IDLE} idle devices {here} are here")
    return {"bytes": grown, "cpu_s": used, "enrolled_s": enrolled, "joined_s": joined}


def _crowd(place: Stage, mesh: Mesh, client: Namespace, name: str, count: int) -> tuple[float, float]:
    """So many devices, enrolled by `falkirk apply`, `APPLIED` in a transaction, which then join one after another, 32 at a time; how many seconds each took."""
    keys = [os.urandom(32) for _ in range(count)]
    crowd = secret_file(place.directory / f"{name}.keys", b"".join(keys))
    public = [base64.b64encode(primitives.public_key(key)).decode() for key in keys]
    devices = [resource("Device", f"{name}-{number}", "acme", publicKey=key) for number, key in enumerate(public)]
    began = time.monotonic()
    for at in range(0, count, APPLIED):
        mesh.apply(devices[at : at + APPLIED], f"{name}-{at}")
    enrolled = time.monotonic()
    log = place.directory / f"{name}.log"
    with log.open("wb") as output:
        command = [sys.executable, str(LOAD / "wireguard_crowd.py"), str(crowd), key_of(mesh), f"198.19.4.1:{PORT}"]
        client.start(*command, "--keepalive", str(KEEPALIVE_S), log=output)
    wait_for(f"{count} sessions", lambda: "joined" in log.read_text(errors="replace"), JOIN_S)
    return enrolled - began, time.monotonic() - enrolled


FIRST = 500
"""Devices that aren't counted."""
REST_S = 8.0
"""Sessions that carry nothing drop their ciphers after five seconds."""
KEEPALIVE_S = 25
APPLIED = 2500
"""Devices in one transaction."""
JOIN_S = 240.0


def report(
    found: dict[str, dict[str, float]],
    floods: Samples,
    handshakes: dict[str, float],
    small: dict[str, float],
    idle: dict[str, Any],
    baseline: dict[str, Any],
    configuration: dict[str, Any],
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""
    falkirk = found["falkirk"]

    def against(name: str) -> dict[str, Any] | None:
        if name not in found:
            return None
        other = found[name]
        ratios = {direction: ratio(falkirk[direction], other[direction]) for direction in DIRECTIONS}
        apiece = {direction: ratio(falkirk[f"{direction}_cpu"], other[f"{direction}_cpu"]) for direction in DIRECTIONS}
        return {
            "throughput": round(statistics.mean(value or 0 for value in ratios.values()), 3),
            "per_cpu_second": round(statistics.mean(value or 0 for value in apiece.values()), 3),
            "throughput_by_direction": ratios,
            "per_cpu_second_by_direction": apiece,
        }

    return {
        f"of_{DEBIAN}": against(DEBIAN),
        f"of_{NEWEST}": against(NEWEST),
        "handshakes_per_core": round(handshakes["renewed"]),
        "first_handshakes_per_core": round(handshakes["first"]),
        "bytes_per_idle_device": round(sum(idle["bytes"].values())),
        "bytes_by_process": {kind: round(value) for kind, value in idle["bytes"].items() if round(value)},
        "idle_cpu": {
            "seconds_a_minute": round(sum(idle["cpu_s"].values()), 2),
            "by_process": {kind: round(value, 2) for kind, value in idle["cpu_s"].items() if value >= 0.01},
            "keepalive_s": KEEPALIVE_S,
        },
        "idle_enrolled_s": round(idle["enrolled_s"], 1),
        "idle_joined_s": round(idle["joined_s"], 1),
        "flood": bench_flood.report(floods),
        "pps": round(small["kpps"] * 1000),
        "small_packets": {key: round(value, 1) for key, value in small.items()},
        "gbit_s": {name: {key: round(value, 3) for key, value in of.items()} for name, of in found.items()},
        "baseline": baseline,
        "configuration": configuration | {"idle_devices": IDLE, "mtu": 1420},
    }


def show(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'Gbit/s (a CPU second)':24}" + "".join(f"{direction:>18}" for direction in DIRECTIONS)]
    for name, of in result["gbit_s"].items():
        cells = "".join(f"{of[one]:>9} ({of[f'{one}_cpu']:>6})" for one in DIRECTIONS)
        lines.append(f"{name:24}{cells}")
    for name in (DEBIAN, NEWEST):
        of = result[f"of_{name}"]
        if of is not None:
            lines.append(f"falkirk / {name}: {of['throughput']} in throughput, {of['per_cpu_second']} a CPU second")
    lines.append(
        f"handshakes a CPU second: {result['handshakes_per_core']:,}; first ones of a key {result['first_handshakes_per_core']:,}"
    )
    lines.append(
        f"small packets, thousands a CPU second of the on-ramp worker: {result['small_packets']['kpps_per_cpu_second']}"
    )
    lines += ["", *bench_flood.show(result["flood"]), ""]
    lines.append(f"an idle device: {result['bytes_per_idle_device']:,} bytes ({result['bytes_by_process']})")
    cpu = result["idle_cpu"]
    lines.append(
        f"{result['configuration']['idle_devices']:,} of them: enrolled in {result['idle_enrolled_s']} s, joined in {result['idle_joined_s']} s; with keepalives "
        f"{cpu['seconds_a_minute']} processor seconds a minute ({cpu['by_process']})"
    )
    return "\n".join(lines)
