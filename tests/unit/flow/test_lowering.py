"""Flows that are lifted and lowered again, packet by packet: the laptop's segments go to one kernel, another kernel's go to the NAS.

Both kernels, and the upgrader between them, are played here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.flow.control import Detached
from falkirk.flow.settings import FlowSettings
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.build import segment, unreachable
from falkirk.wire.checksum import partial_field
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Adopt, Closed, Connected, DialFailed, Message, Prepare, TunnelClosed
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import Packet, parse, verify
from falkirk.wire.slots import LOWERED
from tests.flow_rig import PORT, TENANT, read
from tests.forward_rig import BEHIND, LAPTOP, NAS, Pair, between, connect, echo, hop, reasons, tcp, who
from tests.unit.flow.test_segment_size import offered, syn

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
R, V = Framing.RAW, Framing.VNET
FRAMINGS = {"raw": (R, R), "vnet": (V, V), "raw-vnet": (R, V), "vnet-raw": (V, R)}
FAMILIES = (4, 6)
PORTS = (40000, 22)
POLICIES = (
    PolicySource(
        TENANT,
        "main",
        0,
        [
            RuleSource("ssh", 'device.name == "laptop" && net.dst_device == "nas"', "allow", "l4"),
            RuleSource("back", 'device.name == "nas" && net.dst_device == "laptop" && net.port > 1024', "allow", "l4"),
            RuleSource("off", 'net.dst_device == "off"', "allow", "l4"),
        ],
    ),
)


class Lowered:
    """The pair of devices, and what stands between: two kernels and the upgrader of the laptop's worker."""

    def __init__(self, pair: Pair, family: int, framings: tuple[Framing, Framing]) -> None:
        self.pair, self.family = pair, family
        self.rig = pair.rigs[0]
        self.there = LAPTOP[family], NAS[family]
        self.framing = framings[0]
        # Packets for another worker's tunnel cross as super-packets.
        self.lower_framing = framings[1] if len(pair.rigs) == 1 else V
        self.slot = self.lower = 0

    # the laptop and the NAS

    def laptop(self, flags: int, sequence: int = 1000, acknowledged: int = 0, ports: tuple[int, int] = PORTS) -> None:
        self.pair.laptop.send(tcp(*self.there, ports, flags, sequence, acknowledged))

    def nas(self, flags: int, sequence: int = 5000, acknowledged: int = 0, ports: tuple[int, int] = PORTS) -> None:
        self.pair.nas.send(tcp(*self.there[::-1], ports[::-1], flags, sequence, acknowledged))

    def at(self, end: str) -> list[Packet]:
        return [packet for packet, _ in getattr(self.pair, end).received()]

    # the upgrader

    def asked(self) -> list[Message]:
        self.pair.step()
        return self.rig.asked()

    def prepared(self) -> Prepare:
        (message,) = self.asked()
        assert isinstance(message, Prepare)
        self.slot, self.lower = message.slot, message.lower
        return message

    def say(self, *messages: Message) -> None:
        self.rig.say_upgrader(*messages)
        self.pair.step()

    # the kernels

    def _address(self, slot: int) -> bytes:
        plan = self.rig.plan
        address = plan.address4 if self.family == 4 else plan.address6
        return address(self.rig.number, slot & ~LOWERED)

    def lowering(self, flags: int, sequence: int = 7000, acknowledged: int = 0) -> None:
        """The kernel that lowers sends to the slot."""
        own = self._address(self.rig.plan.slot(self.lower_framing, 1))
        packet = segment(own, self._address(self.lower), *PORTS, sequence, acknowledged, flags, 65535)
        self.rig.lower_tun[self.lower_framing].send(vnet.ZERO + packet)
        self.pair.step()

    def lifting(self, flags: int, sequence: int = 3000, acknowledged: int = 1001) -> None:
        """The kernel that lifts answers the slot."""
        own = self._address(self.rig.plan.slot(self.framing, 1))
        packet = segment(own, self._address(self.slot), PORT, PORTS[0], sequence, acknowledged, flags, 65535)
        self.rig.tun[self.framing].send(vnet.ZERO + packet)
        self.pair.step()

    def inside(self, tuns: dict[Framing, object], framing: Framing) -> list[Packet]:
        self.pair.step()
        packets = []
        for data in read(tuns[framing]):  # type: ignore[arg-type]
            packet = parse(data, 10, len(data) - 10)
            if not data[0] & 1:
                verify(data, packet)
            packets.append(packet)
        return packets

    def lifted(self) -> list[Packet]:
        """What the kernel that lifts has got."""
        return self.inside(self.rig.tun, self.framing)  # type: ignore[arg-type]

    def lowered(self) -> list[Packet]:
        """What the kernel that lowers has got."""
        return self.inside(self.rig.lower_tun, self.lower_framing)  # type: ignore[arg-type]

    # a whole connection

    def dialled(self) -> None:
        """The NAS has accepted."""
        self.laptop(SYN)
        self.prepared()
        self.lowering(SYN)
        assert [packet.flags for packet in self.at("nas")] == [SYN]
        self.nas(SYN | ACK, 5000, 7001)
        assert [packet.flags for packet in self.lowered()] == [SYN | ACK]
        self.lowering(ACK, 7001, 5001)
        assert [packet.flags for packet in self.at("nas")] == [ACK]

    def open(self) -> None:
        """Both connections are there."""
        self.dialled()
        self.say(Connected(self.slot, 1))
        assert [packet.flags for packet in self.lifted()] == [SYN]
        self.lifting(SYN | ACK)
        self.laptop(ACK, 1001, 3001)
        assert [packet.flags for packet in self.at("laptop")] == [SYN | ACK]
        assert [packet.flags for packet in self.lifted()] == [ACK]

    def legs(self) -> int:
        """That are in use or linger."""
        return sum(flow is not None for lane in self.rig.worker.lowering.lanes.values() for flow in lane.flows)

    def pass_time(self, seconds: int) -> None:
        """Second by second, so that nothing is skipped."""
        for _ in range(seconds):
            self.pair.pass_time(1)


@pytest.fixture(
    params=[(w, f, v) for w in (1, 2) for f in FRAMINGS for v in FAMILIES], ids=lambda p: f"{p[0]}w-{p[1]}-{p[2]}"
)
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lowered]:
    workers, framing, family = request.param
    with between(tmp_path, workers, FRAMINGS[framing], policies=POLICIES) as pair:
        yield Lowered(pair, family, FRAMINGS[framing])


@pytest.fixture(params=[1, 2], ids=["1w", "2w"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lowered]:
    with between(tmp_path, request.param, policies=POLICIES) as pair:
        yield Lowered(pair, 4, (R, R))


# opened


def test_the_device_sees_the_client_itself(way: Lowered) -> None:
    way.laptop(SYN)
    prepare = way.prepared()
    assert (prepare.destination, prepare.port, prepare.source_port) == (way.there[1], 22, 40000)
    assert prepare.lower >= LOWERED
    assert prepare.slot < LOWERED
    way.lowering(SYN)
    (syn,) = way.at("nas")
    assert (syn.source, syn.destination, syn.source_port, syn.destination_port) == (*way.there, *PORTS)
    assert way.at("laptop") == []
    way.nas(SYN | ACK, 5000, 7001)
    (answer,) = way.lowered()
    own = way._address(way.rig.plan.slot(way.lower_framing, 1))
    assert (answer.source, answer.destination) == (way._address(prepare.lower), own)
    assert (answer.source_port, answer.destination_port, answer.acknowledgment) == (22, 40000, 7001)
    way.say(Connected(way.slot, 1))
    assert way.pair.balanced()


def test_bytes_both_ways_and_an_end_in_order(way: Lowered) -> None:
    way.open()
    way.lowering(ACK | PSH, 7001, 5001)
    way.nas(ACK | PSH, 5001, 7001)
    assert [packet.flags for packet in way.at("nas")] == [ACK | PSH]
    assert [packet.flags for packet in way.lowered()] == [ACK | PSH]
    # The laptop ends, half-close passes; then the NAS.
    way.laptop(FIN | ACK, 1001, 3001)
    way.lifting(ACK, 3001, 1002)
    way.lowering(FIN | ACK, 7001, 5001)
    way.nas(ACK, 5001, 7002)
    assert way.legs() == 1
    way.nas(FIN | ACK, 5001, 7002)
    way.lowering(ACK, 7002, 5002)
    way.lifting(FIN | ACK, 3001, 1002)
    assert way.pair.flows() == 1
    way.say(Closed(way.slot, "finished", 10, 20))
    assert (way.pair.flows(), way.legs()) == (1, 0)
    way.laptop(ACK, 1002, 3002)
    assert (way.pair.flows(), way.pair.passages()) == (0, 0)
    (record,) = [record for record in way.pair.records() if record.event == "ended"]
    assert (record.reason, record.treatment, record.destination_device) == ("finished", "l4", "nas")
    assert way.pair.balanced()
    assert way.pair.drops() == {}


def test_a_slow_device_is_waited_for(plain: Lowered) -> None:
    """The client has ended long ago; what lies in the kernel is the device's to fetch."""
    plain.open()
    plain.laptop(FIN | ACK, 1001, 3001)
    plain.lifting(FIN | ACK, 3001, 1002)
    plain.laptop(ACK, 1002, 3002)
    plain.lowering(FIN | ACK, 7001, 5001)
    plain.nas(FIN | ACK, 5001, 7001)
    plain.say(Closed(plain.slot, "finished", 0, 0))
    for _ in range(4):
        plain.pass_time(100)
        plain.lowering(ACK, 7000, 5002)
        plain.nas(ACK, 5002, 7001)
        assert (plain.pair.flows(), plain.legs()) == (1, 1)
    plain.nas(ACK, 5002, 7002)
    assert (plain.pair.flows(), plain.legs()) == (0, 0)


# refused


def test_a_closed_port(way: Lowered) -> None:
    way.laptop(SYN)
    way.prepared()
    way.lowering(SYN)
    way.nas(RST | ACK, 0, 7001)
    assert [packet.flags for packet in way.lowered()] == [RST | ACK]
    way.say(DialFailed(way.slot, errno.ECONNREFUSED, 1))
    assert [packet.flags for packet in way.at("laptop")] == [RST | ACK]
    assert reasons(way.pair) == ["upstream_refused"]
    way.pass_time(6)
    assert (way.pair.flows(), way.legs(), way.pair.passages()) == (0, 0, 0)


@pytest.mark.parametrize("kind", [Unreachable.HOST, Unreachable.PORT, Unreachable.PROHIBITED])
def test_an_error_of_the_devices_reaches_the_kernel(way: Lowered, kind: Unreachable) -> None:
    way.laptop(SYN)
    way.prepared()
    way.lowering(SYN)
    ((packet, body),) = way.pair.nas.received()
    error = unreachable(body, packet, kind, NAS[way.family])
    assert error is not None
    way.pair.nas.send(error)
    (seen,) = way.lowered()
    assert seen.icmp_type in (1, 3)
    own = way._address(way.rig.plan.slot(way.lower_framing, 1))
    assert (seen.source, seen.destination) == (way._address(way.lower), own)
    way.say(DialFailed(way.slot, errno.EHOSTUNREACH, 1))
    assert [packet.icmp_type for packet in way.at("laptop")] == [3 if way.family == 4 else 1]
    assert way.pair.balanced()


def test_a_router_behind_the_device_may_say_so(tmp_path: Path) -> None:
    with between(tmp_path, 1, policies=POLICIES) as pair:
        pair.laptop.send(tcp(LAPTOP[4], BEHIND[4], PORTS, SYN))
        way = Lowered(pair, 4, (R, R))
        way.prepared()
        way.lowering(SYN)
        ((packet, body),) = pair.nas.received()
        assert (packet.source, packet.destination) == (LAPTOP[4], BEHIND[4])
        for source, comes in ((bytes([10, 9, 0, 1]), 1), (bytes([10, 8, 0, 1]), 0)):
            error = unreachable(body, packet, Unreachable.HOST, source)
            assert error is not None
            pair.nas.send(error)
            assert len(way.lowered()) == comes
        pair.nas.send(tcp(BEHIND[4], LAPTOP[4], PORTS[::-1], SYN | ACK, 5000, 7001))
        assert len(way.lowered()) == 1
        pair.nas.send(tcp(BEHIND[4], LAPTOP[4], (23, PORTS[0]), SYN | ACK, 5000, 7001))
        assert pair.drops() == {"spoofed_source": 2}


def test_a_device_without_a_tunnel(plain: Lowered) -> None:
    off = bytes([100, 96, 0, 4])
    plain.pair.laptop.send(tcp(LAPTOP[4], off, PORTS, SYN))
    ((packet, _),) = plain.pair.laptop.received()
    assert (packet.icmp_type, packet.icmp_code) == (3, 1)
    (record,) = plain.pair.records()
    assert (record.event, record.reason, record.why) == ("denied", "device_offline", "device off has no open tunnel")
    assert plain.asked() == []


def test_slots_run_out_with_a_reason_and_rest(tmp_path: Path) -> None:
    with between(tmp_path, 1, settings=FlowSettings(lower_slots=1), policies=POLICIES) as pair:
        way = Lowered(pair, 4, (R, R))
        way.laptop(SYN)
        first = way.prepared()
        way.laptop(SYN, ports=(40001, 22))
        assert way.asked() == []
        assert pair.drops() == {"lower_slots_exhausted": 1}
        way.say(DialFailed(first.slot, errno.ETIMEDOUT, 1))
        way.pass_time(6)
        way.laptop(SYN, ports=(40002, 22))
        assert way.asked() == []
        way.pass_time(61)
        way.laptop(SYN, ports=(40003, 22))
        assert way.prepared().lower == first.lower
        assert reasons(pair, "denied") == ["lower_slots_exhausted"]


def test_the_device_has_the_same_ports_the_other_way_round(tmp_path: Path) -> None:
    """Its own connection goes to the client's newest tunnel; the client comes by an older one."""
    with between(tmp_path, 1, policies=POLICIES) as pair:
        way = Lowered(pair, 4, (R, R))
        newer = pair.end(0, R, who("laptop", list(LAPTOP.values())))
        way.nas(SYN, ports=(40000, 2000))
        assert len(way.asked()) == 1
        way.laptop(SYN, ports=(40000, 2000))
        assert way.asked() == []
        assert pair.drops() == {"ports_in_use": 1}
        assert reasons(pair, "denied") == ["ports_in_use"]
        newer.sock.close()


def test_both_ends_open_at_once(tmp_path: Path) -> None:
    """RFC 9293 3.5: the kernel gets the device's SYN for what it is."""
    with between(tmp_path, 1, policies=POLICIES) as pair:
        way = Lowered(pair, 4, (R, R))
        way.laptop(SYN, ports=(40000, 2000))
        way.prepared()
        way.nas(SYN, 5000, ports=(40000, 2000))
        assert [packet.flags for packet in way.lowered()] == [SYN]


# reset


def test_the_device_resets(way: Lowered) -> None:
    way.open()
    way.nas(RST | ACK, 5001, 7001)
    assert [packet.flags for packet in way.lowered()] == [RST | ACK]
    way.say(Closed(way.slot, "upstream_reset", 0, 0))
    assert (way.pair.flows(), way.legs()) == (1, 0)
    way.lifting(RST | ACK, 3001)
    assert [packet.flags for packet in way.at("laptop")] == [RST | ACK]
    assert reasons(way.pair) == ["upstream_reset"]
    assert way.pair.flows() == 0


def test_the_client_resets(way: Lowered) -> None:
    way.open()
    way.laptop(RST | ACK, 1001, 3001)
    way.say(Closed(way.slot, "client_reset", 0, 0))
    assert (way.pair.flows(), way.legs()) == (0, 1)
    way.lowering(RST | ACK, 7001, 5001)
    assert [packet.flags for packet in way.at("nas")] == [RST | ACK]
    way.pass_time(6)
    assert (way.legs(), way.pair.passages()) == (0, 0)
    assert way.pair.balanced()


def test_a_client_that_resets_while_it_is_held(plain: Lowered) -> None:
    plain.dialled()
    plain.laptop(RST, 1001)
    assert plain.asked() == [Abort(plain.slot)]
    assert plain.pair.flows() == 0
    plain.lowering(RST | ACK, 7001, 5001)
    assert [packet.flags for packet in plain.at("nas")] == [RST | ACK]
    plain.say(Closed(plain.slot, "aborted", 0, 0))


def test_a_flow_that_is_ended_by_hand(plain: Lowered) -> None:
    plain.open()
    (tunnel,) = [tunnel for tunnel in plain.rig.worker.tunnels.values() if tunnel.context.device == "laptop"]
    (flow,) = tunnel.flows.values()
    flow.owner.end(flow, "terminated")
    assert plain.asked() == [Abort(plain.slot)]
    plain.lowering(RST | ACK, 7001, 5001)
    plain.lifting(RST | ACK, 3001)
    plain.say(Closed(plain.slot, "aborted", 0, 0))
    assert [packet.flags for packet in (*plain.at("nas"), *plain.at("laptop"))] == [RST | ACK] * 2
    assert (reasons(plain.pair), plain.legs(), plain.pair.flows()) == (["terminated"], 0, 0)


@pytest.mark.parametrize("end", ["laptop", "nas"])
def test_a_tunnel_that_closes_ends_its_flows(plain: Lowered, end: str) -> None:
    plain.open()
    getattr(plain.pair, end).sock.close()
    plain.pair.step()
    assert plain.asked() == [Abort(plain.slot)]
    if end == "laptop":
        plain.lowering(RST | ACK, 7001, 5001)
        assert [packet.flags for packet in plain.at("nas")] == [RST | ACK]
        assert reasons(plain.pair) == ["tunnel_closed"]
    else:
        if len(plain.pair.rigs) == 2:
            plain.rig.say_parent(Detached(2))
        plain.lifting(RST | ACK, 3001)
        plain.say(Closed(plain.slot, "aborted", 0, 0))
        assert [packet.flags for packet in plain.at("laptop")] == [RST | ACK]
        assert reasons(plain.pair) == ["device_offline"]
    plain.pass_time(6)
    assert (plain.pair.flows(), plain.legs(), plain.pair.passages()) == (0, 0, 0)


def test_ports_are_used_again_at_once(plain: Lowered) -> None:
    """A new connection with the same ports, while the old one's leg still lingers."""
    plain.open()
    first = plain.lower
    plain.laptop(RST | ACK, 1001, 3001)
    plain.say(Closed(plain.slot, "client_reset", 0, 0))
    plain.laptop(SYN, 200_000)
    assert plain.prepared().lower != first
    plain.lowering(SYN, 90_000)
    assert [packet.sequence for packet in plain.at("nas")] == [90_000]
    assert plain.legs() == 1


def test_the_device_opens_with_the_ports_of_one_that_is_over(plain: Lowered) -> None:
    plain.open()
    plain.laptop(RST | ACK, 1001, 3001)
    plain.say(Closed(plain.slot, "client_reset", 0, 0))
    assert plain.legs() == 1
    plain.nas(SYN, 1)
    if len(plain.pair.rigs) == 2:
        assert plain.pair.drops() == {"no_flow": 1}
        plain.nas(SYN, 1)
        assert plain.legs() == 0
    assert [type(message) for message in plain.pair.rigs[-1].asked()] == [Prepare]


# what goes through is what it was


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("framing", [R, V])
def test_segments_fit_the_devices_tunnel(tmp_path: Path, workers: int, framing: Framing) -> None:
    """Whatever either kernel offers, and whatever the device does."""
    with between(tmp_path, workers, (framing, framing), mtu=1280, policies=POLICIES) as pair:
        way = Lowered(pair, 4, (framing, framing))
        way.laptop(SYN)
        way.prepared()
        addresses = way._address(way.rig.plan.slot(way.lower_framing, 1)), way._address(way.lower)
        way.rig.lower_tun[way.lower_framing].send(syn(addresses, PORTS, SYN, 1460, partial=False))
        (data,) = pair.nas.raw()
        assert offered((b"" if framing is V else vnet.ZERO) + data) == 1240
        said = syn(way.there[::-1], PORTS[::-1], SYN | ACK, 1460, partial=False)
        pair.nas.sock.send(said[10:] if framing is R else said)
        pair.step()
        (data,) = read(way.rig.lower_tun[way.lower_framing])
        assert offered(data) == 1240


def test_a_super_packet_is_cut_for_a_raw_tunnel_of_another_worker(tmp_path: Path) -> None:
    with between(tmp_path, 2, (V, R), policies=POLICIES) as pair:
        way = Lowered(pair, 4, (V, R))
        way.open()
        own = way._address(way.rig.plan.slot(V, 1))
        body = bytearray(segment(own, way._address(way.lower), *PORTS, 7001, 5001, ACK, 65535) + bytes(3000))
        body[2:4] = len(body).to_bytes(2, "big")
        body[10:12] = b"\0\0"
        total = int.from_bytes(body[:20], "little") % 0xFFFF
        body[10:12] = (0xFFFF - total).to_bytes(2, "little")
        body[36:38] = partial_field(own, way._address(way.lower), 6, len(body) - 20).to_bytes(2, "big")
        header = vnet.Header(1, 1, 40, 1460, 20, 16).pack()
        way.rig.lower_tun[V].send(header + bytes(body))
        sizes = [packet.payload_length for packet in way.at("nas")]
        assert sizes == [1460, 1460, 80]


# workers and upgraders come and go


def test_an_upgrader_that_dies_resets_both_ends(plain: Lowered) -> None:
    plain.open()
    assert plain.rig.upgrader is not None
    plain.rig.upgrader.close()
    plain.lifting(RST | ACK, 3001)
    plain.lowering(RST | ACK, 7001, 5001)
    assert [packet.flags for packet in (*plain.at("nas"), *plain.at("laptop"))] == [RST | ACK] * 2
    plain.pass_time(7)
    assert reasons(plain.pair) == ["upgrader_lost"]
    assert (plain.legs(), plain.pair.passages()) == (0, 0)


def test_an_upgrader_whose_namespaces_die_too(plain: Lowered) -> None:
    """No kernel is left to send a RST: both ends are asked where they stand, and reset by the answer."""
    plain.open()
    assert plain.rig.upgrader is not None
    plain.rig.upgrader.close()
    for sock in (*plain.rig.tun.values(), *plain.rig.lower_tun.values()):
        sock.close()
    plain.pass_time(2)
    (probe,) = plain.at("nas")[:1]
    assert (probe.source, probe.destination, probe.flags) == (*plain.there, ACK)
    (probe,) = plain.at("laptop")[:1]
    assert (probe.source, probe.destination, probe.flags) == (*plain.there[::-1], ACK)
    plain.nas(ACK, 5001, 7001)
    assert [packet.flags for packet in plain.at("nas")][-1] == RST


def _succeed(way: Lowered) -> None:
    """The laptop's worker is killed, and another takes its place."""
    rig = way.rig
    rig.kill()
    rig.start()
    if len(way.pair.rigs) == 2:
        connect(*way.pair.rigs)
    for number, end, name in ((1, way.pair.laptop, "laptop"), (2, way.pair.nas, "nas")):
        if end.rig is not rig:
            way.pair.attached(1, number, end.framing, who(name, list(NAS.values())))
            continue
        ours, theirs = seqpacket.pair()
        context = who(name, list((LAPTOP if name == "laptop" else NAS).values()))
        rig.say_onramp(Adopt(number, context, end.framing, 1500), [theirs.fileno()])
        end.sock.close()
        end.sock = ours
        theirs.close()
    rig.pair()
    rig.load()


def test_a_successor_leads_the_resets_back(plain: Lowered) -> None:
    plain.open()
    _succeed(plain)
    plain.lifting(RST | ACK, 3001)
    plain.lowering(RST | ACK, 7001, 5001)
    for end, ends in (("nas", plain.there), ("laptop", plain.there[::-1])):
        (packet,) = plain.at(end)
        assert (packet.source, packet.destination, packet.flags) == (*ends, RST | ACK)
    assert reasons(plain.pair) == ["tracker_lost"]


def test_a_successor_probes_those_that_nobody_has_reset(plain: Lowered) -> None:
    plain.open()
    _succeed(plain)
    plain.pass_time(2)
    for end, ends in (("nas", plain.there), ("laptop", plain.there[::-1])):
        packet = plain.at(end)[0]
        assert (packet.source, packet.destination, packet.flags) == (*ends, ACK)


def test_the_devices_worker_dies(tmp_path: Path) -> None:
    """The flow ends at once; the device is told once its tunnel is back."""
    with between(tmp_path, 2, policies=POLICIES) as pair:
        way = Lowered(pair, 4, (R, R))
        way.open()
        owner, other = pair.rigs
        other.kill()
        pair.rigs = [owner]
        pair.step()
        assert way.asked() == [Abort(way.slot)]
        way.lifting(RST | ACK, 3001)
        way.say(Closed(way.slot, "aborted", 0, 0))
        assert [packet.flags for packet in way.at("laptop")] == [RST | ACK]
        assert reasons(pair) == ["device_offline"]
        other.start()
        pair.rigs = [owner, other]
        connect(owner, other)
        ours, theirs = seqpacket.pair()
        context = who("nas", list(NAS.values()))
        other.say_onramp(Adopt(2, context, R, 1500), [theirs.fileno()])
        theirs.close()
        pair.nas.sock.close()
        pair.nas.sock = ours
        pair.attached(1, 2, R, context)
        other.pair()
        other.load()
        way.pass_time(2)
        probe = way.at("nas")[0]
        assert (probe.source, probe.destination, probe.flags) == (*way.there, ACK)


def test_an_on_ramp_that_closes_the_tunnel(plain: Lowered) -> None:
    plain.open()
    plain.pair.rigs[-1].say_onramp(TunnelClosed(2, "device disabled"))
    plain.pair.step()
    if len(plain.pair.rigs) == 2:
        plain.rig.say_parent(Detached(2))
    assert plain.asked() == [Abort(plain.slot)]


def test_other_protocols_under_the_same_rule_are_forwarded(plain: Lowered) -> None:
    ping = echo(LAPTOP[4], NAS[4], 7)
    plain.pair.laptop.send(ping)
    assert plain.pair.nas.bodies() == [hop(ping)]


def test_a_rule_that_changes_ends_both_sides(plain: Lowered) -> None:
    """And one that allows the client's direction only doesn't take the device's replies for flows of its own."""
    plain.open()
    for rig in plain.pair.rigs:
        rig.policies = (PolicySource(TENANT, "main", 0, POLICIES[0].rules[:1]),)
        rig.load()
    plain.pair.step()
    assert (plain.asked(), plain.pair.flows()) == ([], 1)
    for rig in plain.pair.rigs:
        rig.policies = ()
        rig.load()
    plain.pair.step()
    assert plain.asked() == [Abort(plain.slot)]
    plain.lowering(RST | ACK, 7001, 5001)
    plain.lifting(RST | ACK, 3001)
    plain.say(Closed(plain.slot, "aborted", 0, 0))
    assert [packet.flags for packet in (*plain.at("nas"), *plain.at("laptop"))] == [RST | ACK] * 2
    assert reasons(plain.pair) == ["policy_changed: default deny"]
