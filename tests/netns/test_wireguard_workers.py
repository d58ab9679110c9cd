"""A mesh whose on-ramp has three workers, a stock device of each and one of ours: each is one worker's, wherever its datagrams come in.

Limit: needs root, wireguard-go and wg.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from falkirk.api.onramp.v1 import onramp_service_pb2 as pb
from falkirk.api.onramp.v1 import onramp_service_pb2_grpc
from falkirk.linux import trains
from falkirk.onramp.control import owner
from falkirk.wireguard.node import Node
from falkirk.wireguard.primitives import public_key
from tests.netns.streams import DEADLINE_S, exchange, inside, stream
from tools.load.wireguard_flood import initiations
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, Namespace, wait_for
from tools.wg_device import StockDevice, key_pair

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]
PORT = 51820
SERVER4 = "198.18.101.2"
WORKERS = 3
NAMES = ("zero", "first", "second")


class Place:
    """A node, a server, three stock devices, of which each worker has one, and a desk with our client."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.directory = lab, lab.directory()
        self.node, self.server = lab.namespace("node"), lab.namespace("server")
        lab.cable(self.node, self.server, ["198.18.101.1/24"], [f"{SERVER4}/24"])
        self.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
        self.stock = [StockDevice(lab, name, self.directory) for name in NAMES]
        self.desk = lab.namespace("desk")
        for worker, device in enumerate(self.stock):
            while owner(base64.b64decode(device.public_key), WORKERS) != worker:
                device.private_key, device.public_key = key_pair()
        for number, namespace in enumerate([*(device.namespace for device in self.stock), self.desk], 102):
            lab.cable(self.node, namespace, [f"198.18.{number}.1/24"], [f"198.18.{number}.2/24"])
        self.spare = os.urandom(32)
        """The private key of a device that isn't there."""
        self.mesh = Mesh(lab, self.directory, self.node)
        self.start(WORKERS)
        devices = [resource("Device", device.name, "acme", publicKey=device.public_key) for device in self.stock]
        spare = base64.b64encode(public_key(self.spare)).decode()
        self.mesh.apply(
            [
                resource("Tenant", "acme"),
                resource("Route", "four", "acme", prefix="0.0.0.0/0", target={"internet": {}}),
                resource("Device", "spare", "acme", publicKey=spare),
                *devices,
                resource("Policy", "access", "acme", priority=10, rules=[rule("all", "true", "allow")]),
            ]
        )
        channel = grpc.insecure_channel(f"unix:{self.mesh.run_dir / 'read' / 'onramp.sock'}")
        lab.on_exit(channel.close)
        self.onramp = onramp_service_pb2_grpc.OnrampServiceStub(channel)
        self.key = self.stats().wireguard.public_key
        self.addresses = {name: self.address_of(name) for name in NAMES}
        for number, device in enumerate(self.stock, 102):
            device.join(self.key, f"198.18.{number}.1:{PORT}", [self.addresses[device.name]])

    def start(self, workers: int) -> None:
        """The mesh, with so many."""
        wireguard = {"port": PORT, "endpoints": [f"198.18.105.1:{PORT}"]}
        self.mesh.start({"workers": workers, "onramp": {"wireguard": wireguard}})

    def enrol_desk(self) -> None:
        """Our client, with a key that it makes itself."""
        made = self.mesh.ask_json("tokens", "device", "token", "create", "--tenant", "acme")
        token = self.directory / "token"
        token.write_text(str(made[0]["secret"]))
        self._desk("enroll", "--token-file", str(token), "--name", "desk")
        self._desk("up", "--no-dns")
        self.lab.on_exit(lambda: self._desk("down"))
        self.addresses["desk"] = self.address_of("desk")

    def _desk(self, *words: str) -> None:
        state = ("--state", str(self.directory / "desk"))
        command = self.desk.command(sys.executable, "-m", "falkirk.cli.main", "device", *words, *state)
        environment = self.mesh.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    def address_of(self, name: str) -> str:
        """As the registry has given it."""
        addresses = json.loads(self.mesh.ask("device", "get", "--tenant", "acme", name, "--json"))["addresses"]
        return next(str(address) for address in addresses if ":" not in address)

    def stats(self) -> pb.StatsResponse:
        """What the on-ramp says."""
        answer: pb.StatsResponse = self.onramp.Stats(pb.StatsRequest())
        return answer

    def dropped(self, reason: str) -> int:
        """How often so far."""
        return {counter.name: counter.value for counter in self.stats().wireguard.dropped}[reason]

    def tunnels(self) -> dict[str, Any]:
        """Open ones by their devices."""
        return {tunnel.context.device: tunnel for tunnel in self.onramp.List(pb.ListRequest()).tunnels}

    def workers(self) -> dict[str, int]:
        """Process ids by names."""
        found = {process.name: process.pid for process in self.stats().processes}
        return {name: pid for name, pid in found.items() if name.startswith("onramp.worker.")}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Lab() as lab:
        yield Place(lab)


@contextlib.contextmanager
def to_server(place: Place, devices: list[StockDevice]) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """A connection of each device."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(stream(device.namespace, place.server, SERVER4)) for device in devices]


def again(place: Place, device: StockDevice) -> None:
    """A stock client forgets its session, and handshakes with its next packet."""
    shown = device.namespace.run("wg", "show", device.interface, "endpoints").split()
    device.namespace.run("wg", "set", device.interface, "peer", place.key, "remove")
    options = ("endpoint", shown[1], "allowed-ips", "0.0.0.0/0,::/0")
    device.namespace.run("wg", "set", device.interface, "peer", place.key, *options)
    assert device.handshake() == 0


def test_devices_of_all_workers_reach_servers_and_each_other(place: Place) -> None:
    """Trains of stock senders under load, each at its own worker's socket; our client among them."""
    assert set(place.workers()) == {f"onramp.worker.{worker}" for worker in range(WORKERS)}
    place.enrol_desk()
    for device in place.stock:
        assert device.ping(SERVER4, seconds=5)
    with to_server(place, place.stock) as ends:
        for pair in ends:
            exchange(*pair, size=4 << 20)
    spaces = {device.name: device.namespace for device in place.stock} | {"desk": place.desk}
    for from_, to in (("zero", "first"), ("first", "second"), ("second", "desk"), ("desk", "zero")):
        with stream(spaces[from_], spaces[to], place.addresses[to]) as pair:
            exchange(*pair)
            assert pair[1].getpeername()[0] == place.addresses[from_]
    tunnels = place.tunnels()
    assert [tunnels[name].id % WORKERS for name in NAMES] == [0, 1, 2]
    assert place.stats().open == len(tunnels) == 4
    assert place.dropped("unknown_index") == 0
    # A handshake or two of each, and none of their thousands of data messages: those come to the right socket by themselves.
    assert place.stats().wireguard.passed_on < 20
    wait_for(
        "what is known of them", lambda: all(t.wireguard.received_bytes for t in place.tunnels().values()), DEADLINE_S
    )


def test_a_device_that_comes_from_other_ports_stays_with_its_worker(place: Place) -> None:
    """Its initiations reach whichever worker the kernel's hash says, its session and its tunnel stay where they are."""
    device = place.stock[1]
    tunnel, before = place.tunnels()["first"].id, place.stats().wireguard.passed_on
    port = 40_000
    with to_server(place, [device]) as [ends]:
        # That a hash stays at its owner's 40 times: once in ten millions.
        while place.stats().wireguard.passed_on < before + 3:
            port += 1
            assert port < 40_040
            device.namespace.run("wg", "set", device.interface, "listen-port", str(port))
            again(place, device)
            exchange(*ends, size=4096)
        # Without a handshake too, as a NAT on the way might do it.
        device.namespace.run("wg", "set", device.interface, "listen-port", str(port + 1))
        exchange(*ends, size=65536)
        wait_for(
            "its new endpoint",
            lambda: place.tunnels()["first"].wireguard.endpoint == f"198.18.103.2:{port + 1}",
            DEADLINE_S,
        )
    assert place.tunnels()["first"].id == tunnel
    assert place.dropped("worker_full") == 0


def test_a_replay_is_refused_by_whichever_worker_and_a_stranger_is_nobody_to_all(place: Place) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(inside(place.desk, trains.open_socket)) for _ in range(24)]
        there = trains.destination(sockets[0], "198.18.105.1", PORT)
        known = Node(place.spare, rng=os.urandom)
        peer = known.add_peer(base64.b64decode(place.key), endpoint=there)
        (initiation,) = known.initiate(peer, time.monotonic(), time.time_ns())
        (stranger, *_) = initiations(base64.b64decode(place.key), there)
        assert trains.send(sockets[0], there, [initiation]) == 0
        assert select.select([sockets[0]], [], [], DEADLINE_S)[0]
        assert sockets[0].recv(1000)[0] == 2
        replays, strangers = place.dropped("old_timestamp"), place.dropped("unknown_key")
        for sock in sockets[1:]:
            assert trains.send(sock, there, [initiation]) == 0
            assert trains.send(sock, there, [stranger]) == 0
        more = len(sockets) - 1
        wait_for("replays", lambda: place.dropped("old_timestamp") == replays + more, DEADLINE_S)
        wait_for("strangers", lambda: place.dropped("unknown_key") == strangers + more, DEADLINE_S)
        assert select.select(sockets, [], [], 0)[0] == []


def test_a_killed_worker_costs_its_devices_a_handshake_and_others_nothing(place: Place) -> None:
    with to_server(place, place.stock) as ends:
        for pair in ends:
            exchange(*pair, size=65536)
        wait_for("their endpoints", lambda: all(t.wireguard.endpoint for t in place.tunnels().values()), DEADLINE_S)
        tunnels = {name: tunnel.id for name, tunnel in place.tunnels().items()}
        handshakes = [tunnel.wireguard.last_handshake.ToNanoseconds() for tunnel in _of(place, NAMES)]
        pid = place.workers()["onramp.worker.1"]
        os.kill(pid, signal.SIGKILL)
        # Nobody else waits for anything.
        exchange(*ends[0], size=1 << 20)
        exchange(*ends[2], size=1 << 20)
        exchange(*ends[1], size=1 << 20)
        wait_for("another worker", lambda: place.workers().get("onramp.worker.1") not in (None, pid), DEADLINE_S)
        wait_for(
            "its device",
            lambda: _of(place, NAMES)[1].wireguard.last_handshake.ToNanoseconds() > handshakes[1],
            DEADLINE_S,
        )
        now = [tunnel.wireguard.last_handshake.ToNanoseconds() for tunnel in _of(place, NAMES)]
        assert (now[0], now[2]) == (handshakes[0], handshakes[2])
        assert {name: tunnel.id for name, tunnel in place.tunnels().items()} == tunnels


def _of(place: Place, names: tuple[str, ...]) -> list[Any]:
    tunnels = place.tunnels()
    return [tunnels[name] for name in names]


def test_under_a_flood_of_all_workers_a_cookie_is_good_where_it_came_from(place: Place) -> None:
    """And a device whose initiation is passed on isn't asked for another by its own worker."""
    attacker = place.lab.namespace("attacker")
    place.lab.cable(place.node, attacker, ["198.18.111.1/24"], ["198.18.111.2/24"])
    before = place.dropped("no_cookie")
    with to_server(place, place.stock) as ends, flood(place, attacker):
        wait_for("load", lambda: place.dropped("no_cookie") > before + 1000, DEADLINE_S)
        for device in place.stock:
            again(place, device)
        for pair in ends:
            exchange(*pair, size=65536)
        assert all(device.handshake() for device in place.stock)
    # Of what the flood was asked for nothing came: who got through are the three.
    assert set(place.tunnels()) == {*NAMES, "desk"}


@contextlib.contextmanager
def flood(place: Place, attacker: Namespace) -> Iterator[None]:
    """Initiations of strangers, from so many ports that each worker gets more than it answers without cookies, and fewer than it answers with one."""
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(inside(attacker, trains.open_socket)) for _ in range(24)]
        there = trains.destination(sockets[0], "198.18.111.1", PORT)
        made = initiations(base64.b64decode(place.key), there)[:50]

        def send() -> None:
            while not over.wait(0.01):
                for sock in sockets[::2]:
                    trains.send(sock, there, made[:5])
                sockets.append(sockets.pop(0))

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_another_number_of_workers_takes_everybody_up(place: Place) -> None:
    known = {tunnel.id for tunnel in place.tunnels().values()}
    place.mesh.stop()
    place.start(2)
    assert set(place.workers()) == {"onramp.worker.0", "onramp.worker.1"}
    with to_server(place, place.stock) as ends:
        for pair in ends:
            exchange(*pair, size=65536)
    tunnels = place.tunnels()
    for device in place.stock:
        number = tunnels[device.name].id
        assert number % 2 == owner(base64.b64decode(device.public_key), 2)
        assert number not in known
    spaces = {device.name: device.namespace for device in place.stock}
    with stream(spaces["zero"], spaces["second"], place.addresses["second"]) as pair:
        exchange(*pair)
