"""Registry, policy and router stand still: decisions go on as they last said, even by a flow service that starts anew."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.netns.fidelity import (
    DEADLINE_S,
    DENIED_PORT,
    MAIL_RULE,
    NO_ROUTE,
    Way,
    World,
    open_world,
)
from tools.mesh import health
from tools.netlab import wait_for
from tools.processes import descendants

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
STOPPED = ("registry", "policy", "router")


@pytest.fixture(scope="module", params=[1, 3], ids=["1-worker", "3-workers"])
def orphaned(request: pytest.FixtureRequest) -> Iterator[World]:
    """A mesh whose registry, policy and router are stopped, with clients that were there before."""
    with ExitStack() as stack:
        world = stack.enter_context(open_world(request.param))
        world.ways()
        for service in STOPPED:
            pid = service_pid(world, service)
            for process in (pid, *descendants(pid)):
                stack.callback(os.kill, process, signal.SIGCONT)
                os.kill(process, signal.SIGSTOP)
        yield world


def service_pid(world: World, service: str) -> int:
    """By its lock; 0 while a new one is about to write its number."""
    return int((world.mesh.run_dir / f".{service}.lock").read_text() or 0)


def decides_rightly(way: Way) -> list[tuple[str, int]]:
    """What the rules and routes say is what happens; (event, port) of what must be in the audit log."""
    with way.pair() as (client, server):
        port = int(server.getsockname()[1])
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        server.sendall(b"y")
        assert client.recv(1) == b"y"
    assert way.attempt(way.server, DENIED_PORT).error == errno.ECONNREFUSED
    assert way.attempt(way.host(7), 80).error in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    assert way.attempt(NO_ROUTE[way.family], 80).error in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    return [("started", port), ("ended", port), ("denied", DENIED_PORT)]


def test_decisions_go_on_and_survive_the_flow_service(orphaned: World) -> None:
    owed = [(way, *event) for way in orphaned.ways() for event in decides_rightly(way)]
    killed = service_pid(orphaned, "flow")
    os.kill(killed, signal.SIGKILL)
    flow = orphaned.mesh.run_dir / "read" / "flow.sock"
    wait_for("a new flow service", lambda: service_pid(orphaned, "flow") not in (0, killed), DEADLINE_S)
    wait_for("it to serve from its disk replica", lambda: health(flow) == "SERVING", DEADLINE_S)
    sources = {replica.source for replica in orphaned.stats("flow").replicas}
    assert sources == {"disk"}
    owed += [(way, *event) for way in orphaned.ways() for event in decides_rightly(way)]
    for service in STOPPED:
        pid = service_pid(orphaned, service)
        for process in (pid, *descendants(pid)):
            os.kill(process, signal.SIGCONT)
    for way, event, port in owed:
        found = orphaned.recorded(event, port, way.server, way.client.device)
        if event == "denied":
            assert found["rule"] == MAIL_RULE
