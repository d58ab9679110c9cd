"""Two devices of one mesh and the ways between them: each client listens in its own namespace, and the other one connects.

A rule with treatment l4 has every flow between devices lifted, relayed and lowered again. Limit: needs root.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from tests.netns.fidelity import DEADLINE_S, Attempt, Client, World, begin, outcome
from tools.mesh import resource

RULE = {"name": "l4", "when": 'net.dst_device != ""', "action": "allow", "treatment": "l4"}
FRAMINGS = (("vnet", "vnet"), ("raw", "raw"), ("raw", "vnet"), ("vnet", "raw"), ("device", "device"))
KINDS = ("vnet", "raw", "device")


@dataclass(frozen=True)
class Between:
    """From one device to another, by one address family."""

    world: World
    client: Client
    server: Client
    family: socket.AddressFamily
    here: str
    """The client's address."""
    there: str
    """The server's."""

    @contextlib.contextmanager
    def listener(self, port: int = 0, backlog: int = 128) -> Iterator[socket.socket]:
        """A listener of the server's."""
        with self.server.socket(self.family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.settimeout(DEADLINE_S)
            sock.bind(("::" if self.family == socket.AF_INET6 else "0.0.0.0", port))
            sock.listen(backlog)
            yield sock

    def connect(self, port: int) -> socket.socket:
        """A connected client."""
        sock = self.client.socket(self.family)
        try:
            sock.settimeout(DEADLINE_S)
            sock.connect((self.there, port))
        except BaseException:
            sock.close()
            raise
        return sock

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A connection: the client's socket and the server's."""
        with self.listener() as listener, self.connect(listener.getsockname()[1]) as client:
            server, _ = listener.accept()
            with server:
                server.settimeout(DEADLINE_S)
                yield client, server

    def attempt(self, port: int) -> Attempt:
        """Try to connect, and let go."""
        with self.client.socket(self.family) as sock:
            return outcome(sock, begin(sock, self.there, port))


class Peers:
    """Devices, a client and a server of each kind, as a device is where its newest tunnel is; the two on different workers where there are
    several."""

    def __init__(self, world: World) -> None:
        """Writes the rule, and devices enough to find some on each worker."""
        self.world = world
        peers = [resource("Device", f"peer{number}", "acme", user="alice") for number in range(30)]
        world.apply([*peers, resource("Policy", "peers", "acme", priority=5, rules=[RULE])])
        found = [
            (crc32(device["metadata"]["id"].encode()) % world.workers, device["metadata"]["name"], device["addresses"])
            for device in world.mesh.ask_json("devices", "device", "list", "--tenant", "acme")
            if device["metadata"]["name"].startswith("peer")
        ]
        found.sort()
        self._clients = dict(zip(KINDS, found, strict=False))
        self._servers = dict(zip(KINDS, found[::-1], strict=False))
        assert world.workers == 1 or found[len(KINDS)][0] < found[-len(KINDS)][0]
        self.idle = found[len(KINDS)]
        """One that has no tunnel."""

    def between(self, framings: tuple[str, str], family: socket.AddressFamily, *, back: bool = False) -> Between:
        """A way; `back` swaps the two devices."""
        first, second = self._clients[framings[0]], self._servers[framings[1]]
        if back:
            first, second, framings = second, first, framings[::-1]
        return Between(
            self.world,
            self.world.client(framings[0], device=first[1]),
            self.world.client(framings[1], device=second[1]),
            family,
            address(first, family),
            address(second, family),
        )


def address(device: tuple[int, str, list[str]], family: socket.AddressFamily) -> str:
    """A device's own address."""
    addresses = [text.split("/")[0] for text in device[2]]
    return next(text for text in addresses if (":" in text) == (family == socket.AF_INET6))
