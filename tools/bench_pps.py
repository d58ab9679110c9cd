"""`tools/bench pps`: small packets through one worker, from a raw tunnel.

`tools/load/packets.py` is the producer: 64 flows, 40 packets of 64 bytes to a datagram and, to compare, one. Three kinds of traffic:

    udp_bursts   UDP, ten packets of one flow after another, as a sender of real-time media or QUIC makes them
    udp_mixed    UDP, each packet of another flow than the one before: the worst there is, nothing can leave together
    ack          pure ACKs of TCP, each of another flow: nothing may join them, so each one is written to the device by itself

UDP leaves by the sessions' sockets for a socket of the server (`tools/load/udp_sink.py`), and what counts is what the server's kernel had for it. ACKs end
in the device's kernel, and what counts is what the worker wrote to the device. The rate is of the wall clock with the worker's own processor time
beside it, the kernel's part included: on a machine that is shared the second is what the worker can do.

Limits: a node of one worker, whatever the machine has. The server's kernel works on the worker's account, as over a veth it does: it takes
the trains apart that a network card would have sent as packets.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tools.bench_cpu import Meter
from tools.bench_stage import LOAD, Samples, Stage, attempt, measure, medians, ratio, say, shape, stage
from tools.mesh import Mesh
from tools.netlab import LabError, stop, wait_for

RULES = 1000
ROUTES = 10_000
FLOWS = 64
PACKED = (40, 1)
MOST_LOST = 0.01
"""Share of the packets that may be missing at the end: what a queue on the way didn't take."""


class Kind(NamedTuple):
    """A kind of traffic: the protocol, and how many packets of a flow follow each other."""

    protocol: str
    run: int


KINDS = {"udp_bursts": Kind("udp", 10), "udp_mixed": Kind("udp", 1), "ack": Kind("ack", 1)}


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    samples: Samples = {}
    with stage() as place:
        mesh = place.mesh(RULES, ROUTES)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in KINDS:
                for packed in PACKED:
                    attempt(samples, f"{name}:{packed}", lambda: _sample(place, mesh, KINDS[name], packed, seconds))  # noqa: B023 - called at once
        return report(medians(samples), place.baseline(), shape(RULES, ROUTES, rounds, seconds, started))


def _sample(place: Stage, mesh: Mesh, kind: Kind, packed: int, seconds: float) -> dict[str, float]:
    if kind.protocol == "ack":
        return _load(mesh, kind, packed, seconds, place.targets, lambda: _forwarded(mesh))
    log = place.directory / "sink.log"
    with log.open("wb") as output:
        command = [sys.executable, str(LOAD / "udp_sink.py"), place.addresses[0], "--flows", str(FLOWS)]
        sink = place.server.start(*command, log=output)
    try:
        wait_for("a sink", lambda: log.read_text().endswith("\n"), 10)
        target = f"{place.addresses[0]}:{int(log.read_text())}"
        return _load(mesh, kind, packed, seconds, target, lambda: _delivered(place))
    finally:
        stop(sink)


def _load(
    mesh: Mesh, kind: Kind, packed: int, seconds: float, targets: str, arrived: Callable[[], int]
) -> dict[str, float]:
    before = arrived()
    meter = Meter(mesh.pid)
    client = [sys.executable, str(LOAD / "packets.py"), str(mesh.run_dir / "tunnel.sock"), targets]
    client += ["--kind", kind.protocol, "--run", str(kind.run), "--flows", str(FLOWS), "--packed", str(packed)]
    result = measure([*client, "--seconds", f"{seconds:g}"], seconds)
    used, kernel = meter.used_us().get("flow.worker", (0, 0))
    count = min(arrived() - before, result["sent"])
    if count < result["sent"] * (1 - MOST_LOST):
        raise LabError(f"of {result['sent']} packets only {count} arrived")
    return {
        "kpps": count / 1000 / result["seconds"],
        "kpps_cpu": count * 1000 / max(used, 1),
        "kernel": kernel / max(used, 1),
    }


def _forwarded(mesh: Mesh) -> int:
    """Packets that all workers have forwarded."""
    return sum(int(worker.get("forwarded", 0)) for worker in mesh.ask_json("workers", "flow", "stats"))


def _delivered(place: Stage) -> int:
    """Datagrams that the server's kernel had for a socket, whether or not there was room in it."""
    names, values = (
        line.split()[1:] for line in place.server.run("cat", "/proc/net/snmp").splitlines() if line.startswith("Udp:")
    )
    found = dict(zip(names, map(int, values), strict=True))
    return found["InDatagrams"] + found["RcvbufErrors"]


def report(
    found: dict[str, dict[str, float]], baseline: dict[str, Any], configuration: dict[str, Any]
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""

    def one(of: dict[str, float]) -> dict[str, Any]:
        return {
            "kpps_per_worker": round(of["kpps"], 1),
            "kpps_per_cpu_second": round(of["kpps_cpu"], 1),
            "kernel": round(of["kernel"], 2),
        }

    def kind(name: str) -> dict[str, Any]:
        many, single = (found[f"{name}:{packed}"] for packed in PACKED)
        return {**one(many), "unpacked": one(single), "of_unpacked": ratio(many["kpps"], single["kpps"])}

    kinds = {name: kind(name) for name in KINDS}
    return {
        "kpps_per_worker": kinds[HEADLINE]["kpps_per_worker"],
        "headline": HEADLINE,
        **kinds,
        "baseline": baseline,
        "configuration": configuration | {"packet_bytes": 64, "flows": FLOWS, "packed": PACKED[0]},
    }


HEADLINE = "udp_mixed"
"""What `kpps_per_worker` by itself is of: the kind that the target was measured with, and its worst order."""


def show(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':14}{'packets a datagram':>20}{'kpps':>8}{'kpps a CPU second':>19}{'kernel':>8}"]
    for name in KINDS:
        for packed, of in ((PACKED[0], result[name]), (PACKED[1], result[name]["unpacked"])):
            cells = f"{of['kpps_per_worker']:>8}{of['kpps_per_cpu_second']:>19}{of['kernel']:>8.0%}"
            lines.append(f"{name:14}{packed:>20}{cells}")
    return "\n".join(lines)
