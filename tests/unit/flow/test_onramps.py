"""Several on-ramp workers at one flow worker: each hears of its own tunnels, and of no other's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.linux import seqpacket
from falkirk.wire import handover
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Adopt, Adopted, Held, Hello, Traced, TunnelClosed
from tests.flow_rig import DEVICE4, SERVER4, FlowRig, context
from tests.unit.flow.test_worker_lift import SYN


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    made = FlowRig(tmp_path)
    yield made
    made.close()


class Onramp:
    """The connection of one on-ramp worker."""

    def __init__(self, rig: FlowRig, number: int, generation: int = 1) -> None:
        self.rig = rig
        self.sock = seqpacket.connect(rig.run_dir / "mesh" / "flow.worker.0.sock")
        self.say(Hello("onramp", number, generation))

    def say(self, message: handover.Message, *fds: int) -> None:
        seqpacket.send(self.sock, handover.encode([message]), fds)
        self.rig.step()

    def tunnel(self, number: int) -> socket.socket:
        """A new one; its producer's end."""
        ours, theirs = seqpacket.pair()
        with theirs:
            self.say(Adopt(number, context(), Framing.RAW, 1500), theirs.fileno())
        assert self.heard() == [Adopted(number)]
        return ours

    def heard(self) -> list[handover.Message]:
        """Since the last call, without greetings."""
        self.rig.step()
        said: list[handover.Message] = []
        while (received := seqpacket.receive(self.sock, handover.MAX_DATAGRAM)) is not None:
            for fd in received[1]:
                os.close(fd)
            said += handover.FLOW_TO_ONRAMP.decode(received[0])
        return [message for message in said if not isinstance(message, Hello)]


def test_each_hears_of_its_own_tunnels(rig: FlowRig) -> None:
    zero, one = Onramp(rig, 0, 1 << 62), Onramp(rig, 1)
    with zero.sock, one.sock, zero.tunnel(2) as two, one.tunnel(3) as three:
        zero.heard(), one.heard()
        # A sampled flow is told once, so that its trace has one span of an admission.
        three.send(segment(DEVICE4, SERVER4, 40000, 80, 1, 0, SYN))
        rig.step()
        (flow,) = rig.worker.tunnels[3].flows.values()
        rig.worker.tunnels.trace(flow, bytes(16), 7)
        assert (zero.heard(), one.heard()) == ([], [Traced(3, bytes(16), b"", 7)])
        two.close()
        assert (zero.heard(), one.heard()) == ([TunnelClosed(2, "closed by the producer")], [])
        one.say(TunnelClosed(3, "by its on-ramp"))
        assert zero.heard() == []


def test_one_that_comes_again_gets_its_own_tunnels_back(rig: FlowRig) -> None:
    zero, one = Onramp(rig, 0, 1 << 62), Onramp(rig, 1)
    with zero.sock, zero.tunnel(2), one.tunnel(3):
        one.sock.close()
        rig.step()
        one = Onramp(rig, 1, 2)
        with one.sock:
            assert [(type(message), message.tunnel) for message in one.heard() if isinstance(message, Held)] == [
                (Held, 3)
            ]
            assert zero.heard() == []
            # What is told it is told once, though the one before may not be gone yet.
            rig.worker.tunnels.close(3, "over")
            assert one.heard() == [TunnelClosed(3, "over")]


def test_another_number_of_workers_leaves_producers_where_the_gate_is(rig: FlowRig) -> None:
    """Tunnels of connections are worker 0's, whatever number they have: a number says whose it is only while it is new."""
    zero = Onramp(rig, 0, 1 << 62)
    with zero.tunnel(3), zero.tunnel(6), zero.sock:
        zero.sock.close()
        rig.step()
        one, zero = Onramp(rig, 1), Onramp(rig, 0, (1 << 62) + 1)
        with one.sock, zero.sock:
            assert one.heard() == []
            assert {message.tunnel for message in zero.heard() if isinstance(message, Held)} == {3, 6}
