"""`tools/bench pps`: small packets through one worker, each by itself from the tunnel over the NAT into the device's kernel.

`tools/load/packets.py` is the producer: 64 flows, pure ACKs of 64 bytes, 40 to a datagram and, to compare, one. The rate is of the wall clock with
the worker's own processor time beside it: on a machine that is shared the second is what the worker can do.

Limit: a node of one worker, whatever the machine has.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tools.bench_cpu import Meter
from tools.bench_stage import LOAD, Samples, Stage, attempt, measure, medians, ratio, say, shape, stage
from tools.mesh import Mesh
from tools.netlab import LabError

RULES = 1000
ROUTES = 10_000
FLOWS = 64
PACKED = (40, 1)


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    samples: Samples = {}
    with stage() as place:
        mesh = place.mesh(RULES, ROUTES)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for packed in PACKED:
                attempt(samples, str(packed), lambda: _sample(place, mesh, packed, seconds))  # noqa: B023 - called at once
        return report(medians(samples), place.baseline(), shape(RULES, ROUTES, rounds, seconds, started))


def _forwarded(mesh: Mesh) -> int:
    """Packets that all workers have forwarded."""
    return sum(int(worker.get("forwarded", 0)) for worker in mesh.ask_json("workers", "flow", "stats"))


def _sample(place: Stage, mesh: Mesh, packed: int, seconds: float) -> dict[str, float]:
    before = _forwarded(mesh)
    meter = Meter(mesh.pid)
    client = [sys.executable, str(LOAD / "packets.py"), str(mesh.run_dir / "tunnel.sock"), place.targets]
    result = measure([*client, "--flows", str(FLOWS), "--packed", str(packed), "--seconds", f"{seconds:g}"], seconds)
    used, _ = meter.used_us().get("flow.worker", (0, 0))
    forwarded = _forwarded(mesh) - before
    if forwarded < result["sent"]:
        raise LabError(f"of {result['sent']} packets only {forwarded} reached the device")
    return {"kpps": result["per_s"] / 1000, "kpps_cpu": result["sent"] * 1000 / max(used, 1)}


def report(
    found: dict[str, dict[str, float]], baseline: dict[str, Any], configuration: dict[str, Any]
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""

    def one(name: str) -> dict[str, Any]:
        of = found[name]
        return {
            "kpps_per_worker": round(of["kpps"], 1),
            "kpps_per_cpu_second": round(of["kpps_cpu"], 1),
        }

    many, single = (str(packed) for packed in PACKED)
    return {
        **one(many),
        "unpacked": one(single),
        "of_unpacked": ratio(found[many]["kpps"], found[single]["kpps"]),
        "baseline": baseline,
        "configuration": configuration | {"packet_bytes": 64, "flows": FLOWS, "packed": PACKED[0]},
    }


def show(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'packets a datagram':20}{'kpps':>8}{'kpps a CPU second':>19}"]
    for name, of in ((str(PACKED[0]), result), (str(PACKED[1]), result["unpacked"])):
        lines.append(f"{name:20}{of['kpps_per_worker']:>8}{of['kpps_per_cpu_second']:>19}")
    return "\n".join(lines)
