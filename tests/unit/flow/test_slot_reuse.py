"""A worker with three NAT slots, round and round: a slot rests before the next flow gets it, and nothing of the last one meets it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.flow.slots import REST
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Closed, Connected, Prepare
from tests.flow_rig import DEVICE4, FlowRig, read
from tests.unit.flow.test_worker_lift import ACK, RST, SYN, Client

SLOTS = 3
ROUNDS = 5


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path, FlowSettings(slots=SLOTS))
    yield rig
    rig.close()


class Hand:
    """The worker's clock, moved by hand."""

    def __init__(self, rig: FlowRig) -> None:
        self.now = time.monotonic_ns()
        self._rig = rig
        rig.worker.clock = lambda: self.now

    def wait(self, seconds: int) -> None:
        self.now += seconds * 1_000_000_000
        self._rig.step()


@pytest.mark.parametrize("framing", list(Framing))
def test_wrap_around(rig: FlowRig, framing: Framing) -> None:
    clock = Hand(rig)
    client = Client(rig, framing, 4)
    given: list[int] = []
    late: list[tuple[bytes, int]] = []
    for round_ in range(ROUNDS):
        flows: dict[int, Prepare] = {}
        for number in range(SLOTS):
            # Each time from another port, as clients do; the third from the same one as in the last round.
            client.port = 40000 + number if number == 2 else 41000 + round_ * SLOTS + number
            client.send(SYN)
            (prepare,) = rig.asked()
            assert isinstance(prepare, Prepare)
            flows[client.port] = prepare
            rig.say_upgrader(Connected(prepare.slot, 1))
        given += [prepare.slot for prepare in flows.values()]
        assert len({prepare.slot for prepare in flows.values()}) == SLOTS
        inside = {packet.source_port: packet.source for packet in client.inside()}
        # What the last round's kernel sockets still send meets nobody, but where it is the very same connection's.
        for slot, port in late:
            if port not in flows:
                listener = slot[:-3] + (int.from_bytes(slot[-3:], "big") & 0x800000 | 1).to_bytes(3, "big")
                client.tun.send(client_head(listener, slot, port))
        rig.step()
        assert read(client.sock) == []
        for port in flows:
            client.port = port
            client.kernel(inside[port], SYN | ACK)
            (answer,) = client.received()
            assert (answer.destination, answer.destination_port) == (DEVICE4, port)
        # Every slot is taken: one more flow is refused, and none of the others notices.
        client.port = 50000
        client.send(SYN)
        assert rig.asked() == []
        assert rig.drops()["slots_exhausted"] == 3 * round_ + 1
        for port, prepare in flows.items():
            client.port = port
            client.kernel(inside[port], RST, 9001)
            rig.say_upgrader(Closed(prepare.slot, "aborted", 0, 0))
        assert len(client.received()) == SLOTS
        late = [(inside[port], port) for port in flows]
        # A second too early nobody gets one.
        for wait in (0, REST - 1):
            clock.wait(wait)
            client.port = 50000 + wait
            client.send(SYN)
            assert rig.asked() == []
        clock.wait(1)
    assert rig.worker.flow_count == 0
    assert {given.count(slot) for slot in given} == {ROUNDS}
    assert rig.balanced()


def client_head(source: bytes, slot: bytes, port: int) -> bytes:
    """A segment of the private namespace's kernel, behind its virtio-net header."""
    return bytes(10) + segment(source, slot, 1024, port, 9100, 1001, ACK)
