"""The on-ramp's WireGuard in this process, two workers of it in one loop: what a process leaves behind for the next, and what one worker asks another."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from falkirk.linux import sieve, trains
from falkirk.onramp import neighbours, wireguard
from falkirk.onramp.control import owner
from falkirk.onramp.neighbours import Neighbours
from falkirk.onramp.reactor import Reactor
from falkirk.onramp.tables import DeviceRow, NetworkRow, Tables, TenantRow
from falkirk.onramp.wireguard import WireGuard
from falkirk.wireguard import node as engine
from falkirk.wireguard import primitives
from falkirk.wireguard.messages import INITIATION, INITIATION_SIZE
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import Endpoint

DEADLINE_S = 20.0
WORKERS = 2


class Node:
    """Both workers, each with a socket of its own, and a device of each."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reactor = Reactor()
        self.counts: list[Counter[str]] = [Counter() for _ in range(WORKERS)]
        self.tables = Tables()
        self.heard: list[Endpoint | None] = []
        """What the parent was told, by either."""
        self.secrets: list[bytes] = []
        """The devices' keys."""
        rows: list[TenantRow | NetworkRow | DeviceRow] = [TenantRow("t", "acme"), NetworkRow("n", "t", "default", True)]
        for worker in range(WORKERS):
            while owner(key := primitives.public_key(own := os.urandom(32)), WORKERS) != worker:
                pass
            self.secrets.append(own)
            rows.append(
                DeviceRow(f"d{worker}", "t", f"d{worker}", addresses=(bytes((10, 0, 0, worker)),), public_key=key)
            )
        self.tables.apply(rows)
        self.sockets = [stack.enter_context(trains.open_socket("127.0.0.1")) for _ in range(WORKERS)]
        inboxes = [neighbours.inbox() for _ in range(WORKERS)]
        ways = [Neighbours(self.reactor, reading, self._counter(worker)) for worker, (reading, _) in enumerate(inboxes)]
        for worker, way in enumerate(ways):
            way.know(1 - worker, inboxes[1 - worker][1])
        for end in (end for ends in inboxes for end in ends):
            stack.enter_context(end)
        secret = os.urandom(32)
        self.public = primitives.public_key(secret)
        self.workers = [
            WireGuard(
                self.reactor,
                self.sockets[worker],
                secret,
                1420,
                worker,
                WORKERS,
                lambda: self.tables,
                lambda _: 1,
                lambda *_: None,
                lambda _, peer: self.heard.append(peer.endpoint),
                ways[worker],
                self._counter(worker),
            )
            for worker in range(WORKERS)
        ]

    def _counter(self, worker: int) -> Callable[[str, int], None]:
        def count(name: str, more: int) -> None:
            self.counts[worker][name] += more

        return count

    def turn(self, until: Callable[[], bool]) -> None:
        """Until something is so."""

        def look() -> bool:
            if until():
                self.reactor.stop()
            return False

        self.reactor.after.append(look)
        self.reactor.later(DEADLINE_S, self.reactor.stop)
        self.reactor.run()

    def run(self, until: socket.socket) -> bytes:
        """Turn until somebody has got something; what."""
        self.turn(lambda: bool(select.select([until], [], [], 0)[0]))
        until.setblocking(False)
        return until.recv(65536)


@pytest.fixture
def node() -> Iterator[Node]:
    with contextlib.ExitStack() as stack:
        made = Node(stack)
        yield made


def test_a_sieve_of_the_process_before_is_taken_away(node: Node) -> None:
    plain = b"\1\0\0\0".ljust(INITIATION_SIZE, b"\0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sieve.let_in(node.sockets[0], 0)
        node.workers[0].start()
        sender.sendto(plain, node.sockets[0].getsockname())
        assert select.select([node.sockets[0]], [], [], DEADLINE_S)[0]
        assert node.sockets[0].recv(1000) == plain


@pytest.mark.parametrize("asks", [0, 1])
def test_data_of_before_are_answered_by_the_worker_whose_device_it_is(node: Node, asks: int) -> None:
    """There were other workers before: the index names one now who isn't the device's, and both know where it was."""
    with trains.open_socket("127.0.0.1") as device:
        host, port = device.getsockname()
        for worker in node.workers:
            worker.remember([("d1", f"{host}:{port}")])
            worker.review(node.tables, None)
            worker.start()
        data = b"\4\0\0\0" + bytes((asks, 7, 7, 7)) + bytes(24)
        device.sendto(data, node.sockets[asks].getsockname())
        answer = node.run(device)
        assert (answer[0], len(answer), answer[4] % WORKERS) == (INITIATION, INITIATION_SIZE, 1)
    assert [counts["passed_on"] for counts in node.counts] == [int(asks == 0), 0]


def test_devices_of_before_are_asked_for_a_handshake_those_with_flows_first(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next packet of either would be lost, be it of a flow or of one that begins then. Who has none isn't asked again."""
    monkeypatch.setattr(wireguard, "ASKED", 1)
    monkeypatch.setattr(wireguard, "PATIENCE_S", 0.0)
    monkeypatch.setattr(wireguard, "REPORT_S", 0.01)
    worker = node.workers[1]
    while owner(key := os.urandom(32), WORKERS) != 1:
        pass
    node.tables.apply([DeviceRow("d2", "t", "d2", addresses=(bytes((10, 0, 0, 2)),), public_key=key)])
    with trains.open_socket("127.0.0.1") as idle, trains.open_socket("127.0.0.1") as busy, worker.connect(0):
        for device_id, device in (("d1", idle), ("d2", busy)):
            worker.remember([(device_id, "{}:{}".format(*device.getsockname()))])
        worker.review(node.tables, None)
        assert worker.restore(1, "d1", 0, busy=False) == ""
        assert worker.restore(2, "d2", 0, busy=True) == ""
        worker.start()
        asked: list[tuple[str, int, int]] = []

        def withdrawn() -> bool:
            for name, device in (("idle", idle), ("busy", busy)):
                if select.select([device], [], [], 0)[0]:
                    datagram = device.recv(65536)
                    asked.append((name, datagram[0], len(datagram)))
            return len(asked) == 2 and worker._peers["d1"].pending is None

        node.turn(withdrawn)
        assert asked == [(name, INITIATION, INITIATION_SIZE) for name in ("busy", "idle")]
        assert worker._peers["d2"].pending is not None
        worker.disconnect(0)


def test_where_a_device_is_that_has_come_is_told_before_the_next_report(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed in between is of no use to the next one."""
    monkeypatch.setattr(wireguard, "REPORT_S", 10 * DEADLINE_S)
    worker, mine = node.workers[1], engine.Node(node.secrets[1], rng=os.urandom)
    with trains.open_socket("127.0.0.1") as device:
        there = mine.add_peer(node.public, allowed=[(bytes(4), 0)], endpoint=node.sockets[1].getsockname())
        worker.start()

        def say(datagrams: list[bytes]) -> None:
            for datagram in datagrams:
                device.sendto(datagram, node.sockets[1].getsockname())

        def answered() -> bool:
            if select.select([device], [], [], 0)[0]:
                arrivals = Arrivals()
                mine.receive(
                    device.recv(65536), node.sockets[1].getsockname(), time.monotonic(), time.time_ns(), arrivals
                )
                say([datagram for _, datagram in arrivals.datagrams])
            return bool(node.heard)

        say(mine.initiate(there, time.monotonic(), time.time_ns()))
        node.turn(answered)
        assert [trains.sender(place) for place in node.heard if place is not None] == [device.getsockname()]
