"""How UDP sessions end, and what isn't carried: the client's errors, operators, neighbours that are gone, limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow import control
from falkirk.flow.settings import FlowSettings
from falkirk.linux import seqpacket
from falkirk.wire import icmp
from falkirk.wire.checksum import checksum
from falkirk.wire.context import Framing
from falkirk.wire.handover import Adopt, encode
from falkirk.wire.packet import parse
from tests.flow_rig import FlowRig, context
from tests.unit.flow.udp_client import FAMILIES, Client, client_error, unreachable


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def client(request: pytest.FixtureRequest, rig: FlowRig) -> Iterator[Client]:
    framing, family = request.param
    client = Client(rig, framing, family)
    yield client
    client.close()


def test_a_client_whose_port_is_closed_ends_the_session(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    kind, code = unreachable(client, icmp.Unreachable.PORT)
    client.send_packet(client_error(client, kind, code, 0))
    assert rig.worker.flow_count == 0
    assert rig.records()[-1].reason == "client_unreachable"
    assert rig.drops() == {"icmp_error_taken": 1}
    client.send_packet(client_error(client, kind, code, 0))
    assert rig.drops() == {"icmp_error_taken": 1, "icmp_error_unmatched": 1}
    # The server hears of it from the kernel, whose port is closed now.
    client.far.connect(client.peer)
    client.far.send(b"more")
    with pytest.raises(ConnectionRefusedError):
        client.far.recv(100)
    assert rig.balanced()


def test_an_mtu_that_the_client_tells_is_kept(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    kind, code = (3, 4) if client.family == 4 else (2, 0)
    client.send_packet(client_error(client, kind, code, 1300, bytes(1400)))
    client.far.sendto(bytes(1400), client.peer)
    packets = client.packets()
    assert len(packets) == 2
    assert all(packet.is_fragment and packet.total_length <= 1300 for packet, _ in packets)
    # Nothing needs to be as small as this (RFC 1191 3, RFC 8200 5).
    client.send_packet(client_error(client, kind, code, 60, bytes(1400)))
    assert rig.drops() == {"icmp_error_taken": 1, "icmp_mtu": 1}
    assert rig.balanced()


def test_an_error_that_quotes_nobodys_datagram_changes_nothing(client: Client) -> None:
    client.begin()
    client.port = 40009
    kind, code = unreachable(client, icmp.Unreachable.PORT)
    client.send_packet(client_error(client, kind, code, 0))
    assert client.rig.worker.flow_count == 1
    assert client.rig.drops() == {"icmp_error_unmatched": 1}


def test_an_operator_ends_a_session_and_the_client_is_told(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    (flow,) = rig.worker.tunnels[1].flows.values()
    seqpacket.send(rig._parent, encode([control.Terminate(1, flow.key, rig.worker.lifecycle.identity(flow), "enough")]))
    ((error, quoted),) = client.packets()
    assert (error.icmp_type, error.icmp_code) == unreachable(client, icmp.Unreachable.PROHIBITED)
    quote = parse(quoted, 0, len(quoted))
    assert (quote.source, quote.source_port, quote.destination_port) == (client.device, 40000, 5000)
    assert rig.records()[-1].reason == "terminated: enough"
    assert rig.balanced()


def test_a_drain_ends_sessions_at_once_and_says_nothing(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    rig.worker.drain.begin()
    assert rig.worker.flow_count == 0
    assert rig.records()[-1].reason == "drained"
    assert client.packets(wait=False) == []


def test_an_upgraders_end_costs_no_session_but_those_without_a_socket(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    client.port = 40001
    client.send(b"held")
    assert rig.upgrader is not None
    rig.upgrader.close()
    rig.step()
    client.port = 40002
    client.send(b"new")
    assert rig.drops() == {"not_ready": 1}
    rig.until(lambda: rig.worker.flow_count == 1)
    client.port = 40000
    client.send(b"still")
    assert client.hears()[0] == b"still"
    client.far.sendto(b"here", client.peer)
    assert [payload for _, payload in client.packets()] == [b"here"]
    rig.pair()
    rig.until(lambda: rig.worker.pair.ready)
    client.send(b"and after")
    assert client.hears()[0] == b"and after"
    assert [record.reason for record in rig.records() if record.event == "ended"] == ["upgrader_lost"]
    assert rig.balanced()


def test_a_workers_end_costs_its_sessions_and_its_successor_says_so(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    rig.worker.lifecycle.checkpoint()
    rig.kill()
    rig.start()
    client.sock.close()
    client.sock, theirs = seqpacket.pair()
    rig.say_onramp(Adopt(1, context(), client.framing, 1500), [theirs.fileno()])
    theirs.close()
    rig.pair()
    rig.load()
    ended = rig.records()[-1]
    assert (ended.event, ended.reason, ended.protocol, ended.destination_port) == ("ended", "tracker_lost", "udp", 5000)
    assert ended.bytes_up > 0
    # It has no slot: nobody is probed for it, and nothing is kept.
    assert not (rig.data_dir / "flow" / "live" / "worker-0.untold").exists()
    client.begin(b"again")
    assert client.hears()[0] == b"again"


@pytest.mark.parametrize(("limit", "reason"), [("device_flows", "device_limit"), ("max_flows", "table_full")])
def test_sessions_count_as_flows(tmp_path: Path, limit: str, reason: str) -> None:
    rig = FlowRig(tmp_path, msgspec.structs.replace(FlowSettings(), **{limit: 1}))
    client = Client(rig, Framing.RAW, 4)
    client.begin()
    client.port += 1
    client.send(b"x")
    assert rig.drops() == {reason: 1}
    assert [(record.event, record.reason) for record in rig.records()] == [("started", ""), ("denied", reason)]
    client.close()
    rig.close()


def test_descriptors_are_not_spent_to_the_last(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falkirk.flow.session.RESERVED", 1 << 40)
    client.send(b"x")
    assert client.rig.drops() == {"descriptors_exhausted": 1}
    assert client.rig.asked() == []


def test_options_and_extension_headers_go_no_further(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    packet = client.datagram(b"with more in front")
    if client.family == 4:
        head = bytearray(packet[:20]) + b"\x01\x01\x01\x00"
        head[0] = 0x46
        head[2:4] = (len(packet) + 4).to_bytes(2, "big")
        head[10:12] = b"\0\0"
        head[10:12] = checksum(head).to_bytes(2, "big")
        packet = bytes(head) + packet[20:]
    else:
        head = bytearray(packet[:40])
        head[4:6] = (len(packet) - 32).to_bytes(2, "big")
        head[6] = 60
        packet = bytes(head) + bytes([17, 0, 1, 4, 0, 0, 0, 0]) + packet[40:]
    client.send_packet(packet)
    assert client.hears()[0] == b"with more in front"
    assert rig.balanced()
