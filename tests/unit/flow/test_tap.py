"""Captures of a worker: what a watcher is told of each packet, and that packets don't notice."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.decide import cel
from falkirk.flow import captured, control
from falkirk.flow.captured import Begun, Captured
from falkirk.flow.lane import Lane
from falkirk.flow.raw import RawLane
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Connected, Prepare
from falkirk.wire.packet import parse
from tests.flow_rig import DEVICE4, SERVER4, FlowRig, context, read
from tests.forward_rig import LAPTOP, NAS, between, datagram, echo
from tests.unit.flow.test_raw import answers, burst, packer
from tests.unit.flow.test_worker_lift import ACK, RST, SYN, Client, established

CAPTURE = bytes(range(16))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Watcher:
    """The parent's end of a tap."""

    def __init__(self, rig: FlowRig, buffer: int = 1 << 20, **wanted: object) -> None:
        self.rig = rig
        self.sock, theirs = seqpacket.pair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        text = str(wanted.pop("filter", ""))
        fields = {
            "capture_id": CAPTURE,
            "flow_id": b"",
            "tenant": "",
            "device": "",
            "expression": cel.compile_expression(text).serialized if text else b"",
            "text": text,
            "dropped_only": False,
            "snaplen": 0,
            "by": "tests: to see",
        }
        rig.say_parent(control.Tap(**(fields | wanted)), [theirs.fileno()])  # type: ignore[arg-type]
        theirs.close()
        assert self.read() == [Begun()]

    def read(self) -> list[captured.Datagram]:
        self.rig.step()
        found = []
        while (received := seqpacket.receive(self.sock, 1 << 18)) is not None and received[0]:
            found.append(captured.decode(received[0]))
        return found

    def packets(self) -> list[Captured]:
        return [message for message in self.read() if isinstance(message, Captured)]

    def close(self) -> None:
        self.sock.close()
        self.rig.step()


def seen(packets: list[Captured]) -> list[tuple[int, str, str]]:
    return [(packet.side, packet.fate, packet.reason) for packet in packets]


@pytest.mark.parametrize(("framing", "family"), [(framing, family) for framing in Framing for family in (4, 6)])
def test_both_sides_of_the_nat(rig: FlowRig, framing: Framing, family: int) -> None:
    client = Client(rig, framing, family)
    watcher = Watcher(rig)
    client.send(SYN)
    (syn,) = watcher.packets()
    assert (syn.side, syn.fate, syn.tenant, syn.device, syn.tunnel) == (0, "held", "acme", "laptop", 1)
    assert (syn.outcome, syn.rule, syn.length, syn.lost) == ("lift", "main/all", len(syn.data), 0)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    assert syn.flow_id == prepare.flow_id
    client.send(SYN)
    assert seen(watcher.packets()) == [(0, "dropped", "syn_held")]
    rig.say_upgrader(Connected(prepare.slot, 1))
    (inside,) = watcher.packets()
    assert (inside.side, inside.fate, inside.flow_id) == (1, "sent", prepare.flow_id)
    (packet,) = client.inside()
    assert parse(inside.data, 0, len(inside.data)).source == packet.source
    client.kernel(packet.source, SYN | ACK)
    below, above = watcher.packets()
    assert (below.side, below.fate, below.flow_id) == (1, "forwarded", prepare.flow_id)
    assert (above.side, above.fate, above.flow_id) == (0, "sent", prepare.flow_id)
    assert parse(below.data, 0, len(below.data)).destination == packet.source
    assert parse(above.data, 0, len(above.data)).destination == client.address
    client.received()
    client.send(ACK, 1001, 9001)
    went, arrived = watcher.packets()
    assert (went.fate, arrived.fate) == ("forwarded", "sent")
    assert parse(went.data, 0, len(went.data)).source == client.address
    assert parse(arrived.data, 0, len(arrived.data)).source == packet.source
    assert rig.balanced()


def test_what_is_dropped_or_answered_is_seen_with_why(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4, to=23)
    watcher = Watcher(rig)
    client.send(SYN)
    denied, answer = watcher.packets()
    assert (denied.fate, denied.outcome, denied.rule, denied.flow_id) == (
        "answered",
        "answer_rst",
        "main/no-telnet",
        b"",
    )
    assert (answer.side, answer.fate, answer.rule) == (0, "sent", "main/no-telnet")
    assert parse(answer.data, 0, len(answer.data)).flags & RST
    spoofed = segment(bytes([100, 96, 0, 99]), SERVER4, 1, 80, 1, 0, SYN)
    client.sock.send(spoofed)
    client.sock.send(b"\x45\x00garbage")
    good = segment(DEVICE4, SERVER4, 50000, 80, 1, 0, RST)
    client.sock.send(good + b"\x45\x00\x00\x05rest")
    dropped = watcher.packets()
    assert seen(dropped) == [
        (0, "dropped", "spoofed_source"),
        (0, "dropped", "too_short"),
        (0, "dropped", "reset_of_nothing"),
        (0, "dropped", "too_short"),
    ]
    assert [packet.data for packet in dropped] == [spoofed, b"\x45\x00garbage", good, b"\x45\x00\x00\x05rest"]
    client.tun.send(vnet.ZERO + segment(SERVER4, bytes([10, 0, 0, 77]), 80, 40000, 1, 1, ACK))
    (late,) = watcher.packets()
    assert (late.side, late.fate, late.reason, late.tunnel, late.flow_id) == (1, "dropped", "no_flow", 0, b"")
    assert rig.balanced()


def test_a_super_packet_is_captured_whole(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    _, _ = established(client)
    watcher = Watcher(rig)
    body = bytearray(segment(DEVICE4, SERVER4, 40000, 80, 1001, 9001, ACK))
    body += bytes(60_000)
    body[2:4] = len(body).to_bytes(2, "big")
    body[10:12] = bytes(2)
    body[10:12] = (0xFFFF - int.from_bytes(body[:20], "little") % 0xFFFF).to_bytes(2, "little")
    head = vnet.Header(vnet.NEEDS_CSUM, vnet.GSO_TCPV4, 40, 1400, 20, 16).pack()
    client.sock.send(head + body)
    came, went = watcher.packets()
    assert (came.gso_size, came.partial, came.length, came.data) == (1400, True, len(body), bytes(body))
    assert (went.gso_size, went.partial, went.length, went.side) == (1400, True, len(body), 1)
    short = Watcher(rig, snaplen=64)
    client.sock.send(head + body)
    assert [(len(packet.data), packet.length) for packet in short.packets()] == [(64, len(body)), (64, len(body))]


@pytest.mark.parametrize("family", [4, 6])
def test_a_burst_is_captured_as_it_came_and_as_it_went_on(rig: FlowRig, family: int) -> None:
    """What is joined without a watcher is joined with one."""
    client = Client(rig, Framing.RAW, family)
    prepare, _ = established(client)
    watcher = Watcher(rig)
    sent = burst(20, family)
    client.sock.send(b"".join(sent))
    *came, went = watcher.packets()
    (written,) = read(client.tun)
    assert [packet.data for packet in came] == sent
    assert {(packet.side, packet.fate, packet.flow_id) for packet in came} == {(0, "forwarded", prepare.flow_id)}
    assert (went.side, went.fate, went.gso_size, went.partial) == (1, "sent", 1400, True)
    assert went.data == written[vnet.SIZE :]
    damaged = bytearray(burst(20, family)[0])
    damaged[-1] ^= 1
    client.sock.send(b"".join([bytes(damaged), *sent[1:3]]))
    again = watcher.packets()
    assert (0, "dropped", "bad_l4_checksum") in seen(again)
    assert [packet.data for packet in again if packet.side == 1] == [data[vnet.SIZE :] for data in read(client.tun)]
    assert rig.balanced()


def test_what_leaves_packed_is_captured_packet_by_packet(rig: FlowRig) -> None:
    client = packer(rig)
    prepare, slot = established(client)
    watcher = Watcher(rig)
    packets = answers(client, slot, 5)
    for packet in packets:
        client.tun.send(vnet.ZERO + packet)
    rig.step(1)
    (data,) = read(client.sock)
    found = watcher.packets()
    assert {packet.flow_id for packet in found} == {prepare.flow_id}
    assert [packet.data for packet in found if packet.side == 1] == packets
    assert b"".join(packet.data for packet in found if packet.side == 0) == data
    assert seen(found) == [(1, "forwarded", "")] * 5 + [(0, "sent", "")] * 5


def test_tunnels_that_nobody_watches_pass_as_ever(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    watcher = Watcher(rig, tenant="other")
    client.sock.send(b"".join(burst(20, 4)))
    rig.step(1)
    assert len(read(client.tun)) == 1
    assert watcher.packets() == []


def test_filters(rig: FlowRig) -> None:
    """Each watcher sees what it asked for; the flow of the laptop, and what the others' devices do."""
    laptop = Client(rig, Framing.RAW, 4)
    prepare, _ = established(laptop)
    phone = rig.tunnel(who=context(device="phone", addresses=[bytes([100, 96, 0, 7])]))
    other = {
        "all": Watcher(rig),
        "tenant": Watcher(rig, tenant="acme"),
        "nobody": Watcher(rig, tenant="other"),
        "phone": Watcher(rig, device="phone"),
        "flow": Watcher(rig, flow_id=prepare.flow_id),
        "port": Watcher(rig, filter='net.port == 22 && device.name == "phone"'),
        "dropped": Watcher(rig, dropped_only=True),
    }
    laptop.send(ACK, 1001, 9001)
    phone.send(segment(bytes([100, 96, 0, 7]), SERVER4, 1, 22, 1, 0, SYN))
    phone.send(segment(bytes([100, 96, 0, 7]), SERVER4, 1, 22, 1, 0, SYN))
    phone.send(b"\x45")
    assert {name: seen(watcher.packets()) for name, watcher in other.items()} == {
        "all": [
            (0, "forwarded", ""),
            (1, "sent", ""),
            (0, "held", ""),
            (0, "dropped", "syn_held"),
            (0, "dropped", "too_short"),
        ],
        "tenant": [
            (0, "forwarded", ""),
            (1, "sent", ""),
            (0, "held", ""),
            (0, "dropped", "syn_held"),
            (0, "dropped", "too_short"),
        ],
        "nobody": [],
        "phone": [(0, "held", ""), (0, "dropped", "syn_held"), (0, "dropped", "too_short")],
        "flow": [(0, "forwarded", ""), (1, "sent", "")],
        "port": [(0, "held", ""), (0, "dropped", "syn_held")],
        "dropped": [(0, "dropped", "syn_held"), (0, "dropped", "too_short")],
    }
    rig.asked()


def test_a_slow_watcher_loses_copies_and_no_packet_waits(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    watcher = Watcher(rig, buffer=1)
    before = rig.count("forwarded")
    for _ in range(400):
        client.send(ACK, 1001, 9001)
        client.inside()
    assert rig.count("forwarded") == before + 400
    first = watcher.packets()
    assert 0 < len(first) < 800
    client.send(ACK, 1001, 9001)
    told, _ = watcher.packets()
    assert told.lost == 800 - len(first)
    watcher.close()
    *_, ended = rig.records()
    assert (ended.event, ended.count, ended.lost) == ("capture_ended", len(first) + 2, 800 - len(first))


def test_a_capture_is_on_record_before_it_sees_anything(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    watcher = Watcher(rig, filter="net.port == 80", tenant="acme", snaplen=100)
    (record,) = rig.records()
    assert (record.event, record.capture_id, record.by) == ("capture_started", CAPTURE.hex(), "tests: to see")
    assert (record.tenant, record.filter, record.snaplen) == ("acme", "net.port == 80", 100)
    client.send(SYN)
    watcher.close()
    *_, ended = rig.records()
    assert (ended.event, ended.capture_id, ended.count, ended.lost) == ("capture_ended", CAPTURE.hex(), 1, 0)


def test_no_record_no_capture(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    rig.worker.spool.close()
    rig.worker.spool._file = os.open("/dev/full", os.O_WRONLY)
    ours, theirs = seqpacket.pair()
    rig.say_parent(control.Tap(CAPTURE, b"", "", "", b"", "", False, 0, ""), [theirs.fileno()])
    theirs.close()
    received = seqpacket.receive(ours, 1000)
    assert received is not None
    assert captured.decode(received[0]) == Begun("the audit log can't be written")
    client.send(SYN)
    assert seqpacket.receive(ours, 1000) == (b"", [])
    ours.close()


def test_nothing_is_left_when_nobody_watches(rig: FlowRig) -> None:
    """The way of a packet is the same code as before anybody watched."""
    worker = rig.worker
    before = (worker.drop.__func__, worker.inject.__func__, worker.deliver, worker.tunnels.deliver)  # type: ignore[attr-defined]
    first, second = Watcher(rig), Watcher(rig, dropped_only=True)
    assert not {type(lane) for lane in worker.lanes.values()} & {Lane, RawLane}
    first.close()
    assert not {type(lane) for lane in worker.lanes.values()} & {Lane, RawLane}
    second.close()
    assert {framing: type(lane) for framing, lane in worker.lanes.items()} == {Framing.VNET: Lane, Framing.RAW: RawLane}
    assert (worker.drop.__func__, worker.inject.__func__, worker.deliver, worker.tunnels.deliver) == before  # type: ignore[attr-defined]
    assert "drop" not in vars(worker)
    assert "deliver" not in vars(worker.tunnels)


def test_what_is_forwarded_is_seen_in_both_tunnels(tmp_path: Path) -> None:
    """Requests and replies of one flow, of TCP's ports and of an echo's identifier, carry its id on both sides."""
    there, back = (LAPTOP[4], NAS[4]), (NAS[4], LAPTOP[4])
    with between(tmp_path, 1) as pair:
        watcher = Watcher(pair.rigs[0])
        for request, reply in (
            (datagram(*there, 40000, 53, b"question"), datagram(*back, 53, 40000, b"answer")),
            (echo(*there, 77), echo(*back, 77, reply=True)),
        ):
            pair.laptop.send(request)
            first, sent = watcher.packets()
            # The first packet waits for its record; then it is on its way.
            assert [(p.device, p.fate) for p in (first, sent)] == [("laptop", "held"), ("nas", "sent")]
            pair.nas.send(reply)
            came, went = watcher.packets()
            assert [(p.device, p.fate) for p in (came, went)] == [("nas", "forwarded"), ("laptop", "sent")]
            assert len({p.flow_id for p in (first, sent, came, went)}) == 1
            assert first.flow_id
            assert {p.outcome for p in (first, sent, came, went)} == {"forward"}
        watcher.close()


def test_datagrams_of_a_session_are_seen_at_the_tunnel(rig: FlowRig) -> None:
    """The other side is a socket; what is wrong with a datagram is told all the same."""
    sock = rig.tunnel()
    watcher = Watcher(rig, filter="net.port == 53")
    data = datagram(DEVICE4, SERVER4, 40000, 53, b"question")
    sock.send(data)
    (first,) = watcher.packets()
    assert (first.fate, first.outcome, first.data) == ("held", "lift", data)
    sock.send(data[:-1] + b"?")
    (damaged,) = watcher.packets()
    assert (damaged.fate, damaged.reason, damaged.flow_id) == ("dropped", "bad_l4_checksum", first.flow_id)
    sock.close()
