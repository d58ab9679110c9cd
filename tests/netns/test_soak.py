"""`tools/soak` in small: sessions and churned flows leave the books as they were. Counts, no times."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.netns.fidelity import World
from tools.soak import CONNECTIONS, SERVER, Books, Held, Soak, leaks, opened

pytestmark = pytest.mark.netns
SESSIONS, ROUNDS, FLOWS = 300, 4, 3000


@pytest.fixture
def soak(world: World) -> Iterator[Soak]:
    """The session's mesh under observation, without other clients."""
    world.hang_up()
    address = world.server.address4
    server = world.server.popen([sys.executable, str(SERVER), address], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    udp_port, tcp_port = (int(port) for port in server.stdout.readline().split())
    path = world.mesh.run_dir / "tunnel.sock"
    yield Soak(
        world.pid,
        lambda: world.stats("flow"),
        lambda: opened(path, (address, udp_port, tcp_port), device=world.device(0)),
    )
    server.kill()
    server.wait()
    server.stdout.close()


def test_sessions_leave_nothing(soak: Soak) -> None:
    soak.sessions(SESSIONS, 1, 0.0)
    before = soak.at_rest()
    count, during = soak.sessions(SESSIONS, ROUNDS, 0.0)
    assert (count.done, count.lost, count.refused, count.wrong) == (SESSIONS * ROUNDS, 0, 0, 0)
    assert during.flows == SESSIONS
    assert sum(held.descriptors for held in during.processes.values()) >= SESSIONS
    assert leaks(before, soak.at_rest(), memory=None) == []


def test_churned_flows_leave_nothing(soak: Soak) -> None:
    soak.churn(100)
    before = soak.at_rest()
    count = soak.churn(FLOWS)
    assert (count.done, count.lost, count.refused, count.wrong) == (FLOWS, 0, 0, 0)
    assert leaks(before, soak.at_rest(), memory=None) == []


def test_a_leak_is_told() -> None:
    before = Books({"1 falkirk.flow.worker": Held(10, 1000), "2 falkirk.policy": Held(5, 1000)}, 0, 0)
    assert leaks(before, before) == []
    more = Books({"1 falkirk.flow.worker": Held(11 + CONNECTIONS, 1100), "2 falkirk.policy": Held(5, 2000)}, 1, 2)
    assert [leak.split(": ")[0] for leak in leaks(before, more)] == ["flows", "slots", *2 * ["1 falkirk.flow.worker"]]
    assert len(leaks(before, more, memory=None)) == 3
    assert leaks(before, Books({}, 0, 0))[0].startswith("processes")
