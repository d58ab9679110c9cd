"""`tools/bench raw1500`: plain packets of 1,500 bytes, as an office router or a VPN client brings them, against nothing batched.

    batched     `falkirk up` as it is; `falkirk lower --framing raw --mtu 1500`, which packs the packets that wait into one datagram
    unbatched   a second mesh of the same shape with `flow: {coalesce: false}`, and `falkirk lower ... --no-packed`: a datagram a packet, a write
                a packet

One connection of iperf3, both in turn in each round. Limit: the client makes and reads its packets one by one in either case.
"""

from __future__ import annotations

import time
from typing import Any

from tools.bench_cpu import Meter
from tools.bench_stage import Samples, Stage, attempt, medians, ratio, say, shape, stage
from tools.contestants import Contestant
from tools.mesh import Mesh

RULES = 1000
ROUTES = 10_000
MTU = 1500


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    samples: Samples = {}
    with stage() as place:
        pairs = []
        for name, settings, packed in (
            ("batched", {}, "--packed"),
            ("unbatched", {"flow": {"coalesce": False}}, "--no-packed"),
        ):
            mesh = place.mesh(RULES, ROUTES, settings)
            options = ["--mtu", str(MTU), packed]
            pairs.append((mesh, place.falkirk(mesh, name, framing="raw", options=options)))
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for direction in ("forward", "reverse"):
                for mesh, who in pairs:
                    attempt(samples, who.name, lambda: _sample(place, mesh, who, direction, seconds))  # noqa: B023 - called at once
        return report(medians(samples), place.baseline(), shape(RULES, ROUTES, rounds, seconds, started))


WORKERS = ("flow.worker", "upgrader.worker")


def _sample(place: Stage, mesh: Mesh, who: Contestant, direction: str, seconds: float) -> dict[str, float]:
    meter = Meter(mesh.pid)
    options = ["-R"] if direction == "reverse" else []
    end = place.throughput(who, seconds, "-C", place.congestion, *options)
    received = end["sum_received"]
    gigabits = received["bytes"] * 8 / 1e9
    used = meter.used_us()
    return {
        direction: received["bits_per_second"] / 1e9,
        f"{direction}_cpu": sum(used[kind][0] for kind in WORKERS if kind in used) / 1e6 / max(gigabits, 1e-9),
    }


def report(
    found: dict[str, dict[str, float]], baseline: dict[str, Any], configuration: dict[str, Any]
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""
    batched, unbatched = found["batched"], found["unbatched"]

    def side(direction: str) -> dict[str, Any]:
        cpu = f"{direction}_cpu"
        return {
            "gbit_s": round(batched[direction], 3),
            "of_unbatched": ratio(batched[direction], unbatched[direction]),
            "worker_cpu_s_per_gbit": round(batched[cpu], 4),
            "unbatched_worker_cpu_s_per_gbit": round(unbatched[cpu], 4),
            "worker_cpu_of_unbatched": ratio(batched[cpu], unbatched[cpu]),
        }

    return {
        **side("forward"),
        "reverse": side("reverse"),
        "unbatched_gbit_s": {key: round(unbatched[key], 3) for key in ("forward", "reverse")},
        "baseline": baseline,
        "configuration": configuration | {"mtu": MTU, "framing": "raw"},
    }


def show(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':10}{'Gbit/s':>8}{'unbatched':>11}{'ratio':>7}{'CPU s/Gbit':>12}{'unbatched':>11}"]
    for name, side in (("forward", result), ("reverse", result["reverse"])):
        lines.append(
            f"{name:10}{side['gbit_s']:>8}{result['unbatched_gbit_s'][name]:>11}{side['of_unbatched']:>7}"
            f"{side['worker_cpu_s_per_gbit']:>12}{side['unbatched_worker_cpu_s_per_gbit']:>11}"
        )
    return "\n".join(lines)
