"""`tools/bench lift`: what lifting costs, as ratios measured in one run.

A node's namespace and a server's, one veth between. In each round every contestant runs every measurement in turn, so
that what else the machine does hits all of them; what is shown are medians over the rounds, and ratios of medians.

    veth        iperf3 from the node straight to the server: the limit on this machine
    loopback    the load generators on the node's own loopback: their own limit
    falkirk     `falkirk up` in its default configuration in the node's namespace (six services, audit on, 1,000 rules,
                10,000 routes), iperf3 and the generators through `falkirk lower` with vnet framing
    peers       pasta, slirp4netns, sing-box with each of its stacks, tun2socks

Forward is from the client to the server. Connections: connect, 1 byte there and back, 16 in flight, several server
addresses and ports, the client closes first. Round trip: 64 bytes on one connection. Small packets: 64-byte messages there
and back on 16 connections. What a connection costs is told in processor time as well, by
process, since machines differ and are shared. Limits: rates include Python load generators, hence ratios to loopback; two cores share it all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tools.bench_cpu import Meter
from tools.bench_report import report
from tools.bench_stage import (
    ECHO_PORTS,
    LOAD,
    PEERS,
    Samples,
    Stage,
    attempt,
    measure,
    medians,
    say,
    shape,
    stage,
)
from tools.contestants import Contestant, direct, loopback

RULES = 1000
ROUTES = 10_000
STREAMS = (1, 8)


class Bench:
    """The rounds and what they gave."""

    def __init__(self, place: Stage, seconds: float, mesh_pid: int | None) -> None:
        self.place = place
        self.seconds = seconds
        self.mesh_pid = mesh_pid
        self.samples: Samples = {}
        self.failed: dict[str, int] = {}
        """Connections that failed within a measurement."""
        self.gave_up: dict[str, int] = {}
        """Measurements of a peer that gave nothing, twice."""

    def throughput(self, who: Contestant, streams: int, reverse: bool) -> float:
        """Gbit/s of payload that arrived."""
        options = ["-O", "1", "-P", str(streams), *(["-R"] if reverse else []), "-C", self.place.congestion]
        end = self.place.throughput(who, self.seconds, *options)
        return float(end["sum_received"]["bits_per_second"]) / 1e9

    def generator(self, who: Contestant, mode: str) -> dict[str, Any]:
        """What the load client prints."""
        targets = ",".join(f"{address}:{port}" for port in ECHO_PORTS for address in who.addresses)
        client = [sys.executable, str(LOAD / "client.py"), mode, targets, "--seconds", f"{self.seconds:g}"]
        return measure(who.command(client), self.seconds)

    def attempt(self, who: Contestant, sample: Callable[[], dict[str, float]]) -> None:
        """Keep what `sample` gives; that a peer gives nothing is counted."""
        if not attempt(self.samples, who.name, sample, may_fail=who.name in PEERS):
            self.gave_up[who.name] = self.gave_up.get(who.name, 0) + 1

    def round(self, everyone: list[Contestant]) -> None:
        """Every measurement of every contestant, the measurement outermost."""
        for streams in STREAMS:
            for direction, reverse in (("forward", False), ("reverse", True)):
                key = f"{direction}_{streams}"
                for who in everyone:
                    if who.name != "loopback":
                        self.attempt(who, lambda: {key: self.throughput(who, streams, reverse)})  # noqa: B023 - called at once
        for sample in (self.connections, self.round_trips, self.messages):
            for who in everyone:
                self.attempt(who, lambda: sample(who))  # noqa: B023

    def connections(self, who: Contestant) -> dict[str, float]:
        """Connections a second, and the mesh's processor time for one; those that failed are counted."""
        meter = Meter(self.mesh_pid) if self.mesh_pid is not None and who.name == "falkirk" else None
        result = self.generator(who, "connections")
        self.failed[who.name] = self.failed.get(who.name, 0) + result["failed"]
        return {"connections": result["per_s"]} | (meter.apiece(result["total"]) if meter is not None else {})

    def round_trips(self, who: Contestant) -> dict[str, float]:
        """Microseconds."""
        result = self.generator(who, "rtt")
        return {"rtt_p50": result["p50"], "rtt_p99": result["p99"]}

    def messages(self, who: Contestant) -> dict[str, float]:
        """A second."""
        return {"messages": self.generator(who, "messages")["per_s"]}


def bench(rounds: int, seconds: float, *, without_falkirk: bool = False) -> dict[str, Any]:
    """The whole measurement; its result as one object."""
    started = time.monotonic()
    with stage() as place:
        everyone = [direct(place.node, place.addresses), loopback(place.node)]
        mesh = None if without_falkirk else place.mesh(RULES, ROUTES)
        if mesh is not None:
            everyone.append(place.falkirk(mesh))
        everyone += place.peers()
        run = Bench(place, seconds, mesh.pid if mesh is not None else None)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {', '.join(who.name for who in everyone)}")
            run.round(everyone)
        configuration = shape(RULES, ROUTES, rounds, seconds, started) | {"framing": "vnet", "transport": "device"}
        return report(medians(run.samples), run.failed, run.gave_up, place.baseline(), configuration)
