"""A flow's life through the worker, packet by packet: raw and vnet, IPv4 and IPv6."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Adopt, Closed, Connected, DialFailed, Prepare
from falkirk.wire.packet import Packet, parse, verify
from tests.flow_rig import DEVICE4, DEVICE6, PORT, SERVER4, SERVER6, FlowRig, context, read

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
FAMILIES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Client:
    """One end of a tunnel that speaks TCP by hand."""

    def __init__(self, rig: FlowRig, framing: Framing, family: int, port: int = 40000, to: int = 80) -> None:
        self.rig, self.framing, self.port, self.to = rig, framing, port, to
        self.address, self.server = FAMILIES[family]
        self.sock = rig.tunnel(framing)
        self.tun = rig.tun[framing]
        self.head = b"" if framing is Framing.RAW else vnet.ZERO

    def send(self, flags: int, sequence: int = 1000, acknowledgment: int = 0, payload: bytes = b"") -> None:
        packet = segment(self.address, self.server, self.port, self.to, sequence, acknowledgment, flags)
        assert not payload
        self.sock.send(self.head + packet)
        self.rig.step()

    def received(self) -> list[Packet]:
        """Packets that came back, each with right checksums."""
        packets = []
        for data in read(self.sock):
            body = data[len(self.head) :]
            packet = parse(body, 0, len(body))
            verify(body, packet)
            packets.append(packet)
        return packets

    def inside(self) -> list[Packet]:
        """Packets that reached the private namespace, each with right checksums."""
        self.rig.step()
        packets = []
        for data in read(self.tun):
            packet = parse(data, 10, len(data) - 10)
            # What the TUN device checks as well.
            assert vnet.unpack(data, 0, len(data)).hdr_len <= len(data) - 10
            verify(data, packet)
            packets.append(packet)
        return packets

    def kernel(self, slot: bytes, flags: int, sequence: int = 9000, acknowledgment: int = 1001) -> None:
        """The private namespace's kernel answers."""
        listener = slot[:-3] + (int.from_bytes(slot[-3:], "big") & 0x800000 | 1).to_bytes(3, "big")
        packet = segment(listener, slot, PORT, self.port, sequence, acknowledgment, flags)
        self.tun.send(vnet.ZERO + packet)
        self.rig.step()


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def client(request: pytest.FixtureRequest, rig: FlowRig) -> Client:
    framing, family = request.param
    return Client(rig, framing, family)


def established(client: Client) -> tuple[Prepare, bytes]:
    client.send(SYN)
    (prepare,) = client.rig.asked()
    assert isinstance(prepare, Prepare)
    client.rig.say_upgrader(Connected(prepare.slot, 1))
    (syn,) = client.inside()
    client.kernel(syn.source, SYN | ACK)
    client.received()
    client.send(ACK, 1001, 9001)
    client.inside()
    return prepare, syn.source


def test_syn_is_held_until_the_upstream_is_connected(client: Client) -> None:
    client.send(SYN)
    (prepare,) = client.rig.asked()
    assert isinstance(prepare, Prepare)
    assert (prepare.destination, prepare.port, prepare.treatment) == (client.server, 80, "l4")
    assert client.inside() == []
    client.send(SYN)
    client.send(SYN)
    assert client.rig.asked() == []
    assert client.rig.drops() == {"syn_held": 2}
    client.rig.say_upgrader(Connected(prepare.slot, 1))
    (syn,) = client.inside()
    assert (syn.flags, syn.source_port, syn.destination_port, syn.sequence) == (SYN, client.port, PORT, 1000)
    assert syn.source[-3:] == (prepare.slot).to_bytes(3, "big")
    client.kernel(syn.source, SYN | ACK)
    (answer,) = client.received()
    assert (answer.source, answer.destination, answer.source_port, answer.destination_port) == (
        client.server,
        client.address,
        80,
        client.port,
    )
    assert client.rig.balanced()


def test_refused_upstream_is_a_reset_and_unreachable_is_icmp(client: Client) -> None:
    client.send(SYN)
    (prepare,) = client.rig.asked()
    assert isinstance(prepare, Prepare)
    client.rig.say_upgrader(DialFailed(prepare.slot, errno.ECONNREFUSED, 1))
    (answer,) = client.received()
    assert answer.flags == RST | ACK
    assert answer.acknowledgment == 1001
    client.send(SYN)
    (prepare,) = client.rig.asked()
    assert isinstance(prepare, Prepare)
    client.rig.say_upgrader(DialFailed(prepare.slot, errno.EHOSTUNREACH, 1))
    (answer,) = client.received()
    assert (answer.icmp_type, answer.icmp_code) in ((3, 1), (1, 3))
    assert [record.reason for record in client.rig.records() if record.event == "ended"] == [
        "upstream_refused",
        "upstream_unreachable",
    ]
    assert client.rig.balanced()


@pytest.mark.parametrize(("port", "rule"), [(23, "main/no-telnet"), (25, "")])
def test_denied_is_a_reset_with_the_rule_on_record(rig: FlowRig, port: int, rule: str) -> None:
    client = Client(rig, Framing.RAW, 4, to=port)
    client.send(SYN)
    (answer,) = client.received()
    assert answer.flags == RST | ACK
    assert rig.asked() == []
    (record,) = rig.records()
    assert (record.event, record.rule, record.reason) == ("denied", rule, "denied")
    assert record.why
    assert rig.balanced()


def test_repeats_of_a_denial_are_counted_not_recorded(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4, to=23)
    for _ in range(5):
        client.send(SYN)
    assert len(client.received()) == 5
    assert len(rig.records()) == 1
    assert rig.count("denied") == 5


def test_fins_both_ways_end_the_flow_once(client: Client) -> None:
    prepare, slot = established(client)
    client.send(FIN | ACK, 1001, 9001)
    client.kernel(slot, ACK, 9001, 1002)
    client.kernel(slot, FIN | ACK, 9001, 1002)
    client.rig.say_upgrader(Closed(prepare.slot, "finished", 0, 0))
    assert client.rig.worker.flow_count == 1
    client.send(ACK, 1002, 9002)
    assert client.rig.worker.flow_count == 0
    events = [(record.event, record.reason) for record in client.rig.records()]
    assert events == [("started", ""), ("ended", "finished")]
    assert client.rig.balanced()


def test_reset_from_the_upstream_reaches_the_client(client: Client) -> None:
    prepare, slot = established(client)
    client.rig.say_upgrader(Closed(prepare.slot, "upstream_reset", 0, 0))
    client.kernel(slot, RST | ACK, 9001, 1001)
    assert [packet.flags for packet in client.received()] == [RST | ACK]
    assert client.rig.worker.flow_count == 0
    assert client.rig.records()[-1].reason == "upstream_reset"


def test_segment_without_a_connection_is_reset(client: Client) -> None:
    client.send(ACK, 5000, 7000)
    (answer,) = client.received()
    assert (answer.flags, answer.sequence) == (RST, 7000)
    client.send(RST, 5000)
    assert client.received() == []
    assert client.rig.drops() == {"reset_of_nothing": 1}


def test_spoofed_source_goes_nowhere(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.address = bytes([100, 96, 0, 3])
    client.send(SYN)
    assert (rig.asked(), client.received(), rig.drops()) == ([], [], {"spoofed_source": 1})


def test_no_route_blackhole_and_martian_are_unreachable(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    for address, reason in ((bytes([198, 51, 100, 1]), "blackhole"), (bytes([127, 0, 0, 1]), "martian_destination")):
        client.server = address
        client.send(SYN)
        (answer,) = client.received()
        assert (answer.icmp_type, answer.icmp_code) == (3, 0)
        assert rig.records()[-1].reason == reason


def test_second_context_is_dropped_with_its_reason(client: Client) -> None:
    client.sock.send(b'{"v":1,"tenant":"acme","device":"laptop"}')
    client.rig.step()
    assert client.rig.drops() == {"second_context": 1}
    assert client.rig.balanced()


def test_closed_tunnel_ends_its_flows(client: Client) -> None:
    prepare, _ = established(client)
    client.sock.close()
    client.rig.step()
    assert client.rig.asked() == [Abort(prepare.slot)]
    assert client.rig.records()[-1].reason == "tunnel_closed"


def test_slots_run_out_with_a_reason_and_none_is_crossed(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(slots=64))
    client = Client(rig, Framing.RAW, 4)
    for port in range(64):
        client.port = 2000 + port
        client.send(SYN)
    assert len({prepare.slot for prepare in rig.asked() if isinstance(prepare, Prepare)}) == 64
    client.port = 3000
    client.send(SYN)
    assert rig.asked() == []
    assert rig.drops() == {"slots_exhausted": 1}
    assert rig.records()[-1].reason == "slots_exhausted"
    rig.close()


def test_device_limit_binds_that_device_only(rig: FlowRig) -> None:
    flooder = rig.tunnel(Framing.RAW, context(device="flooder", addresses=(bytes([100, 96, 0, 9]),), max_flows=10))
    for port in range(20):
        flooder.send(segment(bytes([100, 96, 0, 9]), SERVER4, 2000 + port, 80, 1, 0, SYN))
    rig.step()
    assert rig.drops() == {"device_limit": 10}
    client = Client(rig, Framing.RAW, 4)
    rig.asked()
    client.send(SYN)
    assert len(rig.asked()) == 1


def test_successor_closes_the_books_and_leads_resets_back(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    _, slot = established(client)
    tunnel = 1
    rig.kill()
    rig.start()
    ours, theirs = seqpacket.pair()
    rig.say_onramp(Adopt(tunnel, context(), Framing.VNET, 1500), [theirs.fileno()])
    client.sock = ours
    rig.pair()
    rig.load()
    client.tun = rig.tun[Framing.VNET]
    records = rig.records()
    assert [(record.event, record.reason) for record in records] == [("started", ""), ("ended", "tracker_lost")]
    assert records[0].flow_id == records[1].flow_id
    assert records[1].tenant == "acme"
    client.kernel(slot, RST, 9001)
    (answer,) = client.received()
    assert (answer.flags, answer.source, answer.destination_port) == (RST, client.server, client.port)
    client.kernel(slot, RST, 9001)
    assert client.received() == []


def test_a_shorter_header_behind_the_same_vnet_header_fits_the_device(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    partial = vnet.Header(vnet.NEEDS_CSUM, vnet.GSO_NONE, 0, 0, 20, 16).pack()

    def offer(flags: int, sequence: int, options: bytes) -> None:
        packet = bytearray(segment(client.address, client.server, client.port, 80, sequence, 9001, flags) + options)
        packet[32] = (20 + len(options)) << 2
        packet[2:4] = len(packet).to_bytes(2, "big")
        packet[10:12] = b"\0\0"
        packet[10:12] = checksum(packet[:20]).to_bytes(2, "big")
        packet[36:38] = (
            0xFFFF - checksum(b"", pseudo_header(client.address, client.server, 6, len(packet) - 20))
        ).to_bytes(2, "big")
        client.sock.send(partial + packet)
        rig.step()

    offer(SYN, 1000, b"\1" * 20)
    offer(SYN, 1000, b"\1" * 20)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(Connected(prepare.slot, 1))
    offer(ACK, 1001, b"")
    rig.step()
    headers = [vnet.unpack(data, 0, len(data)) for data in read(client.tun)]
    assert [header.hdr_len for header in headers] == [0, 0]


def test_a_port_scan_is_told_as_its_number(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    rig.worker.rules = type(rig.worker.rules).empty()
    for port in range(1, 301):
        client.to = port
        client.send(SYN)
    assert rig.count("denied") == 300
    recorded = [record for record in rig.records() if record.event == "denied"]
    assert 100 <= len(recorded) < 300
    rig.until(lambda: rig.worker.second > rig.worker.tunnels[1].records_tick)
    client.to = 400
    client.send(SYN)
    records = [record for record in rig.records() if record.event == "denied"]
    told = sum(record.count for record in records if record.reason == "refusals_unrecorded")
    assert told + len([record for record in records if record.destination]) == 301


def test_a_slow_client_keeps_its_flow_while_it_fetches_the_rest(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    prepare, slot = established(client)
    client.send(FIN | ACK, 1001, 9001)
    rig.say_upgrader(Closed(prepare.slot, "finished", 0, 0))
    worker = rig.worker
    flow = worker.flow_of(prepare.slot)
    assert flow is not None
    for _ in range(3):
        worker.second = flow.bucket
        flow.tick = worker.second - 1
        worker.lifecycle.expire()
        assert worker.flow_count == 1
    worker.second = flow.bucket
    worker.lifecycle.expire()
    worker.turn(0)
    assert worker.flow_count == 0
    assert slot


def opening(client: Client) -> tuple[Prepare, bytes]:
    """A flow whose SYN has gone to the kernel: its preparation and the slot's address."""
    client.send(SYN)
    (prepare,) = client.rig.asked()
    assert isinstance(prepare, Prepare)
    client.rig.say_upgrader(Connected(prepare.slot, 1))
    (syn,) = client.inside()
    return prepare, syn.source


def test_only_an_exact_reset_of_the_handshake_lets_the_upstream_go(client: Client) -> None:
    prepare, _ = opening(client)
    client.send(RST, 2000)
    assert client.rig.asked() == []
    assert client.rig.worker.flow_count == 1
    client.send(RST, 1001)
    assert client.rig.asked() == [Abort(prepare.slot)]
    # Both are the kernel's to judge as well.
    assert [packet.flags for packet in client.inside()] == [RST, RST]
    assert client.rig.worker.flow_count == 0
    assert client.rig.records()[-1].reason == "client_reset"


@pytest.mark.parametrize("end", ["fins", "reset"])
def test_a_new_connection_needs_no_word_of_the_upgrader(client: Client, end: str) -> None:
    prepare, slot = established(client)
    if end == "fins":
        client.kernel(slot, FIN | ACK, 9001, 1001)
        client.send(FIN | ACK, 1001, 9002)
        client.kernel(slot, ACK, 9002, 1002)
    else:
        client.kernel(slot, RST | ACK, 9001, 1001)
    client.rig.asked()
    client.send(SYN, 5000)
    (again,) = client.rig.asked()
    assert isinstance(again, Prepare)
    assert again.slot != prepare.slot
    client.rig.say_upgrader(Closed(prepare.slot, "finished", 0, 0))
    assert client.rig.worker.flow_count == 1
    reasons = [record.reason for record in client.rig.records() if record.event == "ended"]
    assert reasons == ["finished" if end == "fins" else "upstream_reset"]
