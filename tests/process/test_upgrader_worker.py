"""Slots of an upgrader worker: dials, time-outs, ends, who may speak to it, and its death."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.linux import seqpacket
from falkirk.wire import handover
from falkirk.wire.handover import Abort, AbortAll, Closed, Connected, Devices, DialFailed, Hello, Prepare
from tests.process.upgrader_lock import DEADLINE_S, Chamber, chamber, listen, reset

WORKER = Path(__file__).with_name("upgrader_worker_process.py")
SOURCE = WORKER.parents[2] / "services"


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Chamber]:
    with chamber(tmp_path) as made:
        yield made


def test_a_flow_worker_gets_hello_and_devices(lock: Chamber) -> None:
    assert lock.said == [Hello("upgrader", 0, 5), Devices(1, 1024, 1500)]
    assert len(lock.fds) == 4
    assert lock.counters.read("paired") == 1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_closed_port_is_refused(tmp_path: Path, family: socket.AddressFamily) -> None:
    with listen(family) as gone:
        port = gone.getsockname()[1]
    with chamber(tmp_path, family=family) as lock:
        lock.prepare(1, port)
        failed = lock.hear(DialFailed)
        assert (failed.slot, failed.errno) == (1, errno.ECONNREFUSED)
        assert failed.dial_ns > 0
        assert (lock.counters.read("dial_refused"), lock.counters.read("dialling")) == (1, 0)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"treatment": "http"}, errno.EPROTONOSUPPORT),
        ({"egress": bytes(16)}, errno.EAFNOSUPPORT),
        ({"egress": bytes([192, 0, 2, 1])}, errno.EADDRNOTAVAIL),
        ({"destination": b"?"}, errno.EAFNOSUPPORT),
        ({"destination": bytes([255, 255, 255, 255])}, errno.ENETUNREACH),
    ],
)
def test_what_can_not_be_dialled_says_why(lock: Chamber, fields: dict[str, object], code: int) -> None:
    lock.prepare(**fields)  # type: ignore[arg-type]
    assert lock.hear(DialFailed).errno == code


def test_an_upstream_that_does_not_answer_times_out(lock: Chamber) -> None:
    with listen(socket.AF_INET, 0) as full, socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        lock.prepare(1, full.getsockname()[1], connect_timeout_ms=300)
        failed = lock.hear(DialFailed)
    assert failed.errno == errno.ETIMEDOUT
    assert failed.dial_ns >= 300_000_000
    assert lock.counters.read("dialling") == 0


def test_the_egress_address_is_used(lock: Chamber) -> None:
    upstream = lock.hold(egress=socket.inet_aton("127.9.9.9"))
    assert upstream.getpeername()[0] == "127.9.9.9"


def test_descriptors_run_out_with_a_reason(tmp_path: Path) -> None:
    with chamber(tmp_path, capacity=2) as lock:
        lock.hold(1)
        lock.hold(2)
        lock.prepare(3)
        failed = lock.hear(DialFailed)
        assert (failed.slot, failed.errno) == (3, errno.EMFILE)


def test_a_client_that_never_comes(tmp_path: Path) -> None:
    with chamber(tmp_path, open_timeout_s=0.3) as lock:
        upstream = lock.hold()
        assert lock.closed().reason == "never_opened"
        assert lock.was_reset(upstream)


def test_a_silent_stream_ends_and_a_busy_one_does_not(lock: Chamber) -> None:
    client, upstream = lock.open(1, idle_timeout_s=1)
    busy_client, busy_upstream = lock.open(2, idle_timeout_s=1)
    while not any(isinstance(message, Closed) for message in lock.said):
        busy_client.send(b".")
        assert lock.read(busy_upstream, 1) == b"."
        lock.turn(0.05)
    assert lock.closed(1).reason == "idle"
    assert lock.was_reset(client)
    assert lock.was_reset(upstream)
    assert lock.closed(2).reason == "idle"


def test_an_upstream_that_resets_before_the_client_is_there(lock: Chamber) -> None:
    reset(lock.hold())
    assert lock.closed().reason == "upstream_reset"
    assert lock.was_reset(lock.client())


def test_a_client_from_a_slot_where_none_is_expected(lock: Chamber) -> None:
    assert lock.was_reset(lock.client(9))
    assert lock.counters.read("accept_unknown_slot") == 1


def test_a_second_client_of_one_slot(lock: Chamber) -> None:
    client, upstream = lock.open()
    assert lock.was_reset(lock.client())
    client.send(b"still here")
    assert lock.read(upstream, 10) == b"still here"


def test_abort_at_every_phase(lock: Chamber) -> None:
    with listen(socket.AF_INET, 0) as full, socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        lock.prepare(1, full.getsockname()[1])
        held = lock.hold(2)
        client, upstream = lock.open(3)
        lock.say(Abort(1), Abort(2), Abort(3), Abort(4))
        assert [lock.closed(slot).reason for slot in (1, 2, 3)] == ["aborted"] * 3
    for sock in (held, client, upstream):
        assert lock.was_reset(sock)
    lock.turn()
    assert lock.said[2:] == []


def test_a_slot_that_flow_prepares_again_forgets_the_old_stream(lock: Chamber) -> None:
    client, upstream = lock.open()
    again, server = lock.open()
    assert lock.was_reset(client)
    assert lock.was_reset(upstream)
    again.send(b"new")
    assert lock.read(server, 3) == b"new"
    assert not any(isinstance(message, Closed) for message in lock.said)


def test_more_answers_than_a_datagram_or_the_pair_holds(tmp_path: Path) -> None:
    """Nothing is lost or reordered while flow doesn't read."""
    with chamber(tmp_path, capacity=10_000) as lock:
        flow = lock.flow
        assert flow is not None
        wishes = [
            Prepare(slot, bytes(16), bytes(4), 1, b"", 1000, 10, "nothing")
            for slot in range(40 * handover.MAX_MESSAGES)
        ]
        for batch in handover.batches(list(wishes)):
            assert seqpacket.send(flow, batch)
            lock.worker.turn(0)
        for _ in range(10):
            lock.worker.turn(0)
        lock.until(lambda: len(lock.said) == 2 + len(wishes))
        assert [message.slot for message in lock.said[2:] if isinstance(message, DialFailed)] == list(
            range(len(wishes))
        )


def test_streams_outlive_a_flow_worker_and_its_successor_clears_them(lock: Chamber) -> None:
    client, upstream = lock.open()
    assert lock.flow is not None
    lock.flow.close()
    lock.flow = None
    lock.until(lambda: not lock.counters.read("paired"))
    client.send(b"on")
    assert lock.read(upstream, 2) == b"on"
    lock.said.clear()
    lock.flow = lock.connect_flow(11)
    lock.hear(Devices)
    lock.say(AbortAll())
    assert lock.closed().reason == "aborted"
    assert lock.was_reset(client)


def test_a_newer_flow_worker_replaces_and_an_older_is_refused(lock: Chamber) -> None:
    old, lock.flow = lock.flow, lock.connect_flow(11)
    assert old is not None
    lock.said.clear()
    lock.hear(Devices)
    assert seqpacket.receive(old, 10) == (b"", [])
    late = lock.connect_flow(9)
    lock.until(lambda: lock.counters.read("peer_refused") == 1)
    assert seqpacket.receive(late, 10) == (b"", [])
    lock.hold()


@pytest.mark.parametrize("fields", [{"role": "onramp"}, {"worker": 1}, {"protocol": 99}])
def test_a_hello_that_does_not_fit_is_refused(lock: Chamber, fields: dict[str, object]) -> None:
    stranger = lock.connect_flow(12, **fields)
    lock.until(lambda: lock.counters.read("peer_refused") == 1)
    assert seqpacket.receive(stranger, 10) == (b"", [])
    lock.hold()


def test_a_foreign_uid_is_refused(tmp_path: Path) -> None:
    with chamber(tmp_path, uids=(os.getuid() + 1,), connect=False) as lock:
        stranger = lock.connect_flow(12)
        lock.until(lambda: lock.counters.read("peer_refused") == 1)
        assert seqpacket.receive(stranger, 10) == (b"", [])


@pytest.mark.parametrize("data", [b"?", b"\x91\x91\xa7Prepare", handover.encode([Closed(1, "x", 0, 0)])])
def test_a_datagram_that_is_no_message_ends_the_pair_but_no_stream(lock: Chamber, data: bytes) -> None:
    client, upstream = lock.open()
    assert lock.flow is not None
    seqpacket.send(lock.flow, data)
    lock.until(lambda: lock.counters.read("message_refused") == 1)
    lock.until(lambda: not lock.counters.read("paired"))
    client.send(b"on")
    assert lock.read(upstream, 2) == b"on"


def test_strangers_that_say_nothing_give_way(lock: Chamber) -> None:
    silent = [seqpacket.connect(lock.path) for _ in range(20)]
    lock.until(lambda: seqpacket.receive(silent[0], 10) == (b"", []))
    lock.hold()
    for sock in silent:
        sock.close()


def test_spans_of_a_sampled_flow(lock: Chamber) -> None:
    client, upstream = lock.open(span_id=b"parent!!")
    client.send(b"abc")
    assert lock.read(upstream, 3) == b"abc"
    client.close()
    upstream.close()
    lock.closed()
    dialled, relayed = lock.spans
    assert (dialled.name, dialled.trace_id, dialled.parent_span_id) == ("dial", b"\1" * 16, b"parent!!")
    assert (relayed.name, relayed.attributes["bytes_up"], relayed.status) == ("relay", 3, "")
    assert dialled.start_ns <= dialled.end_ns <= relayed.start_ns <= relayed.end_ns


def test_descriptors_and_slots_return_to_the_start(lock: Chamber) -> None:
    for _ in range(2):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
        for slot in range(1, 60):
            client, upstream = lock.open(slot)
            (client if slot % 2 else upstream).close()
            (upstream if slot % 2 else client).close()
            lock.closed(slot)
        lock.turn()
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert (lock.counters.read("streams"), lock.counters.read("closed_finished")) == (0, 118)


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half_closed"])
def test_a_killed_worker_resets_both_ends(tmp_path: Path, half_closed: bool) -> None:
    """A truncated download never looks complete."""
    with listen(socket.AF_INET) as listener, listen(socket.AF_INET) as server:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
        )
        client = upstream = None
        try:
            client, upstream = _open(tmp_path, listener, server)
            upstream.sendall(b"the first part")
            assert client.recv(100) == b"the first part"
            if half_closed:
                client.shutdown(socket.SHUT_WR)
                assert upstream.recv(1) == b""
                upstream.sendall(b"!")
                assert client.recv(1) == b"!"
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            _wait_for_error(upstream)
        finally:
            process.kill()
            process.wait()
            for sock in (client, upstream):
                if sock is not None:
                    sock.close()


def _open(directory: Path, listener: socket.socket, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    deadline = time.monotonic() + DEADLINE_S
    path = directory / "upgrader.worker.0.sock"
    while True:
        try:
            flow = seqpacket.connect(path)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a poll with a deadline
    flow.setblocking(True)
    flow.settimeout(DEADLINE_S)
    prepare = Prepare(5, bytes(16), bytes([127, 0, 0, 1]), server.getsockname()[1], b"", 5000, 60, "l4")
    seqpacket.send(flow, handover.encode([Hello("flow", 0, 1), prepare]))
    flow.recv(1000)
    (connected,) = handover.UPGRADER_TO_FLOW.decode(flow.recv(1000))
    assert isinstance(connected, Connected)
    upstream, _ = server.accept()
    client = socket.create_connection(listener.getsockname(), DEADLINE_S, ("127.0.0.5", 0))
    upstream.settimeout(DEADLINE_S)
    return client, upstream


def _wait_for_error(sock: socket.socket) -> None:
    """Until the kernel has seen a RST: ECONNRESET, or EPIPE after a FIN."""
    deadline = time.monotonic() + DEADLINE_S
    while sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) not in (errno.ECONNRESET, errno.EPIPE):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a poll with a deadline
