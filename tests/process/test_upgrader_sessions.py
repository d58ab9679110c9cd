"""Sockets of sessions: opened by the upgrader worker, and flow's own from then on."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.upgrader import sessions
from falkirk.wire.handover import MAX_DESCRIPTORS, OpenSocket, SocketFailed, SocketOpened
from tests.process.upgrader_lock import Chamber, chamber, packed

FAMILIES = [socket.AF_INET, socket.AF_INET6]


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chamber]:
    with chamber(tmp_path, family=request.param) as made:
        yield made


@pytest.fixture
def far(lock: Chamber) -> Iterator[socket.socket]:
    with socket.socket(lock.family, socket.SOCK_DGRAM) as sock:
        sock.bind((socket.inet_ntop(lock.family, packed(lock.family)), 0))
        sock.settimeout(10)
        yield sock


def wish(lock: Chamber, far: socket.socket, token: int = 1, **fields: object) -> OpenSocket:
    given: dict[str, object] = {
        "protocol": 17,
        "destination": packed(lock.family),
        "port": far.getsockname()[1],
        "egress": b"",
        "local": 0,
        "flow_id": bytes(16),
    }
    return OpenSocket(token, **(given | fields))  # type: ignore[arg-type]


def given(lock: Chamber) -> tuple[SocketOpened, socket.socket]:
    opened = lock.hear(SocketOpened)
    # The devices' descriptors came with the hello.
    return opened, socket.socket(lock.family, socket.SOCK_DGRAM, fileno=lock.fds.pop())


def test_a_connected_socket_comes(lock: Chamber, far: socket.socket) -> None:
    lock.say(wish(lock, far, 7, span_id=b"12345678"))
    opened, sock = given(lock)
    with sock:
        assert (opened.token, opened.raw) == (7, False)
        assert sock.getsockname()[1] == opened.local
        assert sock.getpeername() == far.getsockname()
        assert not os.get_blocking(sock.fileno())
        sock.send(b"hello")
        assert far.recvfrom(10)[1][1] == opened.local
    assert lock.counters.read("socket_opened") == 1
    assert [(span.name, span.status) for span in lock.spans] == [("dial", "")]


def test_a_port_is_shared_where_flow_says_so_and_by_nobody_else(lock: Chamber, far: socket.socket) -> None:
    lock.say(wish(lock, far))
    opened, first = given(lock)
    with first, socket.socket(lock.family, socket.SOCK_DGRAM) as other:
        other.bind((far.getsockname()[0], 0))
        other.settimeout(10)
        lock.say(wish(lock, other, local=opened.local))
        _, second = given(lock)
        with second:
            first.send(b"1")
            second.send(b"2")
            assert far.recvfrom(10)[1] == other.recvfrom(10)[1]
            with socket.socket(lock.family, socket.SOCK_DGRAM) as stranger:
                for number, sock in enumerate((far, other, stranger)):
                    sock.sendto(bytes([number]), second.getsockname())
            for number, sock in enumerate((first, second)):
                assert sock.recv(10) == bytes([number])
                with pytest.raises(BlockingIOError):
                    sock.recv(10)
        with socket.socket(lock.family, socket.SOCK_DGRAM) as thief, pytest.raises(OSError, match="in use"):
            thief.bind(first.getsockname())


def test_the_egress_address_is_used(tmp_path: Path) -> None:
    with chamber(tmp_path) as lock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        lock.say(wish(lock, far, egress=socket.inet_aton("127.9.9.9")))
        _, sock = given(lock)
        with sock:
            assert sock.getsockname()[0] == "127.9.9.9"


@pytest.mark.parametrize(
    ("fields", "code", "counter"),
    [
        ({"egress": socket.inet_aton("192.0.2.1")}, errno.EADDRNOTAVAIL, "socket_no_address"),
        ({"egress": bytes(16)}, errno.EAFNOSUPPORT, "socket_failed"),
        ({"destination": bytes(3)}, errno.EAFNOSUPPORT, "socket_failed"),
        ({"protocol": 58}, errno.EPROTONOSUPPORT, "socket_unsupported"),
        ({"protocol": 6}, errno.EPROTONOSUPPORT, "socket_unsupported"),
        ({"port": 0}, errno.EINVAL, "socket_failed"),
        ({"destination": socket.inet_aton("255.255.255.255")}, errno.EACCES, "socket_not_permitted"),
    ],
)
def test_what_can_not_be_opened_says_why(tmp_path: Path, fields: dict[str, object], code: int, counter: str) -> None:
    with chamber(tmp_path) as lock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        lock.say(wish(lock, far, 9, **fields))
        assert lock.hear(SocketFailed) == SocketFailed(9, code)
        assert lock.counters.read(counter) == 1


def test_a_port_that_is_taken_is_told(lock: Chamber, far: socket.socket) -> None:
    lock.say(wish(lock, far, local=far.getsockname()[1]))
    assert lock.hear(SocketFailed).errno == errno.EADDRINUSE
    assert lock.counters.read("socket_no_port") == 1


def test_a_worker_that_drains_opens_none(lock: Chamber, far: socket.socket) -> None:
    lock.worker.draining = True
    lock.say(wish(lock, far))
    assert lock.hear(SocketFailed).errno == errno.ESHUTDOWN


def test_more_than_a_datagram_carries_come_in_order(lock: Chamber, far: socket.socket) -> None:
    before = len(lock.fds)
    count = 3 * MAX_DESCRIPTORS + 1
    lock.say(*(wish(lock, far, token) for token in range(1, count + 1)))
    opened = [lock.hear(SocketOpened) for _ in range(count)]
    assert [one.token for one in opened] == list(range(1, count + 1))
    socks = [socket.socket(lock.family, socket.SOCK_DGRAM, fileno=fd) for fd in lock.fds[before:]]
    del lock.fds[before:]
    assert [sock.getsockname()[1] for sock in socks] == [one.local for one in opened]
    for sock in socks:
        sock.close()


def test_the_workers_end_costs_no_session(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        far.settimeout(10)
        with chamber(tmp_path) as lock:
            lock.say(wish(lock, far))
            _, sock = given(lock)
        with sock:
            sock.send(b"still here")
            data, peer = far.recvfrom(100)
            far.sendto(data, peer)
            sock.setblocking(True)
            assert sock.recv(100) == b"still here"


def test_every_outcome_has_its_counter() -> None:
    from falkirk.upgrader.control import COUNTERS

    codes = [0, *errno.errorcode]
    assert {sessions.kind(code) for code in codes} <= set(COUNTERS)
