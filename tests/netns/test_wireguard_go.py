"""Our engine against Debian's wireguard-go, an implementation of its own, in both roles; and against itself.

Limit: needs root, wireguard-go and wg.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.linux import trains
from falkirk.wireguard import primitives
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from tests.netns.wireguard_rig import DEADLINE_S, PORT, Ours, Side, Stock, cabled, pour, text, until
from tests.unit.wireguard.pair import randomness

pytestmark = pytest.mark.netns
MEGABYTES = 16


@contextlib.contextmanager
def pair(client: type[Ours | Stock], server: type[Ours | Stock], folder: Path) -> Iterator[tuple[Side, Side]]:
    """A client that has called its server."""
    one, other = client(1, folder), server(2, folder)
    with cabled(one, other):
        other.start(one)
        one.start(other, endpoint=f"{other.outer}:{PORT}")
        yield one, other


@pytest.mark.parametrize(("client", "server"), [(Stock, Ours), (Ours, Stock), (Ours, Ours)])
def test_packets_of_both_families_and_streams_both_ways(
    client: type[Ours | Stock], server: type[Ours | Stock], tmp_path: Path
) -> None:
    with pair(client, server, tmp_path) as (one, other):
        assert one.ping(other.inner)
        assert one.ping(other.inner6)
        # Full packets without room for padding, and fragments.
        assert other.ping(one.inner, size=1392)
        assert other.ping(one.inner6, size=4000)
        for sender, receiver, address in ((one, other, other.inner), (other, one, one.inner6)):
            sent, came = pour(sender, receiver, address, MEGABYTES)
            assert sent == came
        for side in (one, other):
            if isinstance(side, Ours):
                (peer,) = side.state()["peers"]
                assert peer["connected"]
                assert peer["received_bytes"] > MEGABYTES << 20
                assert not set(side.state()["dropped"]) - {"no_peer"}


class Conversation:
    """A TCP connection from the client to the server, through whatever happens below it."""

    def __init__(self, one: Side, other: Side) -> None:
        with other.call(lambda: socket.create_server((other.inner, 0))) as listener:
            port = listener.getsockname()[1]
            self.there = one.call(lambda: socket.create_connection((other.inner, port), timeout=DEADLINE_S))
            self.here, _ = listener.accept()
        self.here.settimeout(DEADLINE_S)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.there.close()
        self.here.close()

    def exchange(self, words: bytes) -> None:
        """There and back."""
        self.there.sendall(words)
        assert self.here.recv(100) == words
        self.here.sendall(words)
        assert self.there.recv(100) == words


def test_a_stream_outlives_a_new_port_another_family_and_a_new_session(tmp_path: Path) -> None:
    """wireguard-go roams, then forgets its sessions and asks for another."""
    with pair(Stock, Ours, tmp_path) as (one, other), Conversation(one, other) as talk:
        assert isinstance(other, Ours)

        def peer() -> dict[str, Any]:
            return dict(other.state()["peers"][0])

        talk.exchange(b"before")
        one.run("wg", "set", one.name, "listen-port", "7777")
        talk.exchange(b"another port")
        assert peer()["endpoint"] == f"{one.outer}:7777"
        one.run("wg", "set", one.name, "peer", text(other.public), "endpoint", f"[{other.outer6}]:{PORT}")
        talk.exchange(b"another family")
        assert peer()["endpoint"] == f"[{one.outer6}]:7777"
        before = peer()["handshake_age_s"]
        one.run("wg", "set", one.name, "peer", text(other.public), "remove")
        place = ("allowed-ips", f"{other.inner}/32,{other.inner6}/128", "endpoint", f"{other.outer}:{PORT}")
        one.run("wg", "set", one.name, "peer", text(other.public), *place)
        talk.exchange(b"another session")
        assert peer()["handshake_age_s"] < before
        # wireguard-go may ask twice at once when its peer is set anew.
        assert not set(other.state()["dropped"]) - {"no_peer", "early_initiation"}


def test_our_client_goes_on_from_a_new_address(tmp_path: Path) -> None:
    with pair(Ours, Stock, tmp_path) as (one, other), Conversation(one, other) as talk:
        talk.exchange(b"before")
        one.run("ip", "address", "del", f"{one.outer}/24", "dev", "eth0")
        one.add_outer("198.51.100.77")
        talk.exchange(b"another address")
        assert "198.51.100.77:" in other.run("wg", "show", other.name, "endpoints")


def test_wireguard_go_brings_the_cookie_that_it_was_asked_for(tmp_path: Path) -> None:
    """Our node is under load: the first initiation is answered by a cookie, and the next one, after five seconds, with it by a session."""
    one, other = Stock(1, tmp_path), Side(2, tmp_path)
    with cabled(one, other):
        node = Node(other.secret, rng=randomness("cookie"))
        node.guard.forced = True
        peer = node.add_peer(one.public, allowed=[(bytes((10, 77, 0, 1)), 32)])
        sock = other.call(lambda: trains.open_socket(port=PORT))
        ended = threading.Event()
        buffer = memoryview(bytearray(trains.MAX_RECEIVE))

        def serve() -> None:
            while not ended.is_set():
                select.select([sock], [], [], 0.1)
                arrivals = Arrivals()
                while got := trains.receive(sock, buffer):
                    length, segment, address = got
                    node.receive(buffer[:length], address, time.monotonic(), time.time_ns(), arrivals, segment)
                for address, datagram in arrivals.datagrams:
                    trains.send(sock, address, (datagram,))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            one.start(other, endpoint=f"{other.outer}:{PORT}", keepalive_s=1)
            until(lambda: peer.current, "a session")
        finally:
            ended.set()
            thread.join()
            sock.close()
    assert {reason for reason, count in node.counters.items() if count} == {"no_cookie"}
    assert peer.timestamp != b""


def test_who_has_another_key_gets_nothing(tmp_path: Path) -> None:
    """The server knows a key that the client hasn't; it says nothing at all, and counts."""
    one, other = Stock(1, tmp_path), Ours(2, tmp_path)
    with cabled(one, other):
        known, one.public = one.public, primitives.public_key(hashlib.sha256(b"somebody else").digest())
        other.start(one)
        one.public = known
        one.start(other, endpoint=f"{other.outer}:{PORT}", keepalive_s=1)
        until(lambda: "unknown_key" in other.state()["dropped"], "an initiation")
        assert not one.ping(other.inner)
        assert one.handshake() == 0
        assert not other.state()["peers"][0]["connected"]
