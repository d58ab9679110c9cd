"""Nodes that talk in memory: a clock that is moved by hand, a network that can be listened to, and randomness from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals, Event
from falkirk.wireguard.peer import Endpoint, Peer

WALL = 1_700_000_000_000_000_000
CLIENT: Endpoint = ("192.0.2.1", 1001)
SERVER: Endpoint = ("192.0.2.2", 51820)
CLIENT_ADDRESS = bytes((10, 0, 0, 1))
SERVER_ADDRESS = bytes((10, 0, 0, 2))


def randomness(seed: str) -> Callable[[int], bytes]:
    """Bytes that look random and are the same in every run."""
    count = 0

    def rng(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_128(f"{seed} {count}".encode()).digest(size)

    return rng


def secret(name: str) -> bytes:
    """A private key with a name."""
    return hashlib.sha256(name.encode()).digest()


def packet(
    source: bytes = CLIENT_ADDRESS, destination: bytes = SERVER_ADDRESS, *, size: int = 60, fill: int = 7
) -> bytes:
    """An IP packet, of which the engine reads version, length and source."""
    if len(source) == 4:
        head = bytes((0x45, 0)) + size.to_bytes(2, "big") + bytes(8) + source + destination
    else:
        head = bytes((0x60, 0, 0, 0)) + (size - 40).to_bytes(2, "big") + bytes(2) + source + destination
    return head + bytes((fill,)) * (size - len(head))


class Host:
    """A node and what it received."""

    def __init__(self, world: World, name: str, endpoint: Endpoint, node: Node) -> None:
        self.world = world
        self.name = name
        self.endpoint = endpoint
        self.node = node
        self.received: list[bytes] = []
        self.events: list[Event] = []

    def kinds(self) -> list[str]:
        """The kinds of its events so far, which are then forgotten."""
        kinds: list[str] = [event.kind for event in self.events]
        self.events.clear()
        return kinds

    def take(self) -> list[bytes]:
        """The packets so far, which are then forgotten."""
        taken, self.received = self.received, []
        return taken

    def counted(self) -> dict[str, int]:
        """The reasons that were counted."""
        return {reason: count for reason, count in self.node.counters.items() if count}

    def send(self, peer: Peer, *packets: bytes) -> None:
        """Packets for a peer; what comes of them is on the wire."""
        for datagram in self.node.send(peer, packets, self.world.now, self.world.wall):
            assert peer.endpoint is not None
            self.world.wire.append((self.endpoint, peer.endpoint, datagram))

    def receive(self, datagram: bytes, source: Endpoint, segment: int = 0) -> list[bytes]:
        """One datagram, or a train; the answers are on the wire, and returned."""
        arrivals = Arrivals()
        self.node.receive(datagram, source, self.world.now, self.world.wall, arrivals, segment)
        return self._settle(arrivals)

    def poll(self) -> list[bytes]:
        """Its timers."""
        arrivals = Arrivals()
        self.node.poll(self.world.now, self.world.wall, arrivals)
        return self._settle(arrivals)

    def _settle(self, arrivals: Arrivals) -> list[bytes]:
        for packets in arrivals.packets.values():
            self.received += packets
        self.events += arrivals.events
        self.world.wire += [(self.endpoint, endpoint, datagram) for endpoint, datagram in arrivals.datagrams]
        return [datagram for _, datagram in arrivals.datagrams]


class World:
    """A client that knows its server, and a server that knows its client."""

    def __init__(self, *, keepalive_seconds: float = 0, preshared: bytes = bytes(32), mtu: int = 1420) -> None:
        self.now = 1000.0
        self.wire: list[tuple[Endpoint, Endpoint, bytes]] = []
        """(from, to, datagram), in order."""
        self.passed: list[bytes] = []
        """Every datagram that was delivered."""
        self.client = Host(self, "client", CLIENT, Node(secret("client"), rng=randomness("client"), mtu=mtu))
        self.server = Host(self, "server", SERVER, Node(secret("server"), rng=randomness("server"), mtu=mtu))
        self.to_server = self.client.node.add_peer(
            self.server.node.public_key,
            preshared=preshared,
            allowed=[(SERVER_ADDRESS, 32)],
            keepalive_seconds=keepalive_seconds,
            endpoint=SERVER,
        )
        self.to_client = self.server.node.add_peer(
            self.client.node.public_key, preshared=preshared, allowed=[(CLIENT_ADDRESS, 32)]
        )

    @property
    def wall(self) -> int:
        """Wall time, nanoseconds."""
        return WALL + round(self.now * 1e9)

    def run(self) -> None:
        """Deliver what is on the wire, and what comes of it."""
        while self.wire:
            source, destination, datagram = self.wire.pop(0)
            for host in (self.client, self.server):
                if host.endpoint == destination:
                    self.passed.append(datagram)
                    host.receive(datagram, source)

    def wait(self, seconds: float, *, deliver: bool = True) -> None:
        """Let time pass, timer by timer; with `deliver` off, nothing arrives."""
        end = self.now + seconds
        while True:
            due = min(self.client.node.next_deadline(), self.server.node.next_deadline())
            if due > end:
                break
            self.now = max(self.now, due)
            self.client.poll()
            self.server.poll()
            if deliver:
                self.run()
            else:
                self.wire.clear()
        self.now = end

    def connect(self) -> None:
        """Have a session that both sides use, and nothing on the wire."""
        self.client.send(self.to_server, packet())
        self.run()
        assert self.server.take() == [packet()]
        assert self.to_client.current is not None
        self.client.kinds()
        self.server.kinds()
        self.passed.clear()

    def answer(self, *packets: bytes) -> None:
        """Packets from the server."""
        self.server.send(self.to_client, *packets)

    def lost(self) -> list[bytes]:
        """What is on the wire, taken off it."""
        datagrams = [datagram for _, _, datagram in self.wire]
        self.wire.clear()
        return datagrams


BACK = packet(SERVER_ADDRESS, CLIENT_ADDRESS)
"""A packet from the server to the client."""
