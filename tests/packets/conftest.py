"""One mesh, one server and one tunnel of each framing for all packet cases of a session."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.netns.fidelity import World, open_world
from tests.packets.roads import TunnelRoad
from tests.packets.script import FRAMINGS
from tests.packets.server import HOSTS, Server

SETTINGS = {"flow": {"icmp_per_second": 100_000}}
"""The suite makes more errors a second than a device should get."""


@dataclass
class PacketWorld:
    """What cases run in."""

    roads: dict[str, TunnelRoad]
    server: Server


def drops(world: World) -> dict[str, int]:
    """Packets dropped by the mesh's flow workers, by reason."""
    found: dict[str, int] = {}
    for worker in world.stats("flow").workers:
        for counter in (*worker.drops, *worker.counters):
            if counter in worker.drops or counter.name == "ended":
                found[counter.name] = found.get(counter.name, 0) + counter.value
    return found


@contextlib.contextmanager
def routes_that_refuse(world: World) -> Iterator[None]:
    """Hosts of the server's prefix that this machine has no way to, as `server.HOSTS` names them."""
    made: list[list[str]] = []
    try:
        for kind, name in (("unreachable", "unreachable"), ("prohibit", "prohibited")):
            for host, length in ((world.server.host4(HOSTS[name]), 32), (world.server.host6(HOSTS[name]), 128)):
                route = [kind, f"{host}/{length}"]
                subprocess.run(["ip", "route", "add", *route], check=True, timeout=10)
                made.append(route)
        yield
    finally:
        for route in made:
            subprocess.run(["ip", "route", "del", *route], check=True, timeout=10)


@pytest.fixture(scope="session")
def packet_world() -> Iterator[PacketWorld]:
    """Closed tunnels, mesh and server after the session."""
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(open_world(1, SETTINGS))
        stack.enter_context(routes_that_refuse(world))
        fences = {}
        for family, kind in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
            listener = world.server.listener(kind)
            stack.callback(listener.close)
            host = world.server.host4(1) if family == "ipv4" else world.server.host6(1)
            fences[family] = (host, int(listener.getsockname()[1]))
        roads = {}
        for framing in FRAMINGS:
            context = {"v": 1, "tenant": "acme", "device": world.device(0), "framing": framing}
            road = TunnelRoad(world.mesh.run_dir / "tunnel.sock", context, fences, lambda: drops(world))
            stack.callback(road.close)
            roads[framing] = road
        yield PacketWorld(roads, Server(world.server))
