"""Flows that are lifted and lowered again, packet by packet: the laptop's segments go to one kernel, another kernel's go to the NAS.

Both kernels, and the upgrader between them, are played here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.control import Detached
from falkirk.flow.settings import FlowSettings
from falkirk.wire import vnet
from falkirk.wire.build import segment, too_big, unreachable
from falkirk.wire.checksum import partial_field
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, Prepare
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse
from falkirk.wire.slots import LOWERED
from tests.flow_rig import read
from tests.forward_rig import BEHIND, LAPTOP, NAS, between, reasons, tcp, who
from tests.lower_rig import ACK, FAMILIES, FIN, FRAMINGS, POLICIES, PORTS, PSH, RST, SYN, Lowered, R, V
from tests.unit.flow.test_segment_size import offered, syn
from tests.unit.wire import samples


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


def test_a_narrow_path_behind_the_device(way: Lowered) -> None:
    """The kernel that lowers hears of it, for this slot only; an IPv6 slot rests until it has forgotten."""
    way.open()
    way.lowering(ACK | PSH, 7001, 5001)
    ((packet, body),) = way.pair.nas.received()
    # As if it had had so much payload: a router quotes the beginning.
    ends = packet.source, packet.destination
    build = samples.ip4 if way.family == 4 else samples.ip6
    large = build(6, body[packet.header_length :] + bytes(1380), source=ends[0], destination=ends[1])
    error = too_big(large, parse(large, 0, len(large)), 1300, NAS[way.family])
    assert error is not None
    way.pair.nas.send(error)
    (seen,) = way.lowered()
    assert (seen.icmp_type, seen.icmp_code) == ((3, 4) if way.family == 4 else (2, 0))
    assert seen.source == way._address(way.lower)
    leg = way.rig.worker.flow_of(way.lower)
    assert leg is not None
    assert leg.long_rest is (way.family == 6)
