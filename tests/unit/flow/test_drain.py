"""An orderly end of a flow worker: what its flows get, and what is on record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.drain import Drain
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Closed, Prepare
from falkirk.wire.tcp import ACK, RST, SYN
from tests.flow_rig import FlowRig
from tests.unit.flow.test_worker_lift import Client, established


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    found = FlowRig(tmp_path)
    yield found
    found.close()


def test_flows_are_reset_and_new_ones_refused(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    prepare, slot = established(client)
    rig.worker.drain.begin()
    rig.worker.drain.begin()
    rig.step()
    assert rig.asked() == [Abort(prepare.slot)]
    client.port += 1
    client.send(SYN)
    assert (rig.asked(), rig.drops()) == ([], {"not_ready": 1})
    client.port -= 1
    client.received()
    client.kernel(slot, RST, 9001)
    (reset,) = client.received()
    assert reset.flags == RST
    rig.say_upgrader(Closed(prepare.slot, "aborted", 10, 20))
    rig.worker.drain.turns()
    assert [(r.event, r.reason) for r in rig.records()] == [
        ("started", ""),
        ("denied", "not_ready"),
        ("ended", "drained"),
    ]


def test_a_held_syn_is_answered_at_once(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.send(SYN)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.worker.drain.begin()
    rig.worker.drain.turns()
    (answer,) = client.received()
    assert answer.flags == RST | ACK
    assert rig.asked() == [Abort(prepare.slot)]
    assert rig.records()[-1].reason == "drained"


def test_what_does_not_pass_in_time_is_probed_and_recorded(rig: FlowRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upgrader says nothing; the client's answer to the probe is the next worker's to reset."""
    monkeypatch.setattr("falkirk.flow.drain.DRAIN", 1)
    client = Client(rig, Framing.RAW, 4)
    established(client)
    drain = Drain(rig.worker)
    drain.begin()
    drain.turns()
    (probe,) = client.received()
    assert probe.flags == ACK
    assert rig.records()[-1].reason == "drained"
    assert rig.worker.flow_count == 0
