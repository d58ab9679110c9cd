"""The on-ramp's WireGuard in this process, two workers of it in one loop: what a process leaves behind for the next, and what one worker asks another."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from falkirk.linux import sieve, trains
from falkirk.onramp import neighbours
from falkirk.onramp.control import owner
from falkirk.onramp.neighbours import Neighbours
from falkirk.onramp.reactor import Reactor
from falkirk.onramp.tables import DeviceRow, NetworkRow, Tables, TenantRow
from falkirk.onramp.wireguard import WireGuard
from falkirk.wireguard.messages import INITIATION, INITIATION_SIZE

DEADLINE_S = 20.0
WORKERS = 2


class Node:
    """Both workers, each with a socket of its own, and a device of each."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reactor = Reactor()
        self.counts: list[Counter[str]] = [Counter() for _ in range(WORKERS)]
        self.tables = Tables()
        self.keys: list[bytes] = []
        rows: list[TenantRow | NetworkRow | DeviceRow] = [TenantRow("t", "acme"), NetworkRow("n", "t", "default", True)]
        for worker in range(WORKERS):
            while owner(key := os.urandom(32), WORKERS) != worker:
                pass
            self.keys.append(key)
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
                lambda *_: None,
                ways[worker],
                self._counter(worker),
            )
            for worker in range(WORKERS)
        ]

    def _counter(self, worker: int) -> Callable[[str, int], None]:
        def count(name: str, more: int) -> None:
            self.counts[worker][name] += more

        return count

    def run(self, until: socket.socket) -> bytes:
        """Turn until somebody has got something; what."""

        def look() -> bool:
            if select.select([until], [], [], 0)[0]:
                self.reactor.stop()
            return False

        self.reactor.after.append(look)
        self.reactor.later(DEADLINE_S, self.reactor.stop)
        self.reactor.run()
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
