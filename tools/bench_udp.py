"""`tools/bench udp`: datagrams of 1,400 bytes, as fast as they go, from a client behind each contestant to the server.

iperf3 -u without a rate; what counts is what arrived. Everyone in turn in each round. Limits: iperf3's own two processes share the machine with
whoever is measured, and a sender that is never held back loses much.
"""

from __future__ import annotations

import time
from typing import Any

from tools.bench_stage import PEERS, Samples, Stage, attempt, medians, ratio, say, shape, stage
from tools.contestants import Contestant, direct

RULES = 1000
ROUTES = 10_000
SIZE = 1400


def bench(rounds: int, seconds: float) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    samples: Samples = {}
    with stage() as place:
        everyone = [
            direct(place.node, place.addresses),
            place.falkirk(place.mesh(RULES, ROUTES)),
            *place.peers(),
        ]
        gave_up: dict[str, int] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {', '.join(who.name for who in everyone)}")
            for direction in ("forward", "reverse"):
                for who in everyone:
                    if not attempt(
                        samples,
                        who.name,
                        lambda: _sample(place, who, direction, seconds),  # noqa: B023 - called at once
                        may_fail=who.name in PEERS,
                    ):
                        gave_up[who.name] = gave_up.get(who.name, 0) + 1
        return report(medians(samples), gave_up, place.baseline(), shape(RULES, ROUTES, rounds, seconds, started))


def _sample(place: Stage, who: Contestant, direction: str, seconds: float) -> dict[str, float]:
    options = ["-u", "-b", "0", "-l", str(SIZE), *(["-R"] if direction == "reverse" else [])]
    end = place.throughput(who, seconds, *options)
    total = end["sum"]
    lost = total["lost_percent"] / 100
    return {direction: total["bits_per_second"] / 1e9 * (1 - lost), f"{direction}_lost": lost}


def report(
    found: dict[str, dict[str, float]],
    gave_up: dict[str, int],
    baseline: dict[str, Any],
    configuration: dict[str, Any],
) -> dict[str, Any]:
    """Medians, turned into the JSON object."""
    own = found["falkirk"]
    peers = {name: of for name, of in found.items() if name in PEERS}

    def side(direction: str) -> dict[str, Any]:
        rates = {name: of[direction] for name, of in peers.items() if direction in of}
        return {
            "gbit_s": round(own[direction], 3),
            "lost": round(own[f"{direction}_lost"], 4),
            "of_veth": ratio(own[direction], found["veth"].get(direction)),
            "of_peers": {name: ratio(own[direction], rate) for name, rate in rates.items()},
            "of_best_peer": ratio(own[direction], max(rates.values(), default=None)),
        }

    return {
        **side("forward"),
        "reverse": side("reverse"),
        "peers": {name: {key: round(value, 4) for key, value in of.items()} for name, of in peers.items()},
        "veth": {key: round(value, 4) for key, value in found["veth"].items()},
        "failed_measurements": gave_up,
        "baseline": baseline,
        "configuration": configuration | {"size": SIZE},
    }


def show(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':18}{'forward':>9}{'lost':>7}{'reverse':>9}{'lost':>7}{'ratio':>8}{'reverse':>9}"]
    reverse = result["reverse"]
    lines.append(
        f"{'falkirk':18}{result['gbit_s']:>9}{result['lost']:>7.2f}{reverse['gbit_s']:>9}{reverse['lost']:>7.2f}"
    )
    for name, of in (*result["peers"].items(), ("raw veth", result["veth"])):
        cells = [
            f"{of.get(key, float('nan')):>{width}.{digits}f}"
            for key, width, digits in (
                ("forward", 9, 3),
                ("forward_lost", 7, 2),
                ("reverse", 9, 3),
                ("reverse_lost", 7, 2),
            )
        ]
        ratios = (result["of_peers"].get(name), reverse["of_peers"].get(name))
        lines.append(
            f"{name:18}{''.join(cells)}"
            + "".join(f"{one or '':>{width}}" for one, width in zip(ratios, (8, 9), strict=True))
        )
    lines += ["", "Gbit/s of payload that arrived, and the share that didn't; falkirk's over each one's"]
    return "\n".join(lines)
