"""What a stream's two peers see of each other through a worker: bytes, FIN, half-close, RST."""

from __future__ import annotations

import errno
import hashlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.wire.handover import Abort, DialFailed
from tests.process.upgrader_lock import Chamber, chamber, listen, readable, reset

FAMILIES = [socket.AF_INET, socket.AF_INET6]


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Chamber]:
    with chamber(tmp_path, family=request.param) as made:
        yield made


@pytest.fixture
def lock4(tmp_path: Path) -> Iterator[Chamber]:
    with chamber(tmp_path) as made:
        yield made


def _order(pair: tuple[socket.socket, socket.socket], first: str) -> tuple[socket.socket, socket.socket]:
    client, upstream = pair
    return (client, upstream) if first == "client" else (upstream, client)


def test_bytes_pass_both_ways_and_both_fins_finish_the_stream(lock: Chamber) -> None:
    client, upstream = lock.open()
    client.send(b"question")
    assert lock.read(upstream, 8) == b"question"
    upstream.send(b"answer")
    assert lock.read(client, 6) == b"answer"
    upstream.close()
    assert lock.at_end(client)
    client.close()
    closed = lock.closed()
    assert (closed.reason, closed.bytes_up, closed.bytes_down) == ("finished", 8, 6)
    assert lock.counters.read("streams") == 0


def test_a_server_that_speaks_first_and_ends_before_the_client_is_there(lock: Chamber) -> None:
    upstream = lock.hold()
    upstream.send(b"220 ready\r\n")
    upstream.shutdown(socket.SHUT_WR)
    for _ in range(3):
        lock.turn()
    client = lock.client()
    assert lock.read(client, 100) == b"220 ready\r\n"
    client.send(b"thanks")
    client.close()
    assert lock.read(upstream, 100) == b"thanks"
    assert lock.closed().reason == "finished"


def test_urgent_data_stays_in_the_stream_also_behind_bulk(lock: Chamber) -> None:
    client, upstream = lock.open()
    bulk = random.Random(5).randbytes(192 * 1024)
    for round_ in range(8):
        sent = 0
        received = b""
        while sent < len(bulk):
            try:
                sent += upstream.send(bulk[sent:])
            except BlockingIOError:
                received += lock.read(client, 32 * 1024)
        upstream.send(b"abc", socket.MSG_OOB)
        upstream.send(b"def")
        received += lock.read(client, len(bulk) + 6 - len(received))
        assert hashlib.sha256(received).digest() == hashlib.sha256(bulk + b"abcdef").digest(), round_


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_half_close(lock: Chamber, first: str) -> None:
    one, other = _order(lock.open(), first)
    one.send(b"all I have")
    one.shutdown(socket.SHUT_WR)
    assert lock.read(other, 100) == b"all I have"
    # The other direction stays open as long as its sender likes.
    for _ in range(3):
        other.send(b"more")
        assert lock.read(one, 4) == b"more"
    other.close()
    assert lock.at_end(one)
    assert lock.closed().reason == "finished"


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_a_reset_passes(lock: Chamber, first: str) -> None:
    one, other = _order(lock.open(), first)
    reset(one)
    assert lock.was_reset(other)
    assert lock.closed().reason == f"{first}_reset"


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_a_reset_passes_after_a_half_close(lock: Chamber, first: str) -> None:
    one, other = _order(lock.open(), first)
    one.shutdown(socket.SHUT_WR)
    assert lock.at_end(other)
    reset(one)
    # After a FIN the kernel tells of a RST to writers only, as EPIPE.
    lock.until(lambda: other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE)
    assert lock.closed().reason == f"{first}_reset"


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_bytes_before_a_reset_arrive(lock: Chamber, first: str) -> None:
    one, other = _order(lock.open(), first)
    one.send(b"400 bad request")
    reset(one)
    lock.closed()
    assert lock.read(other, 15) == b"400 bad request"
    assert lock.was_reset(other)


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_a_reset_passes_at_once_while_the_other_end_is_stalled(lock4: Chamber, first: str) -> None:
    one, other = _order(lock4.open(), first)
    lock4.write_until_full(one)
    reset(one)
    assert lock4.closed().reason == f"{first}_reset"
    assert lock4.was_reset(other)


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_a_stalled_end_that_resets(lock4: Chamber, first: str) -> None:
    one, other = _order(lock4.open(), first)
    lock4.write_until_full(other)
    reset(one)
    assert lock4.closed().reason == f"{first}_reset"
    assert lock4.was_reset(other)


@pytest.mark.parametrize("first", ["client", "upstream"])
def test_a_stalled_end_costs_no_turns_even_where_its_sender_has_finished(lock4: Chamber, first: str) -> None:
    """Sender: FIN sent behind bytes that the other doesn't take. Its FIN and ours make it HUP for as long as it takes."""
    sender, stalled = _order(lock4.open(), first)
    stalled.shutdown(socket.SHUT_WR)
    assert lock4.at_end(sender)
    way = "bytes_up" if first == "client" else "bytes_down"
    written = 0
    while written == lock4.counters.read(way):
        # Stop as soon as bytes wait: what is beyond the window would keep the FIN from getting here.
        written += sender.send(bytes(64 * 1024))
        for _ in range(4):
            lock4.turn(0.02)
    sender.shutdown(socket.SHUT_WR)
    for _ in range(5):
        lock4.turn(0.02)
    started, turns = time.monotonic(), 0
    while time.monotonic() - started < 0.5:
        lock4.worker.turn(0.1)
        turns += 1
    assert turns <= 10
    assert len(lock4.read(stalled, written)) == written
    assert lock4.at_end(stalled)
    assert lock4.closed().reason == "finished"


def test_a_stalled_client_stalls_only_itself(lock4: Chamber) -> None:
    stalled, flood = lock4.open(1, receive_buffer=4096)
    lock4.write_until_full(flood)
    client, upstream = lock4.open(2)
    for _ in range(100):
        client.send(b"ping")
        assert lock4.read(upstream, 4) == b"ping"
        upstream.send(b"pong")
        assert lock4.read(client, 4) == b"pong"
    assert stalled.fileno() > 0


@pytest.mark.parametrize("store", ["pipes", "memory", "memory_small_buffers"])
@pytest.mark.parametrize("seed", range(2))
def test_bulk_in_random_pieces_both_ways_at_once(
    lock: Chamber, seed: int, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying, splicing, stalls and partial writes, in every order: what arrives is what was sent."""
    if store != "pipes":
        monkeypatch.setattr("falkirk.upgrader.relay.MAX_PIPES", 0)
    if store == "memory_small_buffers":
        # The worker's sockets towards clients inherit this, so they take what waits in several pieces.
        lock.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    dice = random.Random(seed)
    ends = lock.open()
    content = [dice.randbytes(12_000_000), dice.randbytes(9_000_001)]
    sent, got = [0, 0], [bytearray(), bytearray()]
    deadline = time.monotonic() + 30
    finished = [False, False]
    while not all(finished):
        assert time.monotonic() < deadline
        for side in (0, 1):
            other = 1 - side
            if sent[side] < len(content[side]) and dice.random() < 0.8:
                size = dice.choice((1, 100, 1460, 65536, 300_000, 2_000_000))
                try:
                    sent[side] += ends[side].send(content[side][sent[side] : sent[side] + size])
                except BlockingIOError:
                    continue
                finally:
                    lock.turn(0)
                if sent[side] == len(content[side]):
                    ends[side].shutdown(socket.SHUT_WR)
            if not finished[other] and dice.random() < 0.6:
                try:
                    piece = ends[side].recv(dice.choice((1, 1000, 65536, 3_000_000)))
                except BlockingIOError:
                    lock.turn(0)
                    continue
                got[other] += piece
                finished[other] = not piece
    for side in (0, 1):
        assert hashlib.sha256(got[side]).digest() == hashlib.sha256(content[side]).digest()
    closed = lock.closed()
    assert (closed.reason, closed.bytes_up, closed.bytes_down) == ("finished", 12_000_000, 9_000_001)


def test_many_stalled_streams_use_up_pipes_and_still_arrive_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falkirk.upgrader.relay.MAX_PIPES", 2)
    with chamber(tmp_path) as lock:
        pairs = {slot: lock.open(slot) for slot in range(1, 6)}
        written = {slot: lock.write_until_full(upstream) for slot, (_, upstream) in pairs.items()}
        for slot, (client, upstream) in pairs.items():
            upstream.close()
            assert len(lock.read(client, written[slot] + 1)) == written[slot]
            client.close()
            assert lock.closed(slot).reason == "finished"


@pytest.mark.parametrize("reason", ["client_reset", "upstream_reset", "aborted"])
def test_what_waited_of_a_stream_that_was_reset_reaches_no_other(lock4: Chamber, reason: str) -> None:
    client, upstream = lock4.open(1)
    lock4.write_until_full(upstream)
    if reason == "aborted":
        lock4.say(Abort(1))
    else:
        reset(client if reason == "client_reset" else upstream)
    assert lock4.closed(1).reason == reason
    client, upstream = lock4.open(2)
    content, sent, got = b"B" * 6_000_000, 0, b""
    while len(got) < len(content):
        if sent < len(content):
            sent += upstream.send(content[sent : sent + 1_000_000])
        got += lock4.read(client, sent - len(got))
    assert got == content
    upstream.close()
    assert lock4.at_end(client)


def test_an_event_of_a_stream_that_ended_in_the_same_turn_is_not_taken_for_its_successors(lock4: Chamber) -> None:
    """The old upstream becomes writable after its stream was reset; its descriptor's number must not be a new dial's yet."""
    client, upstream = lock4.open(1)
    lock4.write_until_full(client)
    with listen(socket.AF_INET, 0) as full, socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        reset(client)
        lock4.prepare(2, full.getsockname()[1], connect_timeout_ms=300)
        while readable(upstream) and upstream.recv(1 << 20):
            pass
        assert lock4.hear(DialFailed).slot == 2
    assert lock4.closed(1).reason == "client_reset"


def test_small_writes_are_not_delayed_and_clients_inherit_the_reset(lock4: Chamber) -> None:
    assert lock4.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert lock4.listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("=ii", 1, 0)
