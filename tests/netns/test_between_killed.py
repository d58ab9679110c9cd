"""Streams between two devices, and the processes in between killed: both ends get a RST, or don't notice; never an end that looks clean."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.netns.between_devices import Between, Peers
from tests.netns.fidelity import DEADLINE_S, open_world, receive
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]
FAMILIES = (socket.AF_INET, socket.AF_INET6)
WAYS = tuple((framings, family) for framings in (("vnet", "vnet"), ("raw", "raw")) for family in FAMILIES)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(scope="module", params=[1, 3], ids=["1-worker", "3-workers"])
def peers(request: pytest.FixtureRequest) -> Iterator[Peers]:
    with open_world(request.param) as world:
        yield Peers(world)


@pytest.fixture
def ways(peers: Peers) -> list[Between]:
    found = [peers.between(*way) for way in WAYS]
    for way in found:
        serves(way)
    return found


def serves(way: Between) -> None:
    """Wait until a new connection comes about and carries."""

    def connects() -> bool:
        try:
            with way.pair() as (client, server):
                client.sendall(b"?")
                return receive(server, 1) == b"?"
        except (ConnectionError, TimeoutError, OSError):
            return False

    wait_for("a new connection", connects, DEADLINE_S)


def pid(peers: Peers, service: str, name: str) -> int:
    return next(int(process.pid) for process in peers.world.stats(service).processes if process.name == name)


def kill(peers: Peers, service: str, name: str) -> None:
    os.kill(pid(peers, service, name), signal.SIGKILL)


def streams(stack: ExitStack, ways: list[Between]) -> list[Pair]:
    """On each way one that is open, and one whose client has ended its side."""
    found = []
    for way in ways:
        for half in (False, True):
            client, server = stack.enter_context(way.pair())
            server.sendall(b"the first part")
            assert receive(client, 14) == b"the first part"
            if half:
                client.shutdown(socket.SHUT_WR)
                assert receive(server) == b""
            found.append((client, server))
    return found


def was_reset(sock: socket.socket) -> bool:
    """Whether a RST comes. To one that has seen a FIN before it is told as EPIPE (tcp_reset in Linux), and never by what it reads."""
    sock.settimeout(DEADLINE_S)
    try:
        if sock.recv(1):
            return False
    except ConnectionResetError:
        return True
    deadline = time.monotonic() + DEADLINE_S
    while sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) not in (errno.EPIPE, errno.ECONNRESET):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # a poll with a deadline
    return True


@pytest.mark.parametrize("service", ["upgrader", "flow"])
@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_worker_that_is_killed_resets_both_ends(peers: Peers, ways: list[Between], service: str, whose: str) -> None:
    workers = peers.world.workers
    number = 0 if whose == "client" else workers - 1
    with ExitStack() as stack:
        pairs = streams(stack, ways)
        kill(peers, service, f"{service}.worker.{number}")
        if service == "upgrader" and number:
            # Streams belong to the client's worker, whose upgrader lives.
            for client, server in pairs:
                server.sendall(b"!")
                assert receive(client, 1) == b"!"
        else:
            for client, server in pairs:
                assert was_reset(client)
                assert was_reset(server)
    for way in ways:
        serves(way)


def test_the_upgrader_itself_is_killed(peers: Peers, ways: list[Between]) -> None:
    with ExitStack() as stack:
        pairs = streams(stack, ways)
        kill(peers, "upgrader", "upgrader")
        for client, server in pairs:
            assert was_reset(client)
            assert was_reset(server)
    for way in ways:
        serves(way)


def test_nobody_notices_that_the_helper_is_killed(peers: Peers, ways: list[Between]) -> None:
    before = pid(peers, "upgrader", "upgrader.lower_helper")
    with ExitStack() as stack:
        pairs = streams(stack, ways)
        kill(peers, "upgrader", "upgrader.lower_helper")
        # Dials that come meanwhile wait for its successor.
        for way in ways:
            with way.pair() as (client, server):
                client.sendall(b"?")
                assert receive(server, 1) == b"?"
        for client, server in pairs:
            server.sendall(b"!")
            assert receive(client, 1) == b"!"
    wait_for("another helper", lambda: pid(peers, "upgrader", "upgrader.lower_helper") != before, DEADLINE_S)


def test_slots_and_descriptors_return(peers: Peers, ways: list[Between]) -> None:
    wait_for("slots that rest", lambda: peers.world.active_slots() == 0, DEADLINE_S)
    before = {name: held.descriptors for name, held in peers.world.processes().items() if "worker" in name}
    for _ in range(10):
        for way in ways:
            with way.pair() as (client, server):
                client.sendall(b"?")
                assert receive(server, 1) == b"?"
    wait_for("slots that rest", lambda: peers.world.active_slots() == 0, DEADLINE_S)

    def returned() -> bool:
        after = {name: held.descriptors for name, held in peers.world.processes().items() if "worker" in name}
        return all(count <= before.get(name, 0) for name, count in after.items())

    wait_for("descriptors", returned, DEADLINE_S)
