"""Datagrams that are larger than their path: in fragments both ways, and by what the client says of its path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.session import PATH_MTU
from falkirk.flow.settings import FlowSettings
from falkirk.flow.udp_trains import UdpSession
from falkirk.wire import fragments, vnet
from falkirk.wire.build import too_big
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads
from falkirk.wire.fragments import assemble, piece
from falkirk.wire.packet import Packet, parse, verify
from tests.flow_rig import FlowRig, read
from tests.unit.flow.udp_client import FAMILIES, Client

BIG = bytes(at % 251 for at in range(4000))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path, FlowSettings(udp_idle_s=10 * PATH_MTU))
    yield rig
    rig.close()


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def client(request: pytest.FixtureRequest, rig: FlowRig) -> Iterator[Client]:
    client = Client(rig, *request.param)
    client.begin()
    client.hears()
    yield client
    client.close()


def reply(client: Client, payload: bytes) -> list[bytes]:
    """Packets that the device gets when the server answers, without their virtio-net headers, which are zero."""
    client.far.sendto(payload, client.peer)
    came: list[bytes] = []

    def whole() -> bool:
        came.extend(read(client.sock))
        return bool(came)

    client.rig.until(whole)
    client.rig.step()
    whole()
    if client.framing is Framing.RAW:
        return came
    assert {data[:10] for data in came if len(came) > 1} <= {vnet.ZERO}
    return [data[10:] for data in came]


def together(parts: list[bytes]) -> tuple[Packet, bytes]:
    """The packet of these fragments, and its payload."""
    whole = assemble([piece(part, parse(part, 0, len(part), fragments=True)) for part in parts])
    packet = parse(whole, 0, len(whole))
    verify(whole, packet)
    return packet, whole[packet.payload_offset :]


def test_a_question_in_fragments_is_one_datagram(client: Client) -> None:
    assert client.rig.worker.tunnels[1].mtu == 1500
    for _ in range(2):
        for part in reversed(fragments.cut(client.datagram(BIG), 1400, 7)):
            client.send_packet(part)
        assert client.hears()[0] == BIG
        # The way on may fragment it again.
        (session,) = client.rig.worker.tunnels[1].flows.values()
        assert isinstance(session, UdpSession)
        assert not session.dont_fragment
    # Of the first datagram, and of these.
    assert (client.rig.count("received"), client.rig.count("forwarded")) == (3, 3)
    assert client.rig.drops() == {}


def test_an_atomic_fragment_is_alone_whatever_else_has_its_name(rig: FlowRig) -> None:
    """RFC 6946 4: it is processed by itself, and what waits under the same identification isn't disturbed."""
    client = Client(rig, Framing.RAW, 6)
    client.begin()
    client.hears()
    whole = client.datagram(BIG[:2000])
    first, second = fragments.cut(whole, 1400, 7)
    small = client.datagram(b"atomic")
    atomic = (
        small[:4] + (len(small) - 32).to_bytes(2, "big") + b"\x2c" + small[7:40] + first[40:42] + b"\0\0" + first[44:48]
    )
    atomic += small[40:]
    for packet, payload in ((first, b""), (atomic, b"atomic"), (second, BIG[:2000])):
        client.send_packet(packet)
        if payload:
            assert client.hears()[0] == payload
    assert rig.drops() == {}
    client.close()


def test_an_answer_larger_than_the_tunnel_comes_in_fragments(client: Client) -> None:
    parts = reply(client, BIG)
    assert len(parts) == 3
    assert max(map(len, parts)) <= 1500
    packet, payload = together(parts)
    assert (payload, packet.source, packet.destination) == (BIG, client.server, client.device)
    assert client.rig.balanced()


def test_what_the_client_says_of_its_path_is_believed_for_ten_minutes(client: Client) -> None:
    rig = client.rig
    start = rig.worker.now
    rig.worker.clock = lambda: start
    whole, mtu = _packet(client, BIG[:1400]), 1300
    error = too_big(whole, parse(whole, 0, len(whole)), mtu, client.device)
    assert error is not None
    client.send_packet(error)
    assert rig.drops() == {"icmp_error_taken": 1}
    parts = reply(client, BIG[:1400])
    assert len(parts) == 2
    assert max(map(len, parts)) <= mtu
    assert together(parts)[1] == BIG[:1400]
    rig.worker.clock = lambda: start + (PATH_MTU + 1) * 1_000_000_000
    rig.step()
    client.far.sendto(BIG[:1400], client.peer)
    ((packet, payload),) = client.packets()
    assert (packet.is_fragment, payload) == (False, BIG[:1400])


def _packet(client: Client, payload: bytes) -> bytes:
    """The answer as the device's kernel would quote it."""
    heads = Heads(client.server, client.device, client.to, client.port)
    made = bytearray(heads.size) + payload
    heads.put(made, 0, len(payload), 63, 0)
    return bytes(made)


def test_a_path_is_not_believed_to_be_narrower_than_any_is(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.begin()
    client.hears()
    whole = _packet(client, BIG[:1400])
    for mtu in (100, 0):
        error = too_big(whole, parse(whole, 0, len(whole)), mtu, client.device)
        assert error is not None
        client.send_packet(error)
    parts = reply(client, BIG[:1400])
    assert 500 < max(map(len, parts)) <= 576
    assert together(parts)[1] == BIG[:1400]
    client.close()


def test_an_error_about_another_session_changes_nothing(client: Client) -> None:
    whole = bytearray(_packet(client, BIG[:1400]))
    # To another port of the client.
    whole[23 if client.family == 4 else 43] ^= 1
    error = too_big(bytes(whole), parse(whole, 0, len(whole)), 1300, client.device)
    assert error is not None
    client.send_packet(error)
    assert client.rig.drops() == {"icmp_error_unmatched": 1}
    client.far.sendto(BIG[:1400], client.peer)
    ((packet, _),) = client.packets()
    assert not packet.is_fragment
