"""Fragments through the worker: whole packets only meet policy and flows, and what waits is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.wire import icmp, vnet
from falkirk.wire.context import Framing
from falkirk.wire.fragments import cut
from falkirk.wire.handover import Connected, Prepare
from falkirk.wire.packet import Packet, parse, verify
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, FlowRig, context, read
from tests.unit.wire import samples

SYN, ACK = 2, 16
ADDRESSES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
OTHER4 = bytes([100, 96, 9, 9])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path, FlowSettings(icmp_per_second=3))
    yield rig
    rig.close()


class Way:
    """A tunnel of one framing, packets of one family."""

    def __init__(self, rig: FlowRig, framing: Framing, version: int) -> None:
        self.rig, self.framing, self.version = rig, framing, version
        self.source, self.destination = ADDRESSES[version]
        self.sock = rig.tunnel(framing)
        self.head = b"" if framing is Framing.RAW else vnet.ZERO

    def ip(self, protocol: int, body: bytes, source: bytes = b"") -> bytes:
        if self.version == 4:
            return samples.ip4(protocol, body, source=source or self.source, destination=self.destination, fragment=0)
        return samples.ip6(protocol, body, source=source or self.source, destination=self.destination)

    def segment(self, flags: int, port: int = 80, payload: bytes = b"", sequence: int = 1000) -> bytes:
        body = samples.tcp(
            self.source, self.destination, sport=40000, dport=port, flags=flags, payload=payload, sequence=sequence
        )
        return self.ip(6, body)

    def send(self, *packets: bytes) -> None:
        for packet in packets:
            self.sock.send(self.head + packet)
        self.rig.step()

    def answers(self) -> list[tuple[Packet, bytes]]:
        """What came back: parsed, with the bytes that it quotes."""
        found = []
        for data in read(self.sock):
            body = data[len(self.head) :]
            packet = parse(body, 0, len(body))
            verify(body, packet)
            found.append((packet, body[packet.payload_offset :]))
        return found


@pytest.fixture(params=[(f, v) for f in Framing for v in ADDRESSES], ids=lambda p: f"{p[0]}-ipv{p[1]}")
def way(request: pytest.FixtureRequest, rig: FlowRig) -> Way:
    return Way(rig, *request.param)


def test_a_flow_whose_packets_come_in_pieces(way: Way) -> None:
    rig = way.rig
    first, *others = cut(way.segment(SYN, payload=bytes(range(200))), 140, 7)
    assert others
    way.send(*others)
    assert (rig.asked(), rig.count("received")) == ([], 0)
    way.send(first)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    assert (prepare.destination, prepare.port) == (way.destination, 80)
    # One packet, which is held.
    assert (rig.count("received"), rig.drops()) == (1, {})
    rig.say_upgrader(Connected(prepare.slot, 1))
    (inside,) = read(rig.tun[way.framing])
    packet = parse(inside, 10, len(inside) - 10)
    verify(inside, packet)
    assert inside[packet.at + packet.payload_offset :] == bytes(range(200))
    payload = bytes(at % 251 for at in range(4000))
    way.send(*reversed(cut(way.segment(ACK, payload=payload, sequence=1201), 1400, 8)))
    (inside,) = read(rig.tun[way.framing])
    packet = parse(inside, 10, len(inside) - 10)
    verify(inside, packet)
    assert inside[packet.at + packet.payload_offset :] == payload
    assert (rig.count("received"), rig.count("forwarded")) == (2, 2)
    assert rig.balanced()


def test_policy_sees_the_whole_packet_and_never_a_piece(way: Way) -> None:
    rig = way.rig
    # A filter that looked at first fragments alone would see port 80 in one of them, and port 23 in no other.
    denied = cut(way.segment(SYN, port=23, payload=bytes(200)), 140, 9)
    way.send(*denied[:-1])
    assert (rig.asked(), way.answers(), read(rig.tun[way.framing])) == ([], [], [])
    way.send(denied[-1])
    ((reset, _),) = way.answers()
    assert reset.flags == 4 | 16
    assert rig.asked() == []
    assert (rig.count("received"), rig.count("answered")) == (1, 1)
    (record,) = rig.records()
    assert (record.event, record.destination_port, record.reason) == ("denied", 23, "denied")


def test_the_port_cannot_be_written_over(way: Way) -> None:
    rig = way.rig
    allowed, denied = (cut(way.segment(SYN, port=port, payload=bytes(200)), 140, 9) for port in (80, 23))
    # The same name: whichever first fragment comes second takes the packet with it (RFC 5722).
    way.send(allowed[0], denied[0], *allowed[1:], *denied[1:])
    count = 1 + len(allowed) - 1 + len(denied)
    assert rig.drops() == {"fragment_overlap": count}
    assert (rig.count("received"), rig.asked(), way.answers()) == (count, [], [])


def test_fragments_of_somebody_else_do_not_wait(way: Way) -> None:
    rig = way.rig
    foreign = OTHER4 if way.version == 4 else samples.S6
    way.send(*cut(way.ip(253, bytes(400), source=foreign), 140, 9))
    assert list(rig.drops()) == ["spoofed_source"]
    assert rig.worker.fragments.reassembly.waiting == 0


def test_a_fragment_at_its_last_hop(way: Way) -> None:
    rig = way.rig
    last = bytearray(way.ip(253, bytes(400)))
    last[8 if way.version == 4 else 7] = 1
    if way.version == 4:
        last[10:12] = b"\0\0"
        last[10:12] = samples.slow_checksum(bytes(last[:20])).to_bytes(2, "big")
    pieces = cut(bytes(last), 240, 9)
    way.send(*pieces)
    # RFC 1812 4.3.2.7: said of the first fragment only.
    ((told, quote),) = way.answers()
    assert (told.icmp_type, told.icmp_code) == (icmp.TIME_EXCEEDED4 if way.version == 4 else icmp.TIME_EXCEEDED6, 0)
    assert quote == pieces[0]
    assert rig.drops() == {"unanswerable": len(pieces) - 1}
    assert rig.balanced()


def test_the_sender_of_a_packet_that_stays_incomplete_is_told(way: Way) -> None:
    rig = way.rig
    first, second, *_ = cut(way.ip(253, bytes(600)), 240, 9)
    now = rig.worker.now
    rig.worker.clock = lambda: now
    way.send(second, first)
    rig.worker.clock = lambda: now + 14_000_000_000
    rig.step()
    assert (way.answers(), rig.count("received")) == ([], 0)
    rig.worker.clock = lambda: now + 16_000_000_000
    rig.step()
    ((told, quote),) = way.answers()
    assert (told.icmp_type, told.icmp_code) == (icmp.TIME_EXCEEDED4 if way.version == 4 else icmp.TIME_EXCEEDED6, 1)
    assert quote == first
    assert (rig.count("received"), rig.count("answered"), rig.drops()) == (2, 1, {"fragment_timeout": 1})


def test_answers_about_fragments_are_limited(way: Way) -> None:
    rig = way.rig
    now = rig.worker.now
    rig.worker.clock = lambda: now
    for number in range(5):
        way.send(cut(way.ip(253, bytes(400)), 240, number)[0])
    rig.worker.clock = lambda: now + 16_000_000_000
    rig.step()
    assert len(way.answers()) == 3
    assert (rig.count("received"), rig.count("answered"), rig.drops()) == (5, 3, {"fragment_timeout": 2})


def test_ipv6_says_where_a_fragment_is_wrong(rig: FlowRig) -> None:
    way = Way(rig, Framing.RAW, 6)
    piece = bytearray(cut(way.ip(253, bytes(400)), 240, 9)[1])
    # Not a multiple of 8, though more follow: RFC 8200 4.5, at the payload length.
    odd = bytes(piece[:4] + (len(piece) - 41).to_bytes(2, "big") + piece[6:-1])
    # Beyond 65,535: at the fragment offset.
    piece[42:44] = (65528 | 1).to_bytes(2, "big")
    way.send(odd, bytes(piece))
    told = way.answers()
    assert [(packet.icmp_type, packet.icmp_code) for packet, _ in told] == [(icmp.PARAMETER_PROBLEM6, 0)] * 2
    assert [quote for _, quote in told] == [odd, bytes(piece)]
    pointers = [int.from_bytes(data[44:48], "big") for data in _raw(rig, way, odd, bytes(piece))]
    assert pointers == [4]
    # The rate is limited, and then the reason is counted.
    assert rig.drops() == {"fragment_too_long": 1}
    assert rig.balanced()


def _raw(rig: FlowRig, way: Way, *packets: bytes) -> list[bytes]:
    way.send(*packets)
    return read(way.sock)


def test_a_virtio_net_header_promises_nothing_for_a_fragment(rig: FlowRig) -> None:
    for version in ADDRESSES:
        way = Way(rig, Framing.VNET, version)
        piece = cut(way.ip(6, samples.tcp(way.source, way.destination, payload=bytes(200))), 140, 9)[0]
        upper = 20 if version == 4 else 48
        way.sock.send(vnet.Header(vnet.NEEDS_CSUM, 0, 0, 0, upper, 16).pack() + piece)
        kind = vnet.GSO_TCPV4 if version == 4 else vnet.GSO_TCPV6
        way.sock.send(vnet.Header(0, kind, upper + 20, 600, 0, 0).pack() + piece)
        rig.step()
    assert rig.drops() == {"vnet_checksum": 4}


def test_a_tunnel_that_closes_takes_its_fragments_along(way: Way) -> None:
    rig = way.rig
    way.send(*cut(way.ip(253, bytes(600)), 240, 9)[:2])
    assert rig.count("received") == 0
    way.sock.close()
    rig.until(lambda: not rig.worker.tunnels)
    assert rig.drops() == {"tunnel_closed": 2}
    assert rig.balanced()


def test_two_tunnels_of_one_device_are_two(rig: FlowRig) -> None:
    ways = [Way(rig, framing, 4) for framing in Framing]
    first, second = cut(ways[0].segment(SYN, payload=bytes(200)), 140, 9)
    ways[0].send(first)
    ways[1].send(second)
    assert (rig.asked(), rig.worker.fragments.reassembly.waiting) == ([], 2)
    ways[1].send(first)
    assert len(rig.asked()) == 1


def test_a_flood_of_fragments_costs_a_bounded_amount_and_no_one_else(tmp_path: Path) -> None:
    limits = FlowSettings(fragment_bytes=1 << 20, fragment_tunnel_bytes=1 << 16)
    rig = FlowRig(tmp_path, limits)
    greedy, modest = Way(rig, Framing.RAW, 4), Way(rig, Framing.RAW, 4)
    held = rig.worker.fragments.reassembly
    patient = cut(modest.segment(SYN, payload=bytes(1000)), 600, 9)
    modest.send(patient[0])
    for number in range(3000):
        greedy.sock.send(samples.ip4(253, bytes(8), source=DEVICE4, fragment=0x2000, identification=number))
        rig.worker.turn(0)
        assert held.bytes <= 2 << 16
    rig.step()
    assert held.waiting + sum(rig.drops().values()) == 3001
    modest.send(patient[1])
    assert len(rig.asked()) == 1
    rig.close()


def test_a_packet_that_is_cut_for_its_tunnel(way: Way) -> None:
    rig = way.rig
    tunnel = next(iter(rig.worker.tunnels.values()))
    body = bytes(at % 251 for at in range(4000))
    packets = []
    for _ in range(2):
        packet = _reply(way, body)
        assert rig.worker.fragments.say(tunnel, packet)
        got = [data[len(way.head) :] for data in read(way.sock)]
        parsed = [parse(data, 0, len(data), fragments=True) for data in got]
        assert max(map(len, got)) <= 1500
        assert len({each.identification for each in parsed}) == 1
        packets.append(parsed[0].identification)
        offset = 20 if way.version == 4 else 48
        assert b"".join(data[offset:] for data in got) == body
    assert packets[1] == (packets[0] + 1) & (0xFFFF if way.version == 4 else 0xFFFFFFFF)
    # A path that takes less than the tunnel.
    assert rig.worker.fragments.say(tunnel, packet, 1280)
    assert max(len(data) - len(way.head) for data in read(way.sock)) <= 1280
    small = _reply(way, b"x")
    assert rig.worker.fragments.say(tunnel, small)
    assert read(way.sock) == [way.head + small]


def _reply(way: Way, body: bytes) -> bytes:
    """From a sender that doesn't want it to be fragmented, and so hasn't given it an identification."""
    if way.version == 6:
        return samples.ip6(253, body, source=way.destination, destination=way.source)
    return samples.ip4(253, body, source=way.destination, destination=way.source, identification=0)


def test_what_has_an_identification_keeps_it(rig: FlowRig) -> None:
    way = Way(rig, Framing.RAW, 4)
    packet = samples.ip4(253, bytes(3000), identification=0xABCD, fragment=0)
    tunnel = next(iter(rig.worker.tunnels.values()))
    assert {part[4:6] for part in rig.worker.fragments.parts(tunnel, packet)} == {b"\xab\xcd"}
    way.sock.close()


def test_identifications_of_two_tunnels_have_nothing_to_do_with_each_other(rig: FlowRig) -> None:
    ways = [Way(rig, Framing.RAW, 6) for _ in range(8)]
    numbers = {
        rig.worker.fragments.parts(tunnel, ways[0].ip(253, bytes(1600)))[0][44:48]
        for tunnel in rig.worker.tunnels.values()
    }
    assert len(numbers) == len(ways)


def test_a_device_of_another_tenant_cannot_finish_a_packet(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path)
    ours = Way(rig, Framing.RAW, 4)
    theirs = rig.tunnel(Framing.RAW, context(tenant="00000000-0000-4000-8000-00000000000b"))
    first, second = cut(ours.segment(SYN, payload=bytes(200)), 140, 9)
    ours.send(first)
    theirs.send(second)
    assert rig.asked() == []
    theirs.close()
    rig.close()
