"""A group of real sockets on loopback: which one the kernel gives a datagram to."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from falkirk.linux import steering, trains

RESPONSE, COOKIE, DATA = 2, 3, 4


@pytest.fixture(params=["", "127.0.0.1"])
def address(request: pytest.FixtureRequest) -> str:
    """Of both families, or of one."""
    return str(request.param)


class Group:
    """A group, and somebody who sends to it."""

    def __init__(self, address: str, count: int, stack: ExitStack) -> None:
        self.members = [stack.enter_context(sock) for sock in steering.open_group(address, 0, count)]
        self.port = self.members[0].getsockname()[1]
        self._stack = stack
        self._buffer = memoryview(bytearray(trains.MAX_RECEIVE))

    def sender(self) -> socket.socket:
        """From another port each."""
        return self._stack.enter_context(trains.open_socket())

    def came(self, count: int) -> list[tuple[int, bytes]]:
        """So many datagrams: whose socket each came to, and its bytes. Trains are taken apart."""
        found: list[tuple[int, bytes]] = []
        while len(found) < count:
            readable = select.select(self.members, [], [], 10)[0]
            assert readable
            for sock in readable:
                got = trains.receive(sock, self._buffer)
                assert got is not None
                length, segment, _ = got
                place = self.members.index(sock)
                found += [
                    (place, bytes(self._buffer[at : min(at + segment, length)])) for at in range(0, length, segment)
                ]
        return found

    def send(self, sender: socket.socket, *datagrams: bytes, host: str = "127.0.0.1") -> None:
        """One after another, runs of one size as a train."""
        assert trains.send(sender, trains.destination(sender, host, self.port), datagrams) == 0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def message(kind: int, index: int, size: int) -> bytes:
    """Something that looks like one, to that receiver."""
    head = bytes((kind, 0, 0, 0)) + (bytes(4) if kind == RESPONSE else b"")
    return (head + index.to_bytes(4, "little")).ljust(size, b"\xee")


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_an_index_chooses_the_socket(address: str, count: int, stack: ExitStack) -> None:
    group = Group(address, count, stack)
    sender = group.sender()
    for host in ("127.0.0.1", "::1") if not address else ("127.0.0.1",):
        for kind, size in ((RESPONSE, 92), (COOKIE, 64), (DATA, 32), (DATA, 1452)):
            sent = [message(kind, 0xABCDE00 | first, size) for first in range(0, 256, 5)]
            for datagram in sent:
                group.send(sender, datagram, host=host)
            came = group.came(len(sent))
            assert sorted(datagram for _, datagram in came) == sorted(sent)
            at = 8 if kind == RESPONSE else 4
            assert all(place == datagram[at] % count for place, datagram in came)


def test_a_train_goes_whole_where_its_first_datagram_says(stack: ExitStack) -> None:
    group = Group("", 3, stack)
    sender = group.sender()
    for first in (4, 200):
        train = [message(DATA, first, 1452)] * 30 + [message(DATA, first, 148)]
        group.send(sender, *train)
        assert group.came(len(train)) == [(first % 3, datagram) for datagram in train]


@pytest.mark.parametrize(
    "datagram",
    [
        b"\1\0\0\0".ljust(148, b"\5"),
        b"\4\0\0\0\5".ljust(31, b"\0"),
        b"\3",
        b"",
        b"\0" * 200,
        b"\5\0\0\0".ljust(92, b"\5"),
    ],
    ids=["initiation", "short", "one byte", "empty", "zeros", "no type"],
)
def test_without_an_index_a_sender_has_one_socket_and_senders_have_several(
    address: str, datagram: bytes, stack: ExitStack
) -> None:
    group = Group(address, 3, stack)
    used = set()
    for _ in range(40):
        sender = group.sender()
        for _ in range(2):
            group.send(sender, datagram)
        places = {place for place, _ in group.came(2)} if datagram else _places(group, 2)
        assert len(places) == 1
        used |= places
    # That 40 senders all have the same hash modulo 3 by chance: once in 10^18.
    assert len(used) > 1


def _places(group: Group, count: int) -> set[int]:
    """Where empty datagrams came."""
    places: set[int] = set()
    while count:
        for sock in select.select(group.members, [], [], 10)[0]:
            sock.recv(1)
            places.add(group.members.index(sock))
            count -= 1
    return places


def test_one_worker_has_a_socket_of_its_own(stack: ExitStack) -> None:
    group = Group("", 1, stack)
    assert group.members[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
    group.send(group.sender(), message(DATA, 5, 100))
    assert group.came(1) == [(0, message(DATA, 5, 100))]


@pytest.mark.parametrize("count", [1, 3])
def test_a_port_that_another_group_has_is_refused(count: int, stack: ExitStack) -> None:
    """Also a group of this very user, who might share it as far as the kernel is concerned."""
    group = Group("", 3, stack)
    with pytest.raises(OSError, match="in use") as caught:
        steering.open_group("", group.port, count)
    assert caught.value.errno == errno.EADDRINUSE
