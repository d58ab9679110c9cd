"""Streams that an administrator opens to a device: which tunnel, what the device sees, what is recorded, how they end."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, LowerRefused, LowerWanted, Message, Prepare
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.slots import LOWERED
from tests.flow_rig import DEVICE4, DEVICE6, OTHER_TENANT, FlowRig, context, read

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
OURS = {4: bytes([192, 0, 0, 8]), 6: bytes.fromhex("fd66616c6b69726b0000000000000001")}
DEVICES = {4: DEVICE4, 6: DEVICE6}


class Session:
    """A device, and an upgrader that asks for a way to it."""

    def __init__(self, rig: FlowRig, framing: Framing, family: int) -> None:
        self.rig, self.framing, self.family = rig, framing, family
        self.sock = rig.tunnel(framing)
        self.head = b"" if framing is Framing.RAW else vnet.ZERO
        self.wish = Prepare(0, b"", b"", 0, b"", 0, 0, "")

    def want(self, **fields: object) -> list[Message]:
        wanted = {"request": 7, "tenant": "acme", "device": "laptop", "version": self.family, "port": 22}
        self.rig.say_upgrader(LowerWanted(**(wanted | {"actor": "root (uid 0)"} | fields)))  # type: ignore[arg-type]
        return self.rig.asked()

    def dialled(self) -> Prepare:
        (message,) = self.want()
        assert isinstance(message, Prepare)
        self.wish = message
        self.kernel(SYN)
        return message

    def open(self) -> None:
        self.dialled()
        self.device(SYN | ACK, 5000, 7001)
        self.kernel(ACK, 7001, 5001)
        self.rig.say_upgrader(Connected(self.wish.slot, 1))
        self.received()

    def kernel(self, flags: int, sequence: int = 7000, acknowledged: int = 0) -> None:
        address = self.rig.plan.address4 if self.family == 4 else self.rig.plan.address6
        own, slot = address(0, self.rig.plan.slot(self.framing, 1)), address(0, self.wish.lower & ~LOWERED)
        packet = segment(own, slot, self.wish.source_port, self.wish.port, sequence, acknowledged, flags, 65535)
        self.rig.lower_tun[self.framing].send(vnet.ZERO + packet)
        self.rig.step()

    def device(self, flags: int, sequence: int = 5000, acknowledged: int = 7001) -> None:
        ends = DEVICES[self.family], OURS[self.family]
        packet = segment(*ends, self.wish.port, self.wish.source_port, sequence, acknowledged, flags, 65535)
        self.sock.send(self.head + packet)
        self.rig.step()

    def received(self) -> list[Packet]:
        self.rig.step()
        packets = []
        for data in read(self.sock):
            body = data[len(self.head) :]
            packet = parse(body, 0, len(body))
            verify(body, packet)
            packets.append(packet)
        return packets

    def lowered(self) -> list[Packet]:
        self.rig.step()
        return [parse(data, 10, len(data) - 10) for data in read(self.rig.lower_tun[self.framing])]

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            clock = self.rig.worker.clock
            self.rig.worker.clock = lambda clock=clock: clock() + 1_000_000_000  # type: ignore[misc]
            self.rig.step()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture(params=[(framing, family) for framing in Framing for family in DEVICES], ids=lambda p: f"{p[0]}-{p[1]}")
def session(request: pytest.FixtureRequest, rig: FlowRig) -> Session:
    return Session(rig, *request.param)


def test_the_device_sees_falkirk_itself(session: Session) -> None:
    wish = session.dialled()
    assert wish.slot == wish.lower >= LOWERED
    assert (wish.request, wish.destination, wish.port) == (7, DEVICES[session.family], 22)
    assert wish.source_port >= 32768
    (syn,) = session.received()
    assert (syn.source, syn.destination) == (OURS[session.family], DEVICES[session.family])
    assert (syn.source_port, syn.destination_port, syn.flags) == (wish.source_port, 22, SYN)
    session.device(SYN | ACK)
    assert [packet.flags for packet in session.lowered()] == [SYN | ACK]
    assert session.rig.balanced()


def test_what_is_recorded(session: Session) -> None:
    session.open()
    session.kernel(ACK | PSH, 7001, 5001)
    session.device(FIN | ACK, 5001, 7001)
    session.kernel(FIN | ACK, 7001, 5002)
    session.device(ACK, 5002, 7002)
    session.rig.say_upgrader(Closed(session.wish.slot, "finished", 0, 0))
    session.rig.step()
    started, ended = session.rig.records()
    assert (started.event, ended.event, ended.reason) == ("started", "ended", "finished")
    assert (started.tenant, started.device, started.destination_port) == ("acme", "laptop", 22)
    assert started.why == "an administrator's connection: root (uid 0)"
    assert started.rule == ""
    assert (ended.packets_up, ended.packets_down) == (4, 3)
    assert ended.bytes_up > 0
    assert session.rig.worker.flow_count == 0
    assert session.rig.drops() == {}


def test_it_is_in_the_live_table_and_can_be_ended(session: Session) -> None:
    from falkirk.flow.live import LiveReader

    session.open()
    session.pass_time(1)
    reader = LiveReader(session.rig.data_dir / "flow" / "live" / "worker-0")
    (record,) = reader
    reader.close()
    assert (record.source, record.destination_port, record.slot) == (OURS[session.family], 22, 0)
    assert (record.lower_slot, record.packets_up, record.packets_down) == (session.wish.slot, 2, 1)
    (tunnel,) = session.rig.worker.tunnels.values()
    flow = tunnel.flows[record.key]
    flow.owner.end(flow, "terminated")
    assert session.rig.asked() == [Abort(session.wish.slot)]
    session.kernel(RST | ACK, 7001, 5001)
    session.rig.say_upgrader(Closed(session.wish.slot, "aborted", 0, 0))
    session.rig.step()
    assert [packet.flags for packet in session.received()] == [RST | ACK]
    assert session.rig.records()[-1].reason == "terminated"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": "phone"}, "no_tunnel"),
        ({"tenant": "other"}, "no_tunnel"),
        ({"version": 6}, "no_address"),
    ],
)
def test_what_there_is_no_way_to(rig: FlowRig, fields: dict[str, object], reason: str) -> None:
    session = Session(rig, Framing.RAW, 4)
    four = rig.tunnel(who=context(device="four", addresses=[DEVICE4]))
    (refused,) = session.want(**({"device": "four"} | fields if "version" in fields else fields))
    assert isinstance(refused, LowerRefused)
    assert (refused.request, refused.reason) == (7, reason)
    assert rig.records() == []
    four.close()


def test_a_device_of_another_tenant_with_the_same_name(rig: FlowRig) -> None:
    session = Session(rig, Framing.RAW, 4)
    theirs = rig.tunnel(who=context(tenant=OTHER_TENANT, addresses=[DEVICE4]))
    session.dialled()
    assert len(session.received()) == 1
    assert read(theirs) == []
    theirs.close()


def test_the_newest_tunnel_and_the_first_address(rig: FlowRig) -> None:
    session = Session(rig, Framing.RAW, 0)
    newer = rig.tunnel()
    (wish,) = session.want()
    assert isinstance(wish, Prepare)
    assert wish.destination == DEVICE4
    session.wish, session.family = wish, 4
    session.kernel(SYN)
    assert (len(session.received()), len(read(newer))) == (0, 1)
    newer.close()


def test_a_closed_port(session: Session) -> None:
    session.dialled()
    session.device(RST | ACK, 0, 7001)
    assert [packet.flags for packet in session.lowered()] == [RST | ACK]
    session.rig.say_upgrader(DialFailed(session.wish.slot, errno.ECONNREFUSED, 1))
    assert session.rig.records()[-1].reason == "upstream_refused"
    assert session.rig.worker.flow_count == 0


def test_limits_hold_here_too(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(device_flows=1))
    session = Session(rig, Framing.RAW, 4)
    session.dialled()
    (refused,) = session.want(request=8)
    assert isinstance(refused, LowerRefused)
    assert refused.reason == "device_limit"
    rig.close()


def test_each_has_a_port_of_its_own(rig: FlowRig) -> None:
    session = Session(rig, Framing.VNET, 4)
    wishes = [session.want(request=number)[0] for number in range(20)]
    ports = {wish.source_port for wish in wishes if isinstance(wish, Prepare)}
    assert len(ports) == 20


def test_an_answer_for_one_that_is_over(rig: FlowRig) -> None:
    session = Session(rig, Framing.RAW, 4)
    session.dialled()
    session.sock.close()
    rig.step()
    assert rig.asked() == [Abort(session.wish.slot)]
    rig.say_upgrader(Connected(session.wish.slot, 1), Closed(session.wish.slot, "aborted", 0, 0))
    assert rig.asked() == [Abort(session.wish.slot)]
    assert rig.records()[-1].reason == "tunnel_closed"


def test_an_idle_one_ends(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(established_idle_s=10))
    session = Session(rig, Framing.RAW, 4)
    session.open()
    session.pass_time(5)
    session.kernel(ACK, 7000, 5001)
    session.pass_time(7)
    assert rig.asked() == []
    session.pass_time(260)
    assert rig.asked() == [Abort(session.wish.slot)]
    assert rig.records()[-1].reason == "idle"
    rig.close()


def test_the_upgrader_is_lost(session: Session) -> None:
    session.open()
    assert session.rig.upgrader is not None
    session.rig.upgrader.close()
    session.pass_time(2)
    probe = session.received()[0]
    assert (probe.source, probe.flags) == (OURS[session.family], ACK)
    assert session.rig.records()[-1].reason == "upgrader_lost"
    session.device(ACK, 5001)
    assert session.received()[-1].flags == RST


def test_a_change_of_rules_is_no_concern_of_an_administrators(session: Session) -> None:
    session.open()
    session.rig.policies = ()
    session.rig.load()
    session.rig.step(10)
    assert session.rig.asked() == []
    assert session.rig.worker.flow_count == 1
