"""The raw road through a whole worker: bursts joined on their way in, packed on their way back, and every packet counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.packet import parse, split, verify
from falkirk.wire.segment import segments
from tests.flow_rig import PORT, SERVER4, FlowRig, context, read
from tests.unit.flow.test_coalesce import stream
from tests.unit.flow.test_worker_lift import ACK, FIN, RST, Client, established


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


def burst(count: int, family: int, size: int = 1400) -> list[bytes]:
    """What follows an established connection's handshake."""
    return stream(count, size, version=family, first=1001, acknowledgment=9001, to=80)


def joined(client: Client, sent: list[bytes]) -> list[bytes]:
    """The one write that reached the device, taken apart; each segment is what was sent, but for its signature."""
    (data,) = read(client.tun)
    packets = [bytes(one) for one in segments(vnet.unpack(data, 0, len(data)), data, vnet.SIZE, len(data) - vnet.SIZE)]
    for one, original in zip(packets, sent, strict=True):
        packet, before = parse(one, 0, len(one)), parse(original, 0, len(original))
        verify(one, packet)
        assert (packet.sequence, packet.flags, packet.window) == (before.sequence, before.flags, before.window)
        assert (packet.source_port, packet.destination_port) == (before.source_port, PORT)
        assert packet.source != before.source
        assert one[packet.payload_offset :] == original[before.payload_offset :]
    return packets


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("packed", [True, False])
def test_a_burst_reaches_the_device_in_one_write(rig: FlowRig, family: int, packed: bool) -> None:
    client = Client(rig, Framing.RAW, family)
    established(client)
    before = rig.count("forwarded")
    sent = burst(30, family)
    for datagram in [b"".join(sent)] if packed else sent:
        client.sock.send(datagram)
    rig.step(1)
    joined(client, sent)
    assert rig.count("forwarded") == before + 30
    (flow,) = rig.worker.tunnels[1].lifts.values()
    assert (flow.packets_up, flow.bytes_up) == (32, sum(map(len, sent)) + 2 * (40 if family == 4 else 60))
    assert rig.drops() == {}
    assert rig.balanced()


def test_the_setting_switches_it_off(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(coalesce=False))
    client = Client(rig, Framing.RAW, 4)
    established(client)
    client.sock.send(b"".join(burst(30, 4)))
    rig.step(1)
    assert [len(data) for data in read(client.tun)] == [vnet.SIZE + 1440] * 30
    rig.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_damaged_payload_is_dropped_with_its_reason_and_the_others_arrive(rig: FlowRig, family: int) -> None:
    client = Client(rig, Framing.RAW, family)
    established(client)
    sent = burst(10, family)
    damaged = bytearray(sent[4])
    damaged[-7] ^= 0x20
    client.sock.send(b"".join([*sent[:4], bytes(damaged), *sent[5:]]))
    arrived = client.inside()
    assert [packet.sequence for packet in arrived] == [1001 + i * 1400 for i in range(10) if i != 4]
    assert rig.drops() == {"bad_l4_checksum": 1}
    assert rig.balanced()


def test_a_fin_behind_a_burst_arrives_behind_it(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    sent = burst(5, 4)
    client.sock.send(b"".join([*sent, segment(client.address, SERVER4, client.port, 80, 8001, 9001, FIN | ACK)]))
    rig.step(1)
    first, second = read(client.tun)
    assert len(first) > 7000
    assert parse(second, 10, len(second) - 10).flags == FIN | ACK


def test_a_device_that_takes_nothing_costs_every_packet_of_the_run(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    client.tun.close()
    sent = burst(5, 4)
    client.sock.send(b"".join(sent))
    rig.worker.lane(Framing.RAW).from_tunnel(rig.worker.tunnels[1], hung_up=False)
    assert rig.drops() == {"tun_write_error": 5}


def packer(rig: FlowRig, family: int = 4, port: int = 40000) -> Client:
    """A client whose producer asked for packed datagrams."""
    client = Client(rig, Framing.RAW, family, port)
    tunnel = rig.worker.tunnels[rig.next_tunnel - 1]
    tunnel.context = msgspec.structs.replace(context(), packed=True)
    return client


def answers(client: Client, slot: bytes, count: int) -> list[bytes]:
    """What the private namespace's kernel sends."""
    listener = slot[:-3] + (int.from_bytes(slot[-3:], "big") & 0x800000 | 1).to_bytes(3, "big")
    return [segment(listener, slot, PORT, client.port, 9001 + i, 1001, ACK) for i in range(count)]


@pytest.mark.parametrize("family", [4, 6])
def test_what_comes_back_is_packed_for_who_asked(rig: FlowRig, family: int) -> None:
    client = packer(rig, family)
    _, slot = established(client)
    for packet in answers(client, slot, 20):
        client.tun.send(vnet.ZERO + packet)
    rig.step(1)
    (data,) = read(client.sock)
    packets = [parse(data, at, length) for at, length in split(data, len(data))]
    for answer in packets:
        verify(data, answer)
        assert (answer.source, answer.destination, answer.destination_port) == (
            client.server,
            client.address,
            client.port,
        )
    assert [answer.sequence for answer in packets] == list(range(9001, 9021))
    assert rig.balanced()


def test_who_did_not_ask_gets_a_datagram_a_packet(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    _, slot = established(client)
    for packet in answers(client, slot, 20):
        client.tun.send(vnet.ZERO + packet)
    rig.step(1)
    assert [packet.sequence for packet in client.received()] == list(range(9001, 9021))


def test_packs_of_several_tunnels_keep_each_ones_order(rig: FlowRig) -> None:
    one, two = packer(rig), packer(rig, port=40001)
    slots = [established(client)[1] for client in (one, two)]
    for first, second in zip(answers(one, slots[0], 9), answers(two, slots[1], 9), strict=True):
        one.tun.send(vnet.ZERO + first)
        one.tun.send(vnet.ZERO + second)
    rig.step(1)
    for client in (one, two):
        (data,) = read(client.sock)
        packets = [parse(data, at, length) for at, length in split(data, len(data))]
        assert [packet.sequence for packet in packets] == list(range(9001, 9010))
        assert {packet.destination_port for packet in packets} == {client.port}


def test_a_reset_behind_a_pack_is_in_it_and_ends_the_flow(rig: FlowRig) -> None:
    client = packer(rig)
    _, slot = established(client)
    listener = slot[:-3] + b"\x80\x00\x01"
    for packet in [*answers(client, slot, 3), segment(listener, slot, PORT, client.port, 9004, 1001, RST | ACK)]:
        client.tun.send(vnet.ZERO + packet)
    rig.step(1)
    (data,) = read(client.sock)
    flags = [parse(data, at, length).flags for at, length in split(data, len(data))]
    assert flags == [ACK, ACK, ACK, RST | ACK]
    (flow,) = rig.worker.tunnels[1].lifts.values()
    assert flow.reset


def test_a_pack_is_no_longer_than_a_datagram_may_be(rig: FlowRig) -> None:
    client = packer(rig)
    _, slot = established(client)
    listener = slot[:-3] + b"\x80\x00\x01"
    sizes = []
    for packet in stream(100, 1400, first=9001, acknowledgment=1001, ends=(listener, slot), port=PORT, to=client.port):
        client.tun.send(vnet.ZERO + packet)
        sizes.append(len(packet))
    rig.step()
    datagrams = read(client.sock)
    assert len(datagrams) == 3
    assert max(map(len, datagrams)) <= 65536
    assert sum(map(len, datagrams)) == sum(sizes)


def test_a_full_tunnel_costs_every_packet_of_the_pack(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(tunnel_queue_bytes=1))
    client = packer(rig)
    _, slot = established(client)
    rig.worker.tunnels[1].wait(b"a reader that doesn't read")
    for packet in answers(client, slot, 5):
        client.tun.send(vnet.ZERO + packet)
    rig.step(1)
    assert rig.drops() == {"tunnel_full": 5}
    rig.close()
