"""Flows from one worker's tunnel to another's, where something of it goes away or has no room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.flow import control
from falkirk.flow.settings import FlowSettings
from falkirk.flow.siblings import Gone
from falkirk.linux import seqpacket
from falkirk.wire import handover, icmp
from falkirk.wire.context import Framing
from tests.flow_rig import FlowRig, context
from tests.forward_rig import LAPTOP, NAS, Pair, between, connect, datagram, echo, hop, tcp, who

SYN, RST, ACK = 2, 4, 16
UP, DOWN = datagram(LAPTOP[4], NAS[4], 40000, 53), datagram(NAS[4], LAPTOP[4], 53, 40000)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with between(tmp_path, 2) as made:
        yield made


def ended(pair: Pair) -> list[str]:
    return [record.reason for record in pair.records() if record.event == "ended"]


def restarted(pair: Pair, number: int) -> FlowRig:
    """Kill a worker and start the next one, as the parent does: a new pair, and word of the other worker's tunnels."""
    rig, other = pair.rigs[number], pair.rigs[1 - number]
    closed = list(rig.worker.tunnels)
    rig.kill()
    for tunnel in closed:
        other.say_parent(control.Detached(tunnel))
    rig.start()
    rig.pair()
    rig.load()
    connect(rig, other)
    for open_tunnel in other.worker.tunnels.values():
        whose = open_tunnel.context
        rig.say_parent(
            control.Attached(
                open_tunnel.id,
                other.number,
                whose.tenant_id,
                whose.device_id,
                whose.virtual_network_id,
                open_tunnel.framing,
                1500,
            )
        )
    return rig


def test_a_flow_belongs_to_the_worker_of_the_tunnel_that_it_began_in(pair: Pair) -> None:
    pair.laptop.send(UP)
    pair.nas.send(DOWN)
    assert (pair.nas.bodies(), pair.laptop.bodies()) == ([hop(UP)], [hop(DOWN)])
    assert [rig.worker.flow_count for rig in pair.rigs] == [1, 0]
    assert [[record.event for record in rig.records()] for rig in pair.rigs] == [["started"], []]
    # Each packet is received and forwarded once by each worker.
    assert [(rig.count("received"), rig.count("forwarded")) for rig in pair.rigs] == [(2, 2), (2, 2)]


def test_passages_die_with_the_flow_s_owner(pair: Pair) -> None:
    pair.laptop.send(UP)
    assert pair.passages() == 2
    restarted(pair, 0)
    pair.step()
    assert pair.passages() == 0
    pair.nas.raw()
    pair.nas.send(DOWN)
    ((answer, _),) = pair.nas.received()
    assert (answer.icmp_type, answer.icmp_code) == (icmp.UNREACHABLE4, 13)
    assert ended(pair) == ["tracker_lost"]


def test_flows_end_with_the_other_tunnel_s_worker_and_begin_anew_at_its_successor(pair: Pair) -> None:
    pair.laptop.send(UP)
    pair.laptop.send(tcp(LAPTOP[4], NAS[4], (40000, 80), SYN))
    assert len(pair.nas.raw()) == 2
    rig = restarted(pair, 1)
    pair.step()
    assert (pair.flows(), pair.passages(), ended(pair)) == (0, 0, ["device_offline"] * 2)
    (host, _), (probe, _), *_ = pair.laptop.received()
    assert ((host.icmp_type, host.icmp_code), probe.flags) == ((icmp.UNREACHABLE4, 1), ACK)
    pair.laptop.send(UP)
    (answer,) = [answer for answer, _ in pair.laptop.received() if answer.icmp_type >= 0]
    assert (answer.icmp_type, answer.icmp_code) == (icmp.UNREACHABLE4, 1)
    # Its tunnel is adopted again, under its number.
    ours, theirs = seqpacket.pair()
    whose = who("nas", list(NAS.values()))
    rig.say_onramp(handover.Adopt(2, whose, Framing.RAW, 1500), [theirs.fileno()])
    theirs.close()
    pair.attached(1, 2, Framing.RAW, whose)
    pair.nas.sock.close()
    pair.nas.sock = ours
    pair.laptop.send(UP)
    assert pair.nas.bodies() == [hop(UP)]
    assert pair.rigs[0].balanced()


def test_a_connection_is_reset_at_the_other_worker_s_end_too(pair: Pair) -> None:
    pair.laptop.send(tcp(LAPTOP[4], NAS[4], (40000, 80), SYN))
    pair.nas.raw()
    pair.laptop.sock.close()
    pair.step()
    assert pair.nas.probed().source == LAPTOP[4]
    pair.nas.send(tcp(NAS[4], LAPTOP[4], (80, 40000), ACK, 5001, 1001))
    assert pair.nas.reset_by().sequence == 1001
    assert pair.passages() == 0


def test_a_closed_tunnel_s_flows_move_to_another_worker_s_tunnel_of_the_device(pair: Pair) -> None:
    newer = pair.end(0, Framing.RAW, who("nas", list(NAS.values())))
    pair.laptop.send(UP)
    assert newer.bodies() == [hop(UP)]
    newer.sock.close()
    pair.step()
    pair.laptop.send(UP)
    assert pair.nas.bodies() == [hop(UP)]
    pair.nas.send(DOWN)
    assert pair.laptop.bodies() == [hop(DOWN)]
    assert ended(pair) == []


def test_a_tunnel_that_its_worker_does_not_have_is_taken_for_closed(pair: Pair) -> None:
    """The parent's word of its end may come later than a packet for it."""
    pair.attached(1, 99, Framing.RAW, who("nas", list(NAS.values())))
    pair.laptop.send(UP)
    # Led to 99 first, and to the tunnel that is there as soon as its worker had said so.
    assert pair.drops() == {"tunnel_closed": 1}
    pair.laptop.send(UP)
    assert pair.nas.bodies() == [hop(UP)]
    assert pair.balanced()


def test_a_key_that_is_taken_there_ends_the_flow(pair: Pair) -> None:
    pair.laptop.send(UP)
    pair.nas.raw()
    second = pair.end(0, Framing.RAW, context(device="laptop", addresses=list(LAPTOP.values())))
    second.send(UP)
    assert ended(pair) == ["device_offline"]
    pair.laptop.send(UP)
    assert pair.nas.bodies()[-1:] == [hop(UP)]
    second.sock.close()


def test_a_reply_to_a_flow_that_is_over_is_dropped(pair: Pair) -> None:
    pair.laptop.send(UP)
    owner, other = pair.rigs
    # The reply is read before the word of the flow's end.
    pair.nas.sock.send(DOWN)
    other.worker.turn(0)
    ((flow,),) = [tunnel.flows.values() for tunnel in owner.worker.tunnels.values()]
    flow.owner.end(flow, "test")
    pair.step()
    assert owner.drops() == {"no_flow": 1}
    assert pair.balanced()


def test_a_full_pair_drops_packets_and_no_word(tmp_path: Path) -> None:
    with between(tmp_path, 2, settings=FlowSettings(tunnel_queue_bytes=100_000)) as pair:
        pair.laptop.send(UP)
        pair.nas.raw()
        owner = pair.rigs[0]
        big = datagram(LAPTOP[4], NAS[4], 40000, 53, bytes(1400))
        count = 0
        while not owner.drops():
            pair.laptop.sock.send(big)
            owner.step()
            count += 1
            assert count < 20000
        assert set(owner.drops()) == {"sibling_full"}
        assert owner.balanced()
        # A flow that begins now is told of behind the packets that wait.
        pair.laptop.send(echo(LAPTOP[4], NAS[4], 7))
        while owner.worker.forward.links[1].backlog:
            pair.nas.raw()
        pair.laptop.send(echo(LAPTOP[4], NAS[4], 7))
        pair.nas.raw()
        pair.nas.send(echo(NAS[4], LAPTOP[4], 7, reply=True))
        assert pair.laptop.bodies() == [hop(echo(NAS[4], LAPTOP[4], 7, reply=True))]


def test_a_late_word_about_a_flow_that_is_gone_is_nothing(pair: Pair) -> None:
    link = pair.rigs[1].worker.forward.links[0]
    link.tell(Gone(4711, closed=True))
    pair.laptop.send(UP)
    assert pair.nas.bodies() == [hop(UP)]


def test_the_pair_is_read_before_tunnels(pair: Pair) -> None:
    pair.laptop.send(UP)
    pair.nas.raw()
    other = pair.rigs[1]
    order: list[str] = []
    link, known = other.worker.forward.links[0], other.worker.forward.known

    def from_pair(mask: int) -> None:
        order.append("pair")
        link.ready(mask)

    def from_tunnel(*what: Any) -> bool:
        order.append("tunnel")
        return known(*what)

    other.worker.handlers[link.fd] = from_pair
    other.worker.forward.known = from_tunnel  # type: ignore[method-assign,assignment]
    pair.nas.sock.send(DOWN)
    pair.laptop.sock.send(UP)
    pair.rigs[0].step()
    other.worker.turn(0)
    assert order == ["pair", "tunnel"]
