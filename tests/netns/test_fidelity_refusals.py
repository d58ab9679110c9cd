"""Connections that don't come about: the client's kernel says what it would have said without Falkirk in between."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from tests.netns.fidelity import (
    DEADLINE_S,
    DENIED_PORT,
    MAIL_RULE,
    NO_ROUTE,
    Attempt,
    Way,
    World,
    begin,
    outcome,
    retransmitted,
    together,
)
from tools.netlab import wait_for

pytestmark = pytest.mark.netns
UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH)


def record(way: Way, event: str, address: str, port: int) -> dict[str, Any]:
    """The audit record of a connection that this way's client tried."""
    return way.world.recorded(event, port, address, way.client.device)


def closed_port(way: Way) -> int:
    with way.listener() as listener:
        return int(listener.getsockname()[1])


def full_listener(way: Way, host: str) -> tuple[socket.socket, socket.socket]:
    """A listener that drops SYNs, since its queue is full, and the connection that fills it."""
    listener = way.listener(backlog=0)
    filler = socket.create_connection((host, listener.getsockname()[1]), timeout=DEADLINE_S)
    return listener, filler


def test_a_closed_port_refuses_at_once(way: Way) -> None:
    port = closed_port(way)
    assert way.attempt(way.server, port) == Attempt(errno.ECONNREFUSED, retransmitted=0)
    assert record(way, "ended", way.server, port)["reason"] == "upstream_refused"


def test_a_denied_destination_refuses_at_once_and_is_never_dialled(way: Way) -> None:
    with way.listener(port=DENIED_PORT) as listener:
        assert way.attempt(way.server, DENIED_PORT) == Attempt(errno.ECONNREFUSED, retransmitted=0)
        found = record(way, "denied", way.server, DENIED_PORT)
        assert (found["reason"], found["rule"]) == ("denied", MAIL_RULE)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("reason", ["blackhole", "no_route"])
def test_nowhere_is_unreachable_at_once(way: Way, reason: str) -> None:
    address = way.host(7) if reason == "blackhole" else NO_ROUTE[way.family]
    attempt = way.attempt(address, 80)
    assert attempt.error in UNREACHABLE
    assert attempt.retransmitted == 0
    assert record(way, "denied", address, 80)["reason"] == reason


def test_a_host_that_is_not_there_is_unreachable(world: World) -> None:
    def attempt(way: Way) -> int:
        return way.attempt(way.host(5), 80).error

    assert set(together(attempt, world.ways())) <= set(UNREACHABLE)
    for way in world.ways():
        assert record(way, "ended", way.host(5), 80)["reason"] == "upstream_unreachable"


def test_a_server_that_does_not_answer_is_unreachable_after_the_routes_timeout(world: World) -> None:
    def attempt(way: Way) -> tuple[int, int]:
        listener, filler = full_listener(way, way.host(6))
        with listener, filler:
            port = listener.getsockname()[1]
            return port, way.attempt(way.host(6), port).error

    for way, (port, error) in zip(world.ways(), together(attempt, world.ways()), strict=True):
        assert error in (errno.EHOSTUNREACH, errno.ETIMEDOUT)
        assert record(way, "ended", way.host(6), port)["reason"] == "upstream_timeout"


def test_retransmitted_syns_make_one_connection(world: World) -> None:
    before = world.drops("syn_held")

    def attempt(way: Way) -> None:
        listener, filler = full_listener(way, way.server)
        with listener, filler, way.client.socket(way.family) as client:
            begun = begin(client, way.server, listener.getsockname()[1])
            # The server answers no SYN before the client has sent its own again.
            wait_for("a retransmitted SYN", lambda: retransmitted(client) > 0, DEADLINE_S)
            listener.accept()[0].close()
            assert outcome(client, begun).error == 0
            with listener.accept()[0] as server:
                client.sendall(b"x")
                assert server.recv(1) == b"x"
                listener.setblocking(False)
                with pytest.raises(BlockingIOError):
                    listener.accept()

    together(attempt, world.ways())
    wait_for("held SYNs in the statistics", lambda: world.drops("syn_held") >= before + len(world.ways()), DEADLINE_S)
