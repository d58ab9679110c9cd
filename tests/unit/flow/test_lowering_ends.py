"""Lowered streams when tunnels, rules, upgraders and workers come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.flow.control import Detached
from falkirk.linux import seqpacket
from falkirk.wire.handover import Abort, Adopt, Closed, TunnelClosed
from tests.flow_rig import TENANT
from tests.forward_rig import LAPTOP, NAS, between, connect, echo, hop, reasons, who
from tests.lower_rig import ACK, FIN, POLICIES, PSH, RST, SYN, Lowered, R
from tests.unit.flow.test_tap import Watcher


@pytest.fixture(params=[1, 2], ids=["1w", "2w"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lowered]:
    with between(tmp_path, request.param, policies=POLICIES) as pair:
        yield Lowered(pair, 4, (R, R))


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


def test_a_capture_shows_both_sides_of_both(plain: Lowered) -> None:
    """The client's flow and its leg, each before and behind its NAT, under one flow id and one rule."""
    watcher = Watcher(plain.rig)
    plain.open()
    packets = watcher.packets()
    assert {packet.rule for packet in packets} == {"main/ssh"}
    assert len({packet.flow_id for packet in packets}) == 1
    assert {(packet.side, packet.device) for packet in packets} == {
        (0, "laptop"),
        (1, "laptop"),
        (0, "nas"),
        (1, "nas"),
    }
    assert {packet.fate for packet in packets} <= {"held", "forwarded", "sent"}
    watcher.close()


def test_a_forwarded_flow_with_the_ports_of_one_that_lingers(plain: Lowered) -> None:
    """The rule asks for something else now: replies are the new flow's, not the old leg's."""
    plain.open()
    plain.laptop(RST | ACK, 1001, 3001)
    plain.say(Closed(plain.slot, "client_reset", 0, 0))
    assert plain.legs() == 1
    for rig in plain.pair.rigs:
        rule = RuleSource("ssh", 'net.dst_device == "nas"', "allow", "l3")
        rig.policies = (PolicySource(TENANT, "main", 0, [rule]),)
        rig.load()
    plain.pair.step()
    plain.laptop(SYN, 200_000)
    assert [packet.sequence for packet in plain.at("nas")] == [200_000]
    plain.nas(SYN | ACK, 5000, 200_001)
    assert [packet.flags for packet in plain.at("laptop")] == [SYN | ACK]
    assert (plain.legs(), plain.lowered()) == (0, [])


def test_what_a_slow_device_is_owed_outlives_the_clients_tunnel(plain: Lowered) -> None:
    """The client's side has ended in order, and its tunnel with its command; the rest is the kernel's to deliver."""
    plain.open()
    plain.nas(FIN | ACK, 5001, 7001)
    plain.lifting(FIN | ACK, 3001, 1001)
    plain.laptop(FIN | ACK, 1001, 3002)
    plain.lifting(ACK, 3002, 1002)
    plain.pair.laptop.sock.close()
    plain.pair.step()
    assert (plain.asked(), plain.pair.flows(), plain.legs()) == ([], 0, 1)
    assert reasons(plain.pair) == ["finished"]
    plain.say(Closed(plain.slot, "finished", 0, 0))
    plain.at("nas")
    for _ in range(3):
        plain.pass_time(100)
        plain.lowering(ACK | PSH, 7001, 5002)
        assert [packet.flags for packet in plain.at("nas")] == [ACK | PSH]
    plain.lowering(FIN | ACK, 7001, 5002)
    plain.nas(ACK, 5002, 7002)
    assert [packet.flags for packet in plain.lowered()][-1] == ACK
    assert (plain.legs(), plain.pair.passages()) == (0, 0)
