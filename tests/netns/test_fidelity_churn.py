"""Connections come and go by the thousand, and leave nothing behind in any process: no flow, no descriptor, no memory."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.fidelity import DEADLINE_S, Process, Way, World, together
from tools.load import echo_server
from tools.netlab import LabError, wait_for

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]
PORTS = range(7001, 7009)
"""One egress address has 28,000 ports for each of these."""
PARALLEL = 64
"""At a time, on each way."""
CONNECTIONS = int(os.environ.get("FALKIRK_CHURN", "3000"))
"""In a round; what leaks does so in a few thousand. More, by the environment, tell it more exactly; `tools/soak churn` makes a million."""
MOST_ROUNDS = 6
SLACK = 8
"""Descriptors that a service may have opened for itself meanwhile, for a call to another; what a connection leaves behind would be thousands."""
WORDS = b"0123456789abcdef"


@pytest.fixture(scope="module")
def echo(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An echo server on PORTS."""
    log = tmp_path_factory.mktemp("echo") / "log"
    with log.open("wb") as output:
        program = [sys.executable, str(Path(echo_server.__file__).resolve()), *map(str, PORTS)]
        process = world.server.popen(program, stdin=-3, stdout=output)
    wait_for("the echo server", lambda: log.read_text().startswith("ready"), DEADLINE_S)
    yield
    process.kill()


def churn(way: Way, count: int) -> int:
    """Open `count` connections, PARALLEL at a time, exchange a few bytes on each and close it; how many went well."""
    poll = select.epoll()
    live: dict[int, socket.socket] = {}
    begun = good = 0
    with poll:
        while begun < count or live:
            while begun < count and len(live) < PARALLEL:
                sock = socket.socket(way.family)
                sock.setblocking(False)
                sock.connect_ex((way.server, PORTS[begun % len(PORTS)]))
                begun += 1
                live[sock.fileno()] = sock
                poll.register(sock, select.EPOLLOUT)
            ready = poll.poll(DEADLINE_S)
            assert ready, f"nothing moves after {good} connections"
            for descriptor, events in ready:
                sock = live[descriptor]
                if events == select.EPOLLOUT:
                    sock.send(WORDS)
                    poll.modify(sock, select.EPOLLIN)
                    continue
                good += sock.recv(64) == WORDS
                del live[descriptor]
                sock.close()
    return good


def held(world: World) -> dict[str, Process]:
    """What each process holds once no flow is left."""

    def quiet() -> bool:
        workers = world.stats("flow").workers
        totals = Counter({counter.name: 0 for worker in workers for counter in worker.counters})
        for worker in workers:
            totals.update({counter.name: counter.value for counter in worker.counters})
        return totals["started"] == totals["ended"] and not any(worker.slots_active for worker in workers)

    wait_for("the last flow's end", quiet, DEADLINE_S)
    return world.processes()


def settled(earlier: dict[str, Process], later: dict[str, Process]) -> bool:
    return all(later[name].resident <= process.resident * 1.01 for name, process in earlier.items())


@pytest.mark.usefixtures("echo")
def test_connections_leave_nothing_behind(world: World, record_property: Callable[[str, object], None]) -> None:
    def of_all_ways(count: int) -> dict[str, Process]:
        share = count // len(world.ways())
        assert together(lambda way: way.client.call(churn, way, share), world.ways()) == [share] * len(world.ways())
        return held(world)

    before = of_all_ways(PARALLEL)
    rounds = [of_all_ways(CONNECTIONS) for _ in range(3)]
    # A leak grows in every round; an allocator's last page comes late in one or two.
    while not settled(*rounds[-2:]) and len(rounds) < MOST_ROUNDS:
        rounds.append(of_all_ways(CONNECTIONS))
    record_property("rounds", len(rounds))
    assert settled(*rounds[-2:]), rounds

    def more() -> dict[str, tuple[int, int]]:
        now = world.processes()
        found = {name: (process.descriptors, now[name].descriptors) for name, process in before.items()}
        return {name: (then, at_last) for name, (then, at_last) in found.items() if at_last > then + SLACK}

    try:
        wait_for("the descriptors of before", lambda: not more(), DEADLINE_S)
    except LabError:
        assert not more()
