"""An upgrader worker whose upstreams are devices: sockets come from a helper, and clients may be in hand already.

The helper is played here: its sockets connect to the server over loopback, as those of a lowering namespace do to a device.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.linux import namespace_messages as messages
from falkirk.linux import seqpacket, sockets
from falkirk.upgrader import control
from falkirk.wire import handover
from falkirk.wire.handover import Abort, AbortAll, Closed, Connected, DialFailed, LowerRefused, LowerWanted
from falkirk.wire.slots import LOWERED
from tests.process.upgrader_lock import Chamber, chamber, listen, reset


class FakeHelper:
    """The helper's side of the pair."""

    def __init__(self, lock: Chamber) -> None:
        self.lock = lock
        self.pair, theirs = seqpacket.pair()
        lock.worker.helper(theirs)

    def asked(self) -> messages.Connect:
        """What the worker asks next."""
        found: list[messages.Connect] = []

        def came() -> bool:
            received = seqpacket.receive(self.pair, messages.MAX_DATAGRAM)
            if received is not None and received[0]:
                found.append(messages.FROM_WORKER.decode(received[0]))
            return bool(found)

        self.lock.until(came)
        return found[0]

    def quiet(self) -> bool:
        self.lock.turn()
        return seqpacket.receive(self.pair, messages.MAX_DATAGRAM) is None

    def give(self, wish: messages.Connect, address: tuple[str, int] | None = None) -> None:
        """A socket that connects to the server (or elsewhere)."""
        sock = socket.socket()
        sock.setblocking(False)
        sockets.reset_on_close(sock)
        sock.connect_ex(address or self.lock.server.getsockname())
        with sock:
            seqpacket.send(self.pair, messages.encode(messages.Connecting(wish.request)), [sock.fileno()])

    def refuse(self, wish: messages.Connect, code: int) -> None:
        seqpacket.send(self.pair, messages.encode(messages.NotConnecting(wish.request, code)))


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Chamber]:
    with chamber(tmp_path) as made:
        yield made


@pytest.fixture
def helper(lock: Chamber) -> Iterator[FakeHelper]:
    made = FakeHelper(lock)
    yield made
    made.pair.close()


def prepare(lock: Chamber, slot: int = 1, lower: int = 9, **fields: object) -> None:
    lock.prepare(slot, 22, lower=LOWERED | lower, source_port=40001, **fields)


def accept(lock: Chamber) -> socket.socket:
    found: list[socket.socket] = []

    def came() -> bool:
        try:
            found.append(lock.server.accept()[0])
        except BlockingIOError:
            return False
        return True

    lock.until(came)
    found[0].setblocking(False)
    return found[0]


def test_a_stream_through_a_socket_of_the_helpers(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    wish = helper.asked()
    assert (wish.slot, wish.version, wish.source_port, wish.port) == (9, 4, 40001, 22)
    assert lock.counters.read("dialling") == 1
    helper.give(wish)
    assert lock.hear(Connected).slot == 1
    with accept(lock) as device:
        client = lock.client()
        lock.until(lambda: lock.counters.read("opened"))
        client.send(b"up")
        assert lock.read(device, 2) == b"up"
        device.send(b"down")
        assert lock.read(client, 4) == b"down"
        client.shutdown(socket.SHUT_WR)
        assert lock.at_end(device)
    assert lock.at_end(client)
    assert lock.closed() == Closed(1, "finished", 2, 4)


def test_a_closed_port_of_a_device(lock: Chamber, helper: FakeHelper) -> None:
    with listen(socket.AF_INET) as gone:
        address = gone.getsockname()
    prepare(lock)
    helper.give(helper.asked(), address)
    failed = lock.hear(DialFailed)
    assert (failed.slot, failed.errno) == (1, errno.ECONNREFUSED)
    assert lock.counters.read("dialling") == 0


def test_a_socket_that_can_not_be_had(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    helper.refuse(helper.asked(), errno.EADDRNOTAVAIL)
    assert lock.hear(DialFailed).errno == errno.EADDRNOTAVAIL
    assert lock.counters.read("dial_no_address") == 1


def test_a_helper_that_never_answers_times_out(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock, connect_timeout_ms=300)
    wish = helper.asked()
    failed = lock.hear(DialFailed)
    assert (failed.errno, failed.dial_ns >= 300_000_000) == (errno.ETIMEDOUT, True)
    helper.give(wish)
    assert lock.was_reset(accept(lock))


def test_what_a_dead_helper_owes_is_asked_of_its_successor(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    first = helper.asked()
    helper.pair.close()
    prepare(lock, 2, 10)
    lock.turn()
    successor = FakeHelper(lock)
    wishes = [successor.asked(), successor.asked()]
    assert [wish.slot for wish in wishes] == [9, 10]
    assert wishes[0] == first
    for wish, slot in zip(wishes, (1, 2), strict=True):
        successor.give(wish)
        assert lock.hear(Connected).slot == slot
    successor.pair.close()


def test_an_abort_before_the_socket_is_there(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    wish = helper.asked()
    lock.say(Abort(1))
    assert lock.closed().reason == "aborted"
    helper.give(wish)
    assert lock.was_reset(accept(lock))
    assert lock.counters.read("dialling") == 0


def test_a_new_flow_worker_clears_what_is_asked(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    helper.asked()
    lock.say(AbortAll())
    assert lock.closed().reason == "aborted"


def test_a_slot_that_is_prepared_again(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock)
    old = helper.asked()
    prepare(lock)
    new = helper.asked()
    helper.give(old)
    assert lock.was_reset(accept(lock))
    helper.give(new)
    assert lock.hear(Connected).slot == 1
    assert lock.counters.read("slot_replaced") == 1


def test_more_wishes_than_the_pair_holds(tmp_path: Path) -> None:
    with chamber(tmp_path, capacity=10_000) as lock:
        slow = FakeHelper(lock)
        slow.pair.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for slot in range(1000):
            prepare(lock, slot + 1000, slot)
            lock.turn(0)
        assert [slow.asked().slot for _ in range(1000)] == list(range(1000))
        slow.pair.close()


# callers: the client is in hand already


def caller(lock: Chamber, request: int = 7) -> socket.socket:
    """The parent's end of a pair whose other end the worker has, and which wants a way."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setblocking(False)
    lock.worker.lower(control.Lower(request, "acme", "laptop", 0, 22, "root"), theirs)
    return ours


def test_a_caller_gets_a_stream(lock: Chamber, helper: FakeHelper) -> None:
    with caller(lock) as ours:
        assert lock.hear(LowerWanted) == LowerWanted(7, "acme", "laptop", 0, 22, "root")
        prepare(lock, LOWERED | 9, request=7, flow_id=b"f" * 16)
        helper.give(helper.asked())
        assert lock.hear(Connected).slot == LOWERED | 9
        with accept(lock) as device:
            assert lock.told == [control.LowerOpened(7, b"f" * 16)]
            device.send(b"SSH-2.0")
            assert lock.read(ours, 7) == b"SSH-2.0"
            ours.send(b"hi")
            ours.shutdown(socket.SHUT_WR)
            assert lock.read(device, 100) == b"hi"
        assert lock.at_end(ours)
        assert lock.closed(LOWERED | 9).reason == "finished"
        assert lock.told[1:] == [control.LowerOver(7, "finished", "", 2, 7)]


def test_a_caller_that_is_refused(lock: Chamber) -> None:
    with caller(lock):
        lock.hear(LowerWanted)
        lock.say(LowerRefused(7, "no_tunnel", "none here"))
        lock.until(lambda: lock.told)
        assert lock.told == [control.LowerOver(7, "no_tunnel", "none here")]


def test_a_caller_whose_device_refuses(lock: Chamber, helper: FakeHelper) -> None:
    with caller(lock), listen(socket.AF_INET) as gone:
        address = gone.getsockname()
        gone.close()
        lock.hear(LowerWanted)
        prepare(lock, LOWERED | 9, request=7)
        helper.give(helper.asked(), address)
        assert lock.hear(DialFailed).slot == LOWERED | 9
        assert lock.told == [control.LowerOver(7, "ECONNREFUSED")]


@pytest.mark.parametrize("who", ["caller", "device"])
def test_a_reset_is_no_end(lock: Chamber, helper: FakeHelper, who: str) -> None:
    with caller(lock) as ours:
        lock.hear(LowerWanted)
        prepare(lock, LOWERED | 9, request=7)
        helper.give(helper.asked())
        lock.hear(Connected)
        device = accept(lock)
        mine, other = (ours, device) if who == "caller" else (device, ours)
        reset(mine)
        assert lock.was_reset(other)
        expected = {"caller": "client_reset", "device": "upstream_reset"}[who]
        assert lock.closed(LOWERED | 9).reason == expected
        assert lock.told[1:] == [control.LowerOver(7, expected)]


def test_a_caller_without_a_flow_worker(lock: Chamber) -> None:
    with caller(lock):
        lock.hear(LowerWanted)
        assert lock.flow is not None
        lock.flow.close()
        lock.flow = None
        lock.until(lambda: lock.told)
        assert lock.told == [control.LowerOver(7, "not_ready", "the flow tracker is away")]
    with caller(lock, 8):
        lock.until(lambda: len(lock.told) == 2)


def test_what_is_asked_between_two_turns_goes_out_at_once(lock: Chamber) -> None:
    """The worker sleeps until something comes, and nothing may come but the answer."""
    assert lock.flow is not None
    with caller(lock):
        received = seqpacket.receive(lock.flow, 1 << 17)
        assert received is not None
        assert handover.UPGRADER_TO_FLOW.decode(received[0]) == [LowerWanted(7, "acme", "laptop", 0, 22, "root")]
        lock.flow.close()
        lock.flow = None
        lock.until(lambda: lock.told)
    with caller(lock, 8):
        assert [over.request for over in lock.told if isinstance(over, control.LowerOver)] == [7, 8]


def test_nobody_asked(lock: Chamber, helper: FakeHelper) -> None:
    prepare(lock, LOWERED | 9, request=99)
    assert lock.hear(DialFailed).errno == errno.ECONNABORTED
    assert helper.quiet()


def test_descriptors_return_to_the_start(lock: Chamber, helper: FakeHelper) -> None:
    for round_ in range(2):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
        for slot in range(1, 30):
            ours = caller(lock, slot)
            lock.hear(LowerWanted)
            prepare(lock, LOWERED | slot, slot, request=slot)
            wish = helper.asked()
            if slot % 3:
                helper.give(wish)
                lock.hear(Connected)
                device = accept(lock)
                (ours if slot % 2 else device).close()
                (device if slot % 2 else ours).close()
                lock.closed(LOWERED | slot)
            else:
                helper.refuse(wish, errno.EMFILE)
                lock.hear(DialFailed)
                ours.close()
        lock.turn()
        assert len(os.listdir("/proc/self/fd")) == before, round_  # noqa: PTH208
