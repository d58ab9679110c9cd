"""The sieve of a real socket on loopback: what it lets in, and that what it doesn't is counted."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from falkirk.linux import sieve, trains
from falkirk.wireguard.messages import INITIATION_SIZE, MAC_SIZE

PLAIN = b"\x01\0\0\0" + b"\xee" * (INITIATION_SIZE - MAC_SIZE - 4) + bytes(MAC_SIZE)
OTHERS = {
    "cookie in its first word": PLAIN[:-16] + b"\1" + bytes(15),
    "cookie in its last word": PLAIN[:-1] + b"\1",
    "response": b"\x02" + PLAIN[1:92],
    "data of an initiation's size": b"\x04" + PLAIN[1:],
    "not all zeros behind the type": b"\x01\0\0\1" + PLAIN[4:],
    "shorter": PLAIN[:-1],
    "longer": PLAIN + b"\0",
    "nothing": b"",
}


@pytest.fixture(params=["", "127.0.0.1"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket of both families or of one, and one that sends to it."""
    with trains.open_socket(request.param) as near, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.connect(("127.0.0.1", near.getsockname()[1]))
        yield near, far


def came(sock: socket.socket) -> bytes:
    assert select.select([sock], [], [], 10)[0]
    return sock.recv(65536)


def test_only_initiations_without_a_cookie_stay_outside(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    sieve.let_in(near, 0)
    for other in OTHERS.values():
        before = sieve.unread(near)
        far.send(PLAIN)
        far.send(other)
        assert came(near) == other
        assert sieve.unread(near) == before + 1
    sieve.let_in(near, 1)
    far.send(PLAIN)
    assert came(near) == PLAIN
    sieve.let_in(near, 1)


def test_a_share_is_a_share(ends: tuple[socket.socket, socket.socket]) -> None:
    """1,000 with a share of a quarter: 250 come, and five times the standard deviation (14) is allowed for."""
    near, far = ends
    sieve.let_in(near, 0.25)
    got = 0
    for _ in range(1000):
        far.send(PLAIN)
        while select.select([near], [], [], 0)[0]:
            got += near.recv(200) == PLAIN
    far.send(os.urandom(5))
    while came(near) == PLAIN:
        got += 1
    assert 180 < got < 320
    assert sieve.unread(near) == 1000 - got
