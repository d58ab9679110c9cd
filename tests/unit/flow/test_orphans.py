"""What a dead worker leaves to its successor: its books are closed, its streams' resets find their clients."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.orphans import Orphans, read_contexts
from falkirk.linux import seqpacket
from falkirk.wire.context import Framing
from falkirk.wire.handover import Adopt, DialFailed, Prepare
from tests.flow_rig import FlowRig, context
from tests.unit.flow.test_worker_lift import ACK, FIN, RST, SYN, Client, established


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


def succeed(rig: FlowRig, client: Client, *, adopt: bool = True) -> None:
    """The worker is killed; its successor gets the client's tunnel again."""
    rig.kill()
    client.sock.close()
    rig.start()
    if adopt:
        client.sock, theirs = seqpacket.pair()
        rig.say_onramp(Adopt(1, context(), client.framing, 1500), [theirs.fileno()])
        theirs.close()
    else:
        # It waits a second for the tunnels of lost streams.
        rig.worker.pair.adoption_deadline = 0
    rig.pair()
    rig.load()
    client.tun = rig.tun[client.framing]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("framing", list(Framing))
def test_a_reset_comes_to_its_client_once_with_right_checksums(rig: FlowRig, framing: Framing, family: int) -> None:
    client = Client(rig, framing, family)
    _, slot = established(client)
    succeed(rig, client)
    client.kernel(slot, FIN | ACK, 9001)
    assert client.received() == []
    client.kernel(slot, RST, 9001)
    # `received` verifies checksums.
    (reset,) = client.received()
    assert (reset.flags, reset.sequence) == (RST, 9001)
    assert (reset.source, reset.destination) == (client.server, client.address)
    assert (reset.source_port, reset.destination_port) == (80, client.port)
    client.kernel(slot, RST, 9001)
    assert client.received() == []
    assert rig.drops() == {"no_flow": 2}
    assert rig.balanced()


def test_a_reset_whose_tunnel_did_not_come_back_goes_nowhere(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    _, slot = established(client)
    succeed(rig, client, adopt=False)
    other = Client(rig, Framing.RAW, 4)
    client.kernel(slot, RST, 9001)
    assert other.received() == []
    assert rig.drops() == {"no_flow": 1}


def test_every_start_gets_its_end_and_an_end_is_not_written_twice(rig: FlowRig) -> None:
    ended = Client(rig, Framing.RAW, 4, port=1)
    ended.send(SYN)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(DialFailed(prepare.slot, errno.ECONNREFUSED, 1))
    client = Client(rig, Framing.RAW, 4)
    established(client)
    held = Client(rig, Framing.RAW, 4, port=3)
    held.send(SYN)
    for _ in range(3):
        succeed(rig, client, adopt=False)
    events: dict[str, list[tuple[str, str]]] = {}
    for record in rig.records():
        events.setdefault(record.flow_id, []).append((record.event, record.reason))
        assert record.tenant == "acme"
    assert sorted(events.values()) == [
        [("started", ""), ("ended", "tracker_lost")],
        [("started", ""), ("ended", "tracker_lost")],
        [("started", ""), ("ended", "upstream_refused")],
    ]


def test_a_start_that_was_never_written_gets_no_end(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.send(SYN)
    (path,) = (rig.data_dir / "flow" / "spool" / "worker-0").iterdir()
    data = path.read_bytes()
    # Killed in the middle of the write: the line is torn, the live table has the flow.
    path.write_bytes(data[: len(data) // 2])
    succeed(rig, client, adopt=False)
    assert rig.records() == []


def test_a_slot_that_was_in_use_is_not_the_next_one(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    prepare, _ = established(client)
    rig.worker.live.cursors((0, 1, 0, 0))
    succeed(rig, client)
    client.send(SYN)
    (again,) = rig.asked()
    assert isinstance(again, Prepare)
    assert again.slot == prepare.slot + 1


@pytest.mark.parametrize("data", [b"", b"no live table", bytes(8192)])
def test_a_live_table_that_cannot_be_read_is_no_reason_to_stop(rig: FlowRig, data: bytes) -> None:
    client = Client(rig, Framing.RAW, 4)
    rig.kill()
    (rig.data_dir / "flow" / "live" / "worker-0").write_bytes(data)
    rig.start()
    rig.pair()
    rig.load()
    client = Client(rig, Framing.RAW, 4)
    established(client)


def test_contexts_survive_and_a_torn_line_does_not(tmp_path: Path) -> None:
    from falkirk.wire.slots import SlotPlan

    live = tmp_path / "live" / "worker-0"
    orphans = Orphans(live, tmp_path / "spool", SlotPlan(1), 0)
    orphans.begin_contexts()
    orphans.remember(7, context())
    orphans.remember(8, context(device="phone"))
    orphans.close()
    path = live.with_suffix(".tunnels")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\n", b'\n{"tunnel":9,"con\n', 1) + b'{"tunnel":9,"conte')
    assert read_contexts(path) == {7: context(), 8: context(device="phone")}
    assert read_contexts(tmp_path / "none") == {}
