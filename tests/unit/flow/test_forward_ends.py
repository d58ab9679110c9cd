"""How flows between two devices end, and what of them is limited: by one worker and by two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.wire.context import Framing
from tests.forward_rig import (
    GRE,
    LAPTOP,
    NAS,
    End,
    Pair,
    between,
    connected,
    datagram,
    echo,
    packet,
    reasons,
    tcp,
    who,
)

FIN, SYN, RST, ACK = 1, 2, 4, 16
FAMILIES = (4, 6)


@pytest.fixture(params=[1, 2], ids=["1w", "2w"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Two raw tunnels."""
    with between(tmp_path, request.param) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_connection_ends_and_may_begin_anew(plain: Pair, family: int) -> None:
    connected(plain, family)
    there, back, ports = (LAPTOP[family], NAS[family]), (NAS[family], LAPTOP[family]), (40000, 80)
    plain.laptop.send(tcp(*there, ports, FIN | ACK, 1001, 5001))
    plain.nas.send(tcp(*back, ports[::-1], FIN | ACK, 5001, 1002))
    plain.laptop.send(tcp(*there, ports, ACK, 1002, 5002))
    assert (len(plain.nas.raw()), len(plain.laptop.raw()), plain.flows()) == (2, 1, 1)
    plain.laptop.send(tcp(*there, ports, SYN, 9000))
    assert (len(plain.nas.raw()), plain.flows()) == (1, 1)
    plain.nas.send(tcp(*back, ports[::-1], RST | ACK, 0, 9001))
    assert len(plain.laptop.raw()) == 1
    plain.pass_time(7)
    assert (plain.flows(), plain.passages()) == (0, 0)
    assert reasons(plain) == ["finished", "upstream_reset"]
    # Late segments are reset.
    plain.laptop.send(tcp(*there, ports, ACK, 9001, 1))
    ((answer, _),) = plain.laptop.received()
    assert answer.flags == RST
    assert plain.balanced()


THERE = LAPTOP[4], NAS[4]
SETTINGS = FlowSettings()


@pytest.mark.parametrize(
    ("first", "seconds"),
    [
        (tcp(*THERE, (40000, 80), SYN), SETTINGS.transitory_idle_s),
        (datagram(*THERE, 40000, 9), SETTINGS.udp_idle_s),
        (datagram(*THERE, 40000, 53), SETTINGS.udp_dns_idle_s),
        (echo(*THERE, 7), SETTINGS.echo_idle_s),
        (packet(*THERE, GRE, bytes(8)), SETTINGS.other_idle_s),
    ],
)
def test_an_idle_flow_ends_by_its_protocol_s_timer(plain: Pair, first: bytes, seconds: int) -> None:
    plain.laptop.send(first)
    plain.pass_time(seconds - 5)
    assert plain.flows() == 1
    plain.laptop.send(first)
    plain.pass_time(seconds - 5)
    assert plain.flows() == 1
    plain.pass_time(10)
    assert (plain.flows(), plain.passages(), reasons(plain)) == (0, 0, ["idle"])


def test_an_established_connection_may_be_idle_for_long(plain: Pair) -> None:
    connected(plain, 4)
    plain.pass_time(SETTINGS.established_idle_s - 5)
    assert plain.flows() == 1
    plain.pass_time(10)
    assert (plain.flows(), plain.passages(), reasons(plain)) == (0, 0, ["idle"])


def test_a_reply_keeps_a_flow(plain: Pair) -> None:
    there, back = (LAPTOP[4], NAS[4]), (NAS[4], LAPTOP[4])
    plain.laptop.send(datagram(*there, 40000, 9))
    for _ in range(3):
        plain.pass_time(200)
        plain.nas.send(datagram(*back, 9, 40000))
    assert (plain.flows(), len(plain.laptop.raw())) == (1, 3)


def test_a_terminated_connection_is_reset_at_both_ends(plain: Pair) -> None:
    from falkirk.flow import control

    connected(plain, 4)
    (record,) = plain.records()
    ((tunnel, flow),) = [
        (tunnel.id, flow)
        for rig in plain.rigs
        for tunnel in rig.worker.tunnels.values()
        for flow in tunnel.flows.values()
    ]
    plain.rigs[0].say_parent(control.Terminate(tunnel, flow.key, bytes.fromhex(record.flow_id), "test"))
    plain.step()
    assert (plain.flows(), plain.passages()) == (0, 0)
    for end, here, there, ports, numbers in (
        (plain.laptop, LAPTOP[4], NAS[4], (40000, 80), (1001, 5001)),
        (plain.nas, NAS[4], LAPTOP[4], (80, 40000), (5001, 1001)),
    ):
        probe = end.probed()
        assert (probe.source, probe.destination) == (there, here)
        # A live TCP says where it stands, and is reset there.
        end.send(tcp(here, there, ports, ACK, *numbers))
        assert end.reset_by().sequence == numbers[1]
    assert reasons(plain) == ["terminated: test"]


@pytest.mark.parametrize("family", FAMILIES)
def test_who_began_hears_of_the_end_of_what_is_not_tcp(plain: Pair, family: int) -> None:
    plain.laptop.send(datagram(LAPTOP[family], NAS[family], 40000, 9))
    plain.nas.raw()
    worker = plain.rigs[0].worker
    ((flow,),) = [tunnel.flows.values() for tunnel in worker.tunnels.values() if tunnel.flows]
    flow.owner.end(flow, "policy_changed: test")
    ((answer, body),) = plain.laptop.received()
    assert (answer.icmp_type, answer.icmp_code) == ((3, 13) if family == 4 else (1, 1))
    quote = body[answer.payload_offset :]
    assert quote[-8:-4] == (40000).to_bytes(2, "big") + (9).to_bytes(2, "big")
    assert (plain.passages(), plain.balanced()) == (0, True)


def test_a_tunnel_s_end_ends_its_flows_and_tells_the_other_side(plain: Pair) -> None:
    connected(plain, 4)
    plain.laptop.send(datagram(LAPTOP[4], NAS[4], 40000, 53))
    plain.nas.raw()
    plain.laptop.sock.close()
    plain.step()
    plain.step()
    assert (plain.flows(), plain.passages()) == (0, 0)
    assert reasons(plain) == ["tunnel_closed"] * 2
    probe = plain.nas.probed()
    assert (probe.source, probe.source_port) == (LAPTOP[4], 40000)


def test_a_device_s_newest_tunnel_is_taken_and_an_older_one_when_it_closes(plain: Pair) -> None:
    plain.laptop.send(datagram(LAPTOP[4], NAS[4], 40000, 53))
    assert len(plain.nas.raw()) == 1
    newer = plain.end(0, Framing.RAW, who("nas", list(NAS.values())))
    connected(Sides(plain, newer), 4)  # type: ignore[arg-type]
    plain.laptop.send(datagram(LAPTOP[4], NAS[4], 40000, 53))
    assert (len(plain.nas.raw()), len(newer.raw())) == (1, 0)
    newer.sock.close()
    plain.step()
    plain.laptop.send(tcp(LAPTOP[4], NAS[4], (40000, 80), ACK, 1001, 5001))
    assert len(plain.nas.raw()) == 1
    plain.nas.send(tcp(NAS[4], LAPTOP[4], (80, 40000), ACK, 5001, 1001))
    assert len(plain.laptop.raw()) == 1
    plain.nas.sock.close()
    plain.step()
    plain.step()
    assert (plain.flows(), plain.passages()) == (0, 0)
    assert reasons(plain) == ["device_offline"] * 2
    (host, _), (probe, _), *_ = plain.laptop.received()
    assert ((host.icmp_type, host.icmp_code), probe.flags) == ((3, 1), ACK)
    assert plain.balanced()


class Sides:
    """The same laptop with another tunnel of the NAS."""

    def __init__(self, pair: Pair, nas: End) -> None:
        self.laptop, self.nas = pair.laptop, nas


def test_a_full_tunnel_drops_what_it_has_no_room_for(tmp_path: Path) -> None:
    with between(tmp_path, 1, settings=FlowSettings(tunnel_queue_bytes=100_000)) as pair:
        sent = datagram(LAPTOP[4], NAS[4], 40000, 53, bytes(1400))
        count = 0
        while not pair.drops():
            pair.laptop.send(sent)
            count += 1
            assert count < 20000
        assert set(pair.drops()) == {"tunnel_full"}
        assert pair.balanced()


def test_nothing_begins_while_records_can_not_be_written(tmp_path: Path) -> None:
    with between(tmp_path, 1) as pair:
        pair.rigs[0].worker.spool.stuck = True
        pair.laptop.sock.send(datagram(LAPTOP[4], NAS[4], 40000, 53))
        pair.rigs[0].worker.turn(0)
        assert pair.drops() == {"audit_unwritable": 1}


def test_the_upgrader_is_not_needed(tmp_path: Path) -> None:
    with between(tmp_path, 1) as pair:
        connected(pair, 4)
        rig = pair.rigs[0]
        assert rig.upgrader is not None
        rig.upgrader.close()
        rig.upgrader = None
        pair.step()
        pair.laptop.send(tcp(LAPTOP[4], NAS[4], (40000, 80), ACK, 1001, 5001))
        pair.laptop.send(tcp(LAPTOP[4], NAS[4], (40001, 80), SYN))
        assert (len(pair.nas.raw()), pair.flows()) == (2, 2)


def test_limits_are_the_initiator_s(tmp_path: Path) -> None:
    with between(tmp_path, 1, settings=FlowSettings(device_flows=2)) as pair:
        for port in range(4):
            pair.laptop.send(datagram(LAPTOP[4], NAS[4], 40000 + port, 53))
        assert (len(pair.nas.raw()), pair.drops()) == (2, {"device_limit": 2})
        assert reasons(pair, "denied") == ["device_limit"]
