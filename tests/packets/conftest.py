"""One mesh, one server and one tunnel of each framing for all packet cases of a session."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.netns.conftest import ServerNamespace
from tests.netns.fidelity import World, open_world
from tests.packets.roads import TunnelRoad
from tests.packets.script import FRAMINGS
from tests.packets.server import HOSTS, NARROW, Server
from tools.mesh import resource

SETTINGS = {"flow": {"icmp_per_second": 100_000}}
"""The suite makes more errors a second than a device should get."""


@dataclass
class PacketWorld:
    """What cases run in."""

    roads: dict[str, TunnelRoad]
    """The client's, by framing."""
    peers: dict[str, TunnelRoad]
    """The other device's, by the client's framing."""
    server: Server


def quiet_limits() -> None:
    """Linux limits the ICMP errors that a host sends to another to one a second; cases ask for more."""
    for name in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
        Path("/proc/sys/net", name).write_text("0")


def drops(world: World) -> dict[str, int]:
    """Packets dropped by the mesh's flow workers, by reason."""
    found: dict[str, int] = {}
    for worker in world.stats("flow").workers:
        for counter in (*worker.drops, *worker.counters):
            if counter in worker.drops or counter.name == "ended":
                found[counter.name] = found.get(counter.name, 0) + counter.value
    return found


def _never_a_source(server: ServerNamespace, name: str) -> None:
    """What the server sends by itself comes from its first address, as with IPv4."""
    host = f"{server.host6(HOSTS[name])}/{server.prefix6.prefixlen}"
    change = ["ip", "address", "change", host, "dev", "eth0", "preferred_lft", "0"]
    server.run(change, timeout=10).check_returncode()


@contextlib.contextmanager
def special_routes(server: ServerNamespace) -> Iterator[None]:
    """Hosts of the server's prefix that this machine has no way to, or a narrow one, as `server.HOSTS` names them."""
    made: list[list[str]] = []
    narrow = ["dev", server.device, "mtu", "lock", str(NARROW)]
    try:
        for name, kind, more in (
            ("unreachable", "unreachable", []),
            ("prohibited", "prohibit", []),
            ("narrow", "unicast", narrow),
        ):
            for host, length in ((server.host4(HOSTS[name]), 32), (server.host6(HOSTS[name]), 128)):
                route = [kind, f"{host}/{length}", *more]
                subprocess.run(["ip", "route", "add", *route], check=True, timeout=10)
                made.append(route)
        for host in (server.host4(HOSTS["narrow"]), server.host6(HOSTS["narrow"])):
            server.add_there(host)
        # Never the source of what the server sends by itself.
        _never_a_source(server, "narrow")
        yield
    finally:
        for route in made:
            subprocess.run(["ip", "route", "del", *route], check=True, timeout=10)


@pytest.fixture(scope="session")
def packet_world() -> Iterator[PacketWorld]:
    """Closed tunnels, mesh and server after the session."""
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(open_world(1, SETTINGS))
        stack.enter_context(special_routes(world.server))
        _never_a_source(world.server, "slow")
        world.server.call(quiet_limits)
        fences = {}
        for family, kind in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
            listener = world.server.listener(kind)
            stack.callback(listener.close)
            host = world.server.host4(1) if family == "ipv4" else world.server.host6(1)
            fences[family] = (host, int(listener.getsockname()[1]))

        def road(device: str, framing: str) -> TunnelRoad:
            context = {"v": 1, "tenant": "acme", "device": device, "framing": framing}
            made = TunnelRoad(world.mesh.run_dir / "tunnel.sock", context, fences, lambda: drops(world))
            stack.callback(made.close)
            return made

        world.apply([resource("Device", f"peer-{framing}", "acme", user="alice") for framing in FRAMINGS])
        server = Server(world.server)
        stack.callback(server.close_for_good)
        roads = {framing: road(world.device(0), framing) for framing in FRAMINGS}
        # The other device frames the other way, so that both ways of passing packets on are seen.
        peers = {
            framing: road(f"peer-{other}", other) for framing, other in zip(FRAMINGS, reversed(FRAMINGS), strict=True)
        }
        yield PacketWorld(roads, peers, server)
