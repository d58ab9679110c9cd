"""Tunnels that share a trunk: whose packets are whose, who waits for whom, and what outlives the on-ramp."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow import trunks
from falkirk.flow.settings import FlowSettings
from falkirk.flow.worker import SECOND
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing, Transport, TunnelContext
from falkirk.wire.handover import (
    Adopt,
    Adopted,
    AdoptRefused,
    Held,
    Hello,
    Recontext,
    Trunk,
    Trunked,
    TunnelClosed,
    encode,
)
from falkirk.wire.packet import Packet, parse, split, verify
from falkirk.wire.trunk import HEADER, NUMBER
from tests.flow_rig import DEVICE4, PORT, FlowRig, context, read
from tests.unit.flow.test_coalesce import stream
from tests.unit.flow.test_worker_lift import ACK, FAMILIES, SYN, Client, established


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Shared:
    """The on-ramp's end of a trunk, whose datagrams are sorted by their numbers."""

    def __init__(self, rig: FlowRig) -> None:
        self.rig = rig
        self.sock = rig.trunk()
        self.came: dict[int, list[bytes]] = {}
        self.order: list[int] = []

    def of(self, number: int) -> list[bytes]:
        """A tunnel's datagrams since the last call."""
        for data in read(self.sock):
            (whose,) = NUMBER.unpack_from(data)
            self.came.setdefault(whose, []).append(data[HEADER:])
            self.order.append(whose)
        return self.came.pop(number, [])


class Line:
    """What a client has for a socket: its tunnel's part of a trunk."""

    def __init__(self, shared: Shared, number: int) -> None:
        self.shared, self.number = shared, number

    def send(self, data: bytes) -> None:
        self.shared.sock.send(NUMBER.pack(self.number) + data)


class Device(Client):
    """A client whose tunnel comes by a trunk."""

    def __init__(self, rig: FlowRig, shared: Shared, who: TunnelContext | None = None, family: int = 4) -> None:
        self.rig, self.framing, self.port, self.to = rig, Framing.RAW, 40000, 80
        self.address, self.server = FAMILIES[family]
        self.number = rig.by_trunk(msgspec.structs.replace(who or context(), packed=True))
        self.line = Line(shared, self.number)
        self.sock = self.line  # type: ignore[assignment]  # all that is asked of it
        self.tun, self.head = rig.tun[Framing.RAW], b""

    def received(self) -> list[Packet]:
        return [packet for data in self.line.shared.of(self.number) for packet in packets(data)]


def packets(data: bytes) -> list[Packet]:
    """Of a datagram; each has right checksums."""
    found = [parse(data, at, length) for at, length in split(data, len(data))]
    for packet in found:
        verify(data, packet)
    return found


def test_it_is_taken_and_its_tunnels_need_no_descriptor(rig: FlowRig) -> None:
    with rig.trunk():
        assert rig.told()[1:] == [Trunked()]
        first, second = rig.by_trunk(), rig.by_trunk()
        assert rig.told() == [Adopted(first), Adopted(second)]
        assert rig.worker.tunnels[first].bearer is rig.worker.tunnels[second].bearer
        rig.say_onramp(TunnelClosed(first, "removed"))
        assert list(rig.worker.tunnels) == [second]
        assert rig.told() == [TunnelClosed(first, "removed")]


@pytest.mark.parametrize("family", [4, 6])
def test_each_tunnels_packets_are_its_own_though_keys_are_the_same(rig: FlowRig, family: int) -> None:
    shared = Shared(rig)
    one = Device(rig, shared, family=family)
    two = Device(rig, shared, context(device="phone"), family)
    slots = [established(one)[1], established(two)[1]]
    for device, slot in zip((one, two), slots, strict=True):
        device.kernel(slot, ACK, 9001)
        assert [packet.destination_port for packet in device.received()] == [40000]
    assert shared.came == {}
    before = rig.count("forwarded")
    # Segments of both, one behind another: joined within each, never across.
    sent = stream(20, 1400, version=family, first=1001, acknowledgment=9001, to=80)
    for at in range(0, 20, 5):
        one.sock.send(b"".join(sent[at : at + 5]))
        two.sock.send(b"".join(sent[at : at + 5]))
    rig.step(1)
    came: dict[bytes, list[bytes]] = {slot: [] for slot in slots}
    for data in read(one.tun):
        came[parse(data, vnet.SIZE, len(data) - vnet.SIZE).source].append(data)
    header = len(sent[0]) - 1400
    payload = b"".join(packet[header:] for packet in sent)
    for datagrams in came.values():
        assert b"".join(data[vnet.SIZE + header :] for data in datagrams) == payload
        assert len(datagrams) == 4
    assert rig.count("forwarded") == before + 40
    assert rig.drops() == {}
    assert rig.balanced()


def test_one_tunnels_datagrams_are_joined_across(rig: FlowRig) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    established(device)
    sent = stream(30, 1400, version=4, first=1001, acknowledgment=9001, to=80)
    for at in range(0, 30, 10):
        device.sock.send(b"".join(sent[at : at + 10]))
    rig.step(1)
    (data,) = read(device.tun)
    assert len(data) == vnet.SIZE + 40 + 30 * 1400


def test_what_comes_back_is_packed_behind_its_number(rig: FlowRig) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    _, slot = established(device)
    listener = slot[:-3] + b"\x80\x00\x01"
    for number in range(20):
        device.tun.send(vnet.ZERO + segment(listener, slot, PORT, device.port, 9001 + number, 1001, ACK))
    rig.step(1)
    (data,) = shared.of(device.number)
    assert [packet.sequence for packet in packets(data)] == list(range(9001, 9021))


def test_nobody_sends_for_a_tunnel_that_is_not_his(rig: FlowRig) -> None:
    mine = Shared(rig)
    number = Device(rig, mine).number
    with rig.tunnel() as connected, rig.another_onramp(1) as link:
        ours, theirs = seqpacket.pair()
        seqpacket.send(link, encode([Trunk()]), [theirs.fileno()])
        theirs.close()
        rig.step()
        syn = segment(DEVICE4, FAMILIES[4][1], 40000, 80, 1000, 0, SYN)
        for whose in (number, number + 1, 999, 0):
            ours.send(NUMBER.pack(whose) + syn + syn)
        rig.step()
        assert rig.drops() == {"unknown_tunnel": 8}
        assert rig.asked() == []
        assert rig.balanced()
        # Nor is a number taken that is another's.
        adopt = Adopt(number, context(), Framing.RAW, 1500, transport=Transport.TRUNK, descriptors=0)
        for whose in (number, number + 1):
            seqpacket.send(link, encode([msgspec.structs.replace(adopt, tunnel=whose)]))
        rig.step()
        said = rig.told(link)
        assert [type(message) for message in said] == [Hello, Trunked, AdoptRefused, AdoptRefused]
        connected.send(syn)
        rig.step()
        assert len(rig.asked()) == 1
        ours.close()


@pytest.mark.parametrize(
    ("data", "reason"), [(NUMBER.pack(1), "empty_datagram"), (NUMBER.pack(1)[:1], "short_datagram")]
)
def test_a_datagram_without_packets_is_counted(rig: FlowRig, data: bytes, reason: str) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    shared.sock.send(data)
    device.send(SYN)
    assert rig.drops() == {reason: 1}
    assert len(rig.asked()) == 1


def test_a_tunnel_is_refused_without_a_trunk_or_with_another_framing(rig: FlowRig) -> None:
    number = rig.by_trunk()
    refused = rig.told()[-1]
    assert isinstance(refused, AdoptRefused)
    assert (refused.tunnel, refused.code) == (number, "NO_TRUNK")
    with rig.trunk():
        rig.say_onramp(Adopt(9, context(), Framing.VNET, 1500, transport=Transport.TRUNK, descriptors=0))
        refused = rig.told()[-1]
        assert isinstance(refused, AdoptRefused)
        assert refused.code == "INVALID"
    assert rig.worker.tunnels == {}


def test_a_trunk_that_is_none_ends_the_link(rig: FlowRig) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        for fds in ([], [right.fileno()]):
            with rig.another_onramp() as link:
                seqpacket.send(link, encode([Trunk()]), fds)
                assert [type(message) for message in rig.told(link)] == [Hello]
                assert link.recv(1) == b""
    assert rig.worker.trunks == {}


def test_tunnels_outlive_their_onramp(rig: FlowRig) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    _, slot = established(device)
    other = Device(rig, shared, context(device="phone"))
    shared.sock.close()
    rig.onramp.close()
    rig.until(lambda: not rig.worker.onramps)
    device.kernel(slot, ACK, 9001)
    device.kernel(slot, ACK, 9002)
    assert rig.drops() == {}
    # Its successor hears of them, which aren't an on-ramp's of another number.
    with rig.another_onramp(1) as stranger:
        assert [type(message) for message in rig.told(stranger)] == [Hello]
    rig.onramp = rig.another_onramp()
    tunnel = rig.worker.tunnels[device.number]
    held = [
        Held(number, rig.worker.tunnels[number].context, Framing.RAW, 1500, Transport.TRUNK, descriptors=0, busy=busy)
        for number, busy in ((device.number, True), (other.number, False))
    ]
    assert rig.told()[1:] == held
    shared.sock = rig.trunk()
    assert rig.told() == [Trunked()]
    assert [packet.sequence for packet in device.received()] == [9001, 9002]
    # Said again, and with news, it is the same tunnel.
    changed = msgspec.structs.replace(tunnel.context, groups=("eng",))
    rig.say_onramp(Adopt(device.number, changed, Framing.RAW, 1500, transport=Transport.TRUNK, descriptors=0))
    assert rig.told() == [Adopted(device.number)]
    assert tunnel.context == changed
    rig.say_onramp(Recontext(other.number, held[1].context))
    device.send(ACK, 1001, 9003)
    assert len(device.inside()) == 1
    assert rig.balanced()


def test_an_onramp_that_stays_away_loses_its_tunnels(rig: FlowRig) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    established(device)
    shared.sock.close()
    rig.step()
    now = rig.worker.now
    rig.worker.clock = lambda: now + (trunks.AWAY - 2) * SECOND
    rig.step()
    assert list(rig.worker.tunnels) == [device.number]
    rig.worker.clock = lambda: now + (trunks.AWAY + 1) * SECOND
    rig.step()
    assert rig.worker.tunnels == {}
    assert rig.told()[-1] == TunnelClosed(device.number, "onramp_away")
    assert rig.records()[-1].reason == "tunnel_closed"


def test_tunnels_of_a_full_trunk_take_turns(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(tunnel_queue_bytes=60_000))
    shared = Shared(rig)
    loud, quiet = Device(rig, shared), Device(rig, shared, context(device="phone"))
    tunnels = [rig.worker.tunnels[device.number] for device in (loud, quiet)]
    trunk = tunnels[0].bearer
    sent = 0
    while rig.worker.deliver(tunnels[0], bytes([0x45]) + bytes(999)):
        sent += 1
    assert rig.drops() == {"tunnel_full": 1}
    assert tunnels[0].queued == 60_000
    # There is room for the other's, which it gets in turn.
    for _ in range(3):
        assert rig.worker.deliver(tunnels[1], bytes([0x45]) + bytes(999))
    assert isinstance(trunk, trunks.Trunk)
    assert trunk.queued == 63_000
    came = 0
    while trunk.queued or not came:
        came += len(shared.of(loud.number))
        rig.step(1)
    came += len(shared.of(loud.number))
    assert came == sent
    waited = shared.order[-63:]
    assert [at for at, whose in enumerate(waited) if whose == quiet.number] == [1, 3, 5]
    assert rig.worker._epoll.poll(0) == []
    rig.close()


def test_all_queues_of_a_trunk_have_a_bound_together(rig: FlowRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunks, "QUEUES", 1500)
    shared = Shared(rig)
    devices = [Device(rig, shared), Device(rig, shared, context(device="phone"))]
    shared.sock.close()
    rig.step()
    one, two = (rig.worker.tunnels[device.number] for device in devices)
    assert rig.worker.deliver(one, bytes(1000))
    assert not rig.worker.deliver(two, bytes(1000))
    assert rig.drops() == {"onramp_away": 1}
    # What a closed tunnel's queue had is free.
    rig.worker.tunnels.close(one.id, "test")
    assert rig.worker.deliver(two, bytes(1000))


def test_numbers_of_closed_tunnels_are_nobodys(rig: FlowRig) -> None:
    shared = Shared(rig)
    device = Device(rig, shared)
    rig.say_onramp(TunnelClosed(device.number, "removed"))
    device.send(SYN)
    assert rig.drops() == {"unknown_tunnel": 1}
