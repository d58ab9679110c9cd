"""A flow worker that takes a killed one's place: the books are closed once, and every lost client is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow.events import EventFeed
from falkirk.flow.fleet import Fleet
from falkirk.flow.live import LiveTable
from falkirk.flow.orphans import TRIES
from falkirk.flow.settings import FlowSettings
from falkirk.flow.worker import SECOND
from falkirk.linux import seqpacket
from falkirk.runtime.delivery import Delivery
from falkirk.runtime.settings import shell_of
from falkirk.runtime.spool import SpoolWriter, segments
from falkirk.wire.context import Framing
from falkirk.wire.handover import Adopt, Closed, Prepare
from falkirk.wire.packet import Packet
from tests.flow_rig import FlowRig, context
from tests.unit.flow.test_worker_lift import ACK, FAMILIES, FIN, RST, SYN, Client, established


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def client(request: pytest.FixtureRequest, rig: FlowRig) -> Client:
    framing, family = request.param
    return Client(rig, framing, family)


def live(rig: FlowRig) -> Path:
    return rig.data_dir / "flow" / "live" / "worker-0"


def events(rig: FlowRig) -> list[tuple[str, str]]:
    return [(record.event, record.reason) for record in rig.records()]


def succeed(client: Client, tunnel: int = 1) -> None:
    """The worker is killed; its successor gets the tunnel, and an upgrader."""
    rig = client.rig
    rig.kill()
    rig.start()
    client.sock, theirs = seqpacket.pair()
    rig.say_onramp(Adopt(tunnel, context(), client.framing, 1500), [theirs.fileno()])
    theirs.close()
    rig.pair()
    rig.load()
    client.tun = rig.tun[client.framing]


def later(rig: FlowRig) -> None:
    """A second has passed."""
    worker, now = rig.worker, rig.worker.now + SECOND
    worker.clock = lambda: now
    rig.step()


def probed(client: Client) -> Packet:
    """The probe, which comes within a second."""
    later(client.rig)
    (probe,) = client.received()
    assert (probe.flags, probe.source, probe.destination_port) == (ACK, client.server, client.port)
    return probe


def says_where_it_stands(client: Client) -> None:
    """The client answers the probe with an ACK of its own; what it gets ends it (RFC 9293 3.10.7.4)."""
    client.send(ACK, 1001, 9001)
    (reset,) = client.received()
    assert (reset.flags, reset.sequence, reset.source) == (RST, 9001, client.server)


def test_a_client_whose_reset_was_not_seen_is_probed(client: Client) -> None:
    established(client)
    succeed(client)
    for _ in range(TRIES):
        probed(client)
    says_where_it_stands(client)
    later(client.rig)
    assert client.received() == []


def test_a_client_is_told_though_two_workers_were_killed(client: Client) -> None:
    established(client)
    untold = live(client.rig).with_suffix(".untold")
    succeed(client)
    assert untold.exists()
    succeed(client)
    for _ in range(TRIES):
        probed(client)
    says_where_it_stands(client)
    later(client.rig)
    assert not untold.exists()
    assert [event for event, _ in events(client.rig)] == ["started", "ended"]


def test_a_client_that_was_reset_is_not_probed(client: Client) -> None:
    _, slot = established(client)
    succeed(client)
    client.kernel(slot, RST, 9001)
    (reset,) = client.received()
    assert reset.flags == RST
    later(client.rig)
    assert client.received() == []


def test_a_tunnel_that_comes_late_is_probed_too(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    rig.kill()
    rig.start()
    rig.pair()
    rig.load()
    client.sock, theirs = seqpacket.pair()
    rig.say_onramp(Adopt(1, context(), client.framing, 1500), [theirs.fileno()])
    theirs.close()
    probed(client)


def test_a_client_of_a_lost_upgrader_is_probed_even_where_only_the_kernel_had_the_stream(client: Client) -> None:
    prepare, slot = established(client)
    client.send(FIN | ACK, 1001, 9001)
    client.kernel(slot, FIN | ACK, 9001, 1002)
    client.received()
    client.rig.say_upgrader(Closed(prepare.slot, "finished", 0, 0))
    assert client.rig.upgrader is not None
    client.rig.upgrader.close()
    client.rig.step()
    probed(client)
    client.rig.pair()
    assert events(client.rig)[-1] == ("ended", "upgrader_lost")


def test_killed_before_its_own_table_was_in_place(rig: FlowRig, tmp_path: Path) -> None:
    client = Client(rig, Framing.VNET, 4)
    established(client)
    rig.kill()
    shutil.copy(live(rig), tmp_path / "before")
    for _ in range(3):
        rig.start()
        rig.kill()
        shutil.copy(tmp_path / "before", live(rig))
    rig.start()
    assert events(rig) == [("started", ""), ("ended", "tracker_lost")]
    assert len(segments(rig.data_dir / "flow" / "spool" / "worker-0")) == 2


def test_killed_while_it_closed_the_books(rig: FlowRig, tmp_path: Path) -> None:
    clients = [Client(rig, Framing.VNET, 4, port) for port in (40000, 40001, 40002)]
    for client in clients:
        established(client)
    rig.kill()
    tables = live(rig).parent
    shutil.copytree(tables, tmp_path / "before")
    rig.start()
    rig.kill()
    shutil.copytree(tmp_path / "before", tables, dirs_exist_ok=True)
    newest = segments(rig.data_dir / "flow" / "spool" / "worker-0")[-1]
    lines = newest.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    newest.write_bytes(lines[0] + lines[1][:20])
    rig.start()
    records = rig.records()
    ended = [record.flow_id for record in records if record.event == "ended"]
    assert sorted(ended) == sorted(record.flow_id for record in records if record.event == "started")
    assert len({(record.epoch, record.sequence) for record in records}) == len(records)
    assert {record.tenant for record in records} == {"acme"}


def test_a_start_that_was_half_written_never_was(rig: FlowRig) -> None:
    clients = [Client(rig, Framing.VNET, 4, port) for port in (40000, 40001)]
    for client in clients:
        established(client)
    rig.kill()
    (segment,) = segments(rig.data_dir / "flow" / "spool" / "worker-0")
    segment.write_bytes(segment.read_bytes()[:-30])
    rig.start()
    assert events(rig) == [("started", ""), ("ended", "tracker_lost")]


def test_a_predecessor_that_lives_is_not_succeeded(rig: FlowRig) -> None:
    with pytest.raises(BlockingIOError):
        rig.start()


def test_a_successor_gives_no_slot_that_its_predecessor_gave(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    first, _ = established(client)
    client.send(RST, 1001)
    for _ in range(2):
        succeed(client)
        client.port += 1
        client.send(SYN)
        (prepare,) = rig.asked()
        assert isinstance(prepare, Prepare)
        assert prepare.slot > first.slot
        first = prepare


def test_what_policy_has_not_acknowledged_is_counted_over_restarts(tmp_path: Path) -> None:
    for epoch, count in ((5, 3), (9, 4)):
        writer = SpoolWriter(tmp_path, epoch)
        for _ in range(count):
            record = {"event": "denied", "flow_id": "", "epoch": epoch, "sequence": writer.next()}
            writer.add(msgspec.json.encode(record).decode())
        assert writer.flush()
        writer.close()
    with segments(tmp_path)[-1].open("ab") as file:
        file.write(b'{"event":"den')
    delivery = Delivery(tmp_path, lambda _: None)
    assert delivery.pending == 7
    delivery.acknowledge(5, 2)
    assert delivery.pending == 5
    delivery.acknowledge(9, 1)
    assert delivery.pending == 3
    delivery.acknowledge(9, 4)
    assert delivery.pending == 0


def test_the_parent_reads_the_table_that_is_there_now(tmp_path: Path) -> None:
    shell = shell_of({}, None, run_dir=tmp_path / "run", data_dir=tmp_path / "data")
    fleet = Fleet(shell, FlowSettings(), EventFeed(), lambda _: None)
    assert fleet.live(0) is None
    path = tmp_path / "data" / "flow" / "live" / "worker-0"
    path.parent.mkdir(parents=True)
    for epoch in (1, 2):
        LiveTable(path, 1, epoch)
        table = fleet.live(0)
        assert table is not None
        assert table.epoch == epoch
        assert fleet.live(0) is table
