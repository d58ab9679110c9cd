"""`tools/bench flows`: what a flow costs where there are 10,000 rules and 100,000 routes.

    setup_per_s           connections a second through the mesh: connect, a byte there and back, close; 16 at a time
    decision_us           one decision on a flow that nobody has decided on before, route and rule: the mesh's own replica files, loaded here by the
                          worker's code, asked for random destinations and ports
    bytes_per_idle_flow   what the flow and the upgrader worker grow by, in anonymous memory, for each of some thousand idle connections
    replacing             round trips on one connection while all 10,000 rules are replaced, and while they aren't

Limits: the kernel's memory for sockets isn't counted, nor the 256 bytes of a flow's place in the live table, which is a file.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from falkirk.decide.routes import RouteTable
from falkirk.decide.rules import RuleTable
from falkirk.flow.decision import decide
from falkirk.runtime import blob
from falkirk.wire.context import TunnelContext
from falkirk.wire.protocol import TCP
from tools.bench_cpu import Meter, memory
from tools.bench_stage import LOAD, Samples, Stage, attempt, measure, medians, say, shape, stage
from tools.contestants import Contestant
from tools.mesh import Mesh, resource, rule
from tools.netlab import LabError, wait_for

RULES = 10_000
ROUTES = 100_000
IDLE = 4000
DECISIONS = 3000
KINDS = ("flow.worker", "upgrader.worker")


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    samples: Samples = {}
    with stage() as place:
        mesh = place.mesh(RULES, ROUTES)
        who = place.falkirk(mesh)
        tables = _tables(mesh)
        say(f"{IDLE} idle connections")
        idle = _idle(place, mesh, who)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            attempt(samples, "setup", lambda: _setup(place, mesh, who, seconds))
            attempt(samples, "decision", lambda: _decisions(*tables, seed=number))  # noqa: B023 - called at once
            attempt(samples, "steady", lambda: _round_trips(place, who, seconds))
            attempt(samples, "replacing", lambda: _replacing(place, mesh, who, seconds, number))  # noqa: B023
        return report(medians(samples), idle, place.baseline(), shape(RULES, ROUTES, rounds, seconds, started))


def _tables(mesh: Mesh) -> tuple[RouteTable, RuleTable, TunnelContext]:
    """What the flow workers decide from, and the client's context."""

    def file(name: str) -> bytes:
        directory = mesh.data_dir / "flow" / "replica"
        return blob.load(next(path for path in directory.iterdir() if path.name.startswith(name))).data

    def loaded() -> bool:
        stats = mesh.ask_json("replicas", "flow", "stats")
        items = {one["name"]: int(one.get("items", 0)) for one in stats}
        return items.get("rules", 0) >= RULES and items.get("routes", 0) >= ROUTES

    wait_for("the replicas", loaded, 60)
    loading = RuleTable.load(file("rules"))
    for _ in loading:
        pass
    assert loading.table is not None
    routes = RouteTable.loaded(file("routes"))
    (tenant,) = loading.table.tenants()
    network = next(iter(mesh.ask_json("virtualNetworks", "vnet", "list", "--tenant", "acme")))["metadata"]["id"]
    context = TunnelContext(
        tenant, "acme", "", "laptop", network, "default", (bytes(4),), user="alice", groups=("staff",)
    )
    return routes, loading.table, context


def _idle(place: Stage, mesh: Mesh, who: Contestant) -> dict[str, float]:
    """Bytes for each connection, by process."""
    before = {kind: memory(mesh.pid, kind) for kind in KINDS}
    log = place.directory / "idle.log"
    client = [sys.executable, str(LOAD / "client.py"), "idle", place.targets]
    with log.open("wb") as file:
        process = place.lab.start(who.command([*client, "--parallel", str(IDLE), "--seconds", "3600"]), log=file)

    def opened() -> bool:
        if process.poll() is not None:
            raise LabError(f"idle connections: {log.read_text(errors='replace')[-500:]}")
        return f"open {IDLE}" in log.read_text(errors="replace")

    wait_for(f"{IDLE} connections", opened, 120)
    grown = {kind: (memory(mesh.pid, kind) - before[kind]) / IDLE for kind in KINDS}
    process.terminate()
    process.wait(30)
    return grown


def _setup(place: Stage, mesh: Mesh, who: Contestant, seconds: float) -> dict[str, float]:
    meter = Meter(mesh.pid)
    client = [sys.executable, str(LOAD / "client.py"), "connections", place.targets, "--seconds", f"{seconds:g}"]
    result = measure(who.command(client), seconds)
    return {"per_s": result["per_s"], "failed": result["failed"]} | meter.apiece(result["total"])


def _decisions(routes: RouteTable, rules: RuleTable, context: TunnelContext, seed: int) -> dict[str, float]:
    """Microseconds of processor time; destinations half of them within the routes' prefixes."""
    choose = random.Random(seed)
    questions = [
        (
            bytes([choose.choice((10, 172, 93, 198)), choose.randrange(256), choose.randrange(256), 1]),
            choose.randrange(1, 65536),
        )
        for _ in range(DECISIONS)
    ]
    times = []
    for destination, port in questions:
        start = time.thread_time_ns()
        decide(routes, rules, context, destination, port, TCP)
        times.append((time.thread_time_ns() - start) / 1000)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def _round_trips(place: Stage, who: Contestant, seconds: float) -> dict[str, float]:
    client = [sys.executable, str(LOAD / "client.py"), "rtt", place.targets, "--seconds", f"{seconds:g}"]
    result = measure(who.command(client), seconds)
    return {"p50": result["p50"], "p99": result["p99"]}


def _replacing(place: Stage, mesh: Mesh, who: Contestant, seconds: float, number: int) -> dict[str, float]:
    """The same while policies are written, all rules compiled, pushed and loaded."""
    client = [sys.executable, str(LOAD / "client.py"), "rtt", place.targets, "--seconds", f"{seconds + 2:g}"]
    log = Path(place.directory / f"rtt-{number}.json")
    with log.open("wb") as file:
        process = place.lab.start(who.command(client), log=file)
    rules = [rule(f"extra-{number}", f"net.port == {1 + number}", "deny")]
    mesh.apply([resource("Policy", f"extra-{number}", "acme", priority=200, rules=rules)], "extra")
    process.wait(seconds * 3 + 30)
    text = log.read_text(errors="replace")
    if process.returncode or "{" not in text:
        raise LabError(f"round trips while rules are replaced: {text[-500:]}")
    result = json.loads(text[text.index("{") :])
    return {"p50": result["p50"], "p99": result["p99"]}


def report(
    found: dict[str, dict[str, float]],
    idle: dict[str, float],
    baseline: dict[str, Any],
    configuration: dict[str, Any],
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""
    setup = found["setup"]
    return {
        "setup_per_s": round(setup["per_s"]),
        "setup_failed": round(setup["failed"]),
        "setup_cpu_us": {key[4:]: round(value, 1) for key, value in setup.items() if key.startswith("cpu:")},
        "decision_us": round(found["decision"]["p50"], 1),
        "decision_p99_us": round(found["decision"]["p99"], 1),
        "bytes_per_idle_flow": round(sum(idle.values())),
        "bytes_by_process": {kind: round(value) for kind, value in idle.items()},
        "rtt_us": {
            name: {key: round(value, 1) for key, value in found[name].items()} for name in ("steady", "replacing")
        },
        "baseline": baseline,
        "configuration": configuration | {"idle_flows": IDLE},
    }


def show(result: dict[str, Any]) -> str:
    """For people."""
    by_process = ", ".join(f"{kind} {value:,}" for kind, value in result["bytes_by_process"].items())
    spent = sorted(result["setup_cpu_us"].items(), key=lambda item: -item[1])
    rtt = result["rtt_us"]
    return "\n".join(
        [
            f"setup          {result['setup_per_s']:,} connections a second; processor time of one, us: "
            + ", ".join(f"{kind} {value:.0f}" for kind, value in spent if value >= 1),
            f"decision       {result['decision_us']} us, p99 {result['decision_p99_us']} us",
            f"idle flow      {result['bytes_per_idle_flow']:,} bytes ({by_process})",
            f"round trip     p50 {rtt['steady']['p50']} us, p99 {rtt['steady']['p99']} us; while 10,000 rules are replaced "
            f"p50 {rtt['replacing']['p50']} us, p99 {rtt['replacing']['p99']} us",
        ]
    )
