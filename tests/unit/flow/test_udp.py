"""UDP sessions: real sockets on loopback stand for the world; the upgrader is the test."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow.session import HELD_PACKETS
from falkirk.flow.settings import FlowSettings
from falkirk.flow.udp_trains import UdpSession
from falkirk.linux import datagrams
from falkirk.wire import icmp, vnet
from falkirk.wire.build import icmp_packet
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads
from falkirk.wire.handover import SocketFailed, SocketOpened
from tests.flow_rig import FlowRig, context, read
from tests.unit.flow.udp_client import FAMILIES, LOOPBACK, Client, unreachable


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


def test_a_datagram_goes_out_and_its_answer_comes_back(client: Client) -> None:
    rig = client.rig
    wish = client.begin(b"question")
    assert (wish.protocol, wish.destination, wish.port, wish.local) == (17, client.server, 5000, 0)
    assert client.hears() == (b"question", 63, 0)
    client.send(b"", ttl=9, traffic_class=0xB9)
    assert client.hears() == (b"", 8, 0xB9)
    client.far.sendto(b"answer", client.peer)
    ((packet, payload),) = client.packets()
    assert (packet.source, packet.source_port, packet.destination, packet.destination_port) == (
        client.server,
        5000,
        client.device,
        40000,
    )
    assert (payload, packet.ttl, packet.dont_fragment) == (b"answer", 63, True)
    client.far.sendto(b"", client.peer)
    assert [payload for _, payload in client.packets()] == [b""]
    assert (rig.count("received"), rig.count("forwarded")) == (4, 4)
    client.sock.close()
    rig.step()
    started, ended = rig.records()
    assert (started.event, started.protocol, started.source_port, started.destination_port) == (
        "started",
        "udp",
        40000,
        5000,
    )
    overhead = 28 if client.family == 4 else 48
    assert (ended.event, ended.reason) == ("ended", "tunnel_closed")
    assert (ended.bytes_up, ended.packets_up) == (8 + 2 * overhead, 2)
    assert (ended.bytes_down, ended.packets_down) == (6 + 2 * overhead, 2)
    assert rig.balanced()


def test_several_wait_for_the_socket_and_no_more(client: Client) -> None:
    rig = client.rig
    for number in range(HELD_PACKETS + 2):
        client.send(bytes([number]))
    wish = client.wish()
    assert rig.drops() == {"held": 2}
    (flow,) = rig.worker.tunnels[1].flows.values()
    assert (flow.state, flow.tunnel.device.held) == (1, 1)
    rig.give_socket(wish, datagrams.udp(LOOPBACK[client.family], client.far.getsockname()[1], b"", 0))
    assert [client.hears()[0] for _ in range(HELD_PACKETS)] == [bytes([number]) for number in range(HELD_PACKETS)]
    assert (flow.state, flow.tunnel.device.held) == (3, 0)
    assert rig.balanced()


def test_sessions_of_one_client_port_share_their_external_port(client: Client) -> None:
    """RFC 4787 REQ-1, though they begin at once."""
    rig = client.rig
    other = socket.socket(client.far.family, socket.SOCK_DGRAM)
    other.bind((client.far.getsockname()[0], 0))
    other.settimeout(5)
    client.send(b"one")
    client.to = 5001
    client.send(b"two")
    # The second waits for the port that the first one's socket gets.
    first = client.wish()
    rig.give_socket(first, datagrams.udp(LOOPBACK[client.family], client.far.getsockname()[1], b"", first.local))
    second = client.wish()
    rig.give_socket(second, datagrams.udp(LOOPBACK[client.family], other.getsockname()[1], b"", second.local))
    client.hears()
    payload, peer = other.recvfrom(100)
    assert (payload, peer) == (b"two", client.peer)
    assert second.local == peer[1]
    # Each socket has its own peer's answers, and nobody else's.
    stranger = socket.socket(client.far.family, socket.SOCK_DGRAM)
    stranger.sendto(b"forged", peer[:2])
    other.sendto(b"from two", peer)
    client.far.sendto(b"from one", peer)
    got = [(packet.source_port, payload) for packet, payload in client.packets()]
    rig.step()
    got += [(packet.source_port, payload) for packet, payload in client.packets(wait=False)]
    assert sorted(got) == [(5000, b"from one"), (5001, b"from two")]
    # Another port of the client's is another mapping.
    client.port = 40001
    client.send(b"three")
    assert client.wish().local == 0
    stranger.close()
    other.close()


def test_the_next_one_asks_where_the_first_has_failed(client: Client) -> None:
    rig = client.rig
    client.send(b"one")
    client.to = 5001
    client.send(b"two")
    rig.say_upgrader(SocketFailed(client.wish().token, errno.ENETUNREACH))
    wish = client.wish()
    assert (wish.port, wish.local) == (5001, 0)


@pytest.mark.parametrize(
    ("code", "reason", "told"),
    [
        (errno.EHOSTUNREACH, "upstream_unreachable", icmp.Unreachable.HOST),
        (errno.ENETUNREACH, "upstream_unreachable", icmp.Unreachable.NET),
        (errno.EACCES, "upstream_prohibited", icmp.Unreachable.PROHIBITED),
        (errno.EMFILE, "descriptors_exhausted", None),
        (errno.EADDRINUSE, "ports_exhausted", None),
        (errno.ESHUTDOWN, "upgrader_lost", None),
        (errno.EIO, "upstream_error", None),
    ],
)
def test_no_socket(client: Client, code: int, reason: str, told: icmp.Unreachable | None) -> None:
    rig = client.rig
    client.send(b"one")
    client.send(b"two")
    rig.say_upgrader(SocketFailed(client.wish().token, code))
    errors = client.packets(wait=told is not None)
    if told is None:
        assert errors == []
    else:
        assert [(error.icmp_type, error.icmp_code) for error, _ in errors] == [unreachable(client, told)] * 2
        assert errors[0][1] == client.datagram(b"one")
    assert [(record.event, record.reason) for record in rig.records()] == [("started", ""), ("ended", reason)]
    assert rig.balanced()


def test_a_socket_that_got_lost_on_the_way_ends_the_session(client: Client) -> None:
    client.send(b"x")
    wish = client.wish()
    assert client.rig.upgrader is not None
    client.rig.say_upgrader(SocketOpened(wish.token, 1, False))
    assert client.rig.records()[-1].reason == "descriptors_exhausted"
    assert client.rig.drops() == {"descriptors_exhausted": 1}


def test_a_socket_for_a_session_that_is_over_is_closed(client: Client) -> None:
    rig = client.rig
    client.send(b"x")
    wish = client.wish()
    client.sock.close()
    rig.until(lambda: not rig.worker.tunnels)
    sock = datagrams.udp(LOOPBACK[client.family], client.far.getsockname()[1], b"", 0)
    client.far.connect(sock.getsockname())
    rig.give_socket(wish, sock)
    client.far.send(b"anybody there?")
    with pytest.raises(ConnectionRefusedError):
        client.far.recv(100)
    assert rig.drops() == {"tunnel_closed": 1}
    assert rig.balanced()


@pytest.mark.parametrize(("to", "reason"), [(25, "denied"), (5000, "no_route")])
def test_what_may_not_be_is_answered_and_nobody_is_asked(client: Client, to: int, reason: str) -> None:
    rig = client.rig
    if reason == "no_route":
        client.server = b"\x7f\0\0\1" if client.family == 4 else bytes(15) + b"\1"
        reason = "martian_destination"
    client.to = to
    client.send(b"x")
    ((error, quoted),) = client.packets()
    why = icmp.Unreachable.PROHIBITED if reason == "denied" else icmp.Unreachable.NET
    assert (error.icmp_type, error.icmp_code) == unreachable(client, why)
    assert quoted == client.datagram(b"x")
    assert rig.asked() == []
    (record,) = rig.records()
    assert (record.event, record.reason, record.protocol) == ("denied", reason, "udp")
    assert rig.balanced()


def test_errors_are_rate_limited(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(icmp_per_second=3))
    client = Client(rig, Framing.RAW, 4)
    client.to = 25
    now = rig.worker.clock()
    rig.worker.clock = lambda: now
    for _ in range(10):
        client.send(b"x")
    assert len(client.packets()) == 3
    assert rig.drops() == {"icmp_rate_limit": 7}
    client.close()
    rig.close()


def test_a_super_packet_leaves_as_the_datagrams_that_it_stands_for(rig: FlowRig) -> None:
    for family in FAMILIES:
        client = Client(rig, Framing.VNET, family)
        client.begin()
        assert client.hears()[0] == b"first"
        for count, size in ((3, 1000), (64, 20), (128, 7), (2, 1400), (1, 1000)):
            payload = os.urandom(count * size - size // 2)
            packet = client.datagram(payload, partial=True)
            upper = 20 if family == 4 else 40
            client.send_packet(packet, vnet.Header(1, vnet.GSO_UDP_L4, 0, size, upper, 6).pack())
            heard = [client.hears()[0] for _ in range(count)]
            assert heard == [payload[at : at + size] for at in range(0, len(payload), size)]
            # What is longer than the last train's datagrams is still one datagram.
            client.send(bytes(1400))
            assert client.hears()[0] == bytes(1400)
        client.close()
    assert rig.drops() == {}
    assert rig.balanced()


def test_a_train_comes_back_as_one_super_packet_or_as_plain_packets(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    payload = os.urandom(20 * 1000 + 1)
    client.far.setsockopt(datagrams.SOL_UDP, datagrams.UDP_SEGMENT, 1000)
    client.far.sendto(payload, client.peer)
    packets = client.packets()
    assert b"".join(part for _, part in packets) == payload
    assert [len(part) for _, part in packets] == [1000] * 20 + [1]
    assert client.came == (1 if client.framing is Framing.VNET else 21)
    assert rig.balanced()


def test_datagrams_that_wait_come_back_as_few_packets_as_can_be(client: Client) -> None:
    """What the kernel hasn't joined is joined while it is read: of one length, a shorter one ends it, and neither order nor headers get lost."""
    rig = client.rig
    client.begin()
    client.hears()
    sizes = [700] * 5 + [699, 700, 1, 0, 30, 40, 40] + [1400] * 70
    sent = [os.urandom(size) for size in sizes]
    for payload in sent:
        client.far.sendto(payload, client.peer)
    client.far.setsockopt(
        socket.IPPROTO_IP if client.family == 4 else socket.IPPROTO_IPV6, 2 if client.family == 4 else 16, 20
    )
    client.far.sendto(bytes(1400), client.peer)
    packets = client.packets()
    assert [payload for _, payload in packets] == [*sent, bytes(1400)]
    assert [packet.ttl for packet, _ in packets] == [63] * len(sent) + [19]
    # 5 and the 699; 700 and the 1; none; 30; 40 twice; 1,400 as often as 65,507 bytes hold, the rest, and the one with another TTL.
    assert client.came == (8 if client.framing is Framing.VNET else len(packets))
    assert rig.balanced()


def test_without_the_kernels_help_a_train_is_plain_packets(rig: FlowRig) -> None:
    rig.worker.udp.trains = False
    client = Client(rig, Framing.VNET, 4)
    client.begin()
    client.hears()
    client.far.setsockopt(datagrams.SOL_UDP, datagrams.UDP_SEGMENT, 1000)
    client.far.sendto(bytes(2500), client.peer)
    assert [len(payload) for _, payload in client.packets()] == [1000, 1000, 500]
    client.close()


def test_a_train_to_a_producer_that_takes_packs_is_one_datagram(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 6, msgspec.structs.replace(context(), packed=True))
    client.begin()
    client.hears()
    payload = os.urandom(2500)
    client.far.setsockopt(datagrams.SOL_UDP, datagrams.UDP_SEGMENT, 1000)
    client.far.sendto(payload, client.peer)
    packets = client.packets()
    assert b"".join(part for _, part in packets) == payload
    assert (rig.count("received"), rig.count("forwarded")) == (4, 4)
    client.close()


def test_an_answer_larger_than_the_tunnel_takes_comes_in_fragments(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    payload = os.urandom(4000)
    client.far.sendto(payload, client.peer)
    packets = client.packets()
    assert all(packet.is_fragment and packet.total_length <= 1500 for packet, _ in packets)
    assert len({packet.identification for packet, _ in packets}) == 1
    assert sum(packet.total_length - packet.header_length for packet, _ in packets) == 4008
    assert rig.balanced()


@pytest.mark.parametrize("partial", [False, True])
def test_checksums_are_verified_before_they_are_taken_off(client: Client, partial: bool) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    packet = bytearray(client.datagram(b"payload"))
    packet[-1] ^= 1
    if partial:
        # A tunnel without a virtio-net header has none that could be partial.
        client.send_packet(bytes(packet), vnet.Header(2).pack())
    else:
        client.send_packet(bytes(packet))
    assert rig.drops() == {"bad_l4_checksum": 1}
    packet = bytearray(client.datagram(b"payload"))
    at = (20 if client.family == 4 else 40) + 6
    packet[at : at + 2] = b"\0\0"
    client.send_packet(bytes(packet))
    if client.family == 4:
        # RFC 768: none was made.
        assert client.hears()[0] == b"payload"
    else:
        # RFC 8200 8.1: IPv6 has no such choice.
        assert rig.drops() == {"bad_l4_checksum": 2}
    assert rig.balanced()


def test_a_sessions_timer_runs_from_what_the_client_sent_last(rig: FlowRig) -> None:
    """RFC 4787 REQ-5 and REQ-6; a question to port 53 is over sooner."""
    client = Client(rig, Framing.RAW, 4)
    worker = rig.worker
    ahead = 0
    worker.clock = lambda: time.monotonic_ns() + ahead * 1_000_000_000
    client.begin()
    client.hears()
    client.port, client.to = 40001, 53
    client.begin()
    client.hears()
    assert len(worker.tunnels[1].flows) == 2
    ahead = 22
    rig.step()
    (session,) = worker.tunnels[1].flows.values()
    assert session.destination_port == 5000
    client.port, client.to = 40000, 5000
    ahead = 290
    client.send(b"again")
    assert client.hears()[0] == b"again"
    ahead = 580
    rig.step()
    client.far.sendto(b"to the client", client.peer)
    rig.until(lambda: read(client.sock))
    assert worker.flow_count == 1
    ahead = 593
    rig.step()
    assert worker.flow_count == 0
    assert [record.reason for record in rig.records() if record.event == "ended"] == ["idle", "idle"]
    client.close()


@pytest.mark.parametrize(("name", "value"), [("udp_idle_s", 119), ("udp_dns_idle_s", 16), ("echo_idle_s", 59)])
def test_timers_have_a_least(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}"):
        msgspec.structs.replace(FlowSettings(), **{name: value})


def test_datagrams_of_a_turn_leave_in_their_order_whatever_they_are(client: Client) -> None:
    """Runs of equal ones, shorter and longer ones, other TTLs, empty ones, a super-packet among them."""
    client.begin()
    client.hears()
    sent: list[tuple[bytes, int]] = []
    for index, (size, ttl) in enumerate(
        [
            (100, 64),
            (100, 64),
            (100, 64),
            (40, 64),
            (100, 64),
            (200, 64),
            (200, 9),
            (0, 9),
            (1400, 9),
            (1400, 9),
            (1, 9),
        ]
        + [(500, 64)] * 70
    ):
        payload = bytes([index]) * size
        sent.append((payload, ttl - 1))
        packet = client.datagram(payload, ttl=ttl)
        client.sock.send(packet if client.framing is Framing.RAW else vnet.ZERO + packet)
    client.rig.until(lambda: client.rig.count("received") == len(sent) + 1)
    client.rig.step()
    assert [client.hears()[:2] for _ in sent] == sent
    assert client.rig.balanced()


def test_a_run_that_the_socket_takes_singly_only_leaves_singly(client: Client) -> None:
    rig = client.rig
    client.begin()
    client.hears()
    (session,) = rig.worker.tunnels[1].flows.values()
    assert isinstance(session, UdpSession)
    assert session.sock is not None
    # A socket without checksums takes no trains (udp(7): EIO).
    session.sock.setsockopt(socket.SOL_SOCKET, 11, 1)
    packets = [client.datagram(bytes([number]) * 50) for number in range(5)]
    for packet in packets:
        client.sock.send(packet if client.framing is Framing.RAW else vnet.ZERO + packet)
    rig.step()
    assert [client.hears()[0] for _ in packets] == [bytes([number]) * 50 for number in range(5)]
    assert rig.balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_datagrams_leave_in_their_order_whatever_they_are(rig: FlowRig, family: int) -> None:
    """Equal ones one behind another, other lengths, TTLs and classes, bad ones; more than one buffer holds."""
    client = Client(rig, Framing.RAW, family)
    client.begin()
    client.hears()
    mixed: list[tuple[int, int, int]] = [
        (50, 64, 0),
        (50, 64, 0),
        (50, 9, 0),
        (50, 9, 0xB8),
        (49, 9, 0xB8),
        (50, 9, 0xB8),
        (51, 9, 0),
    ]
    sent: list[tuple[bytes, int, int]] = []
    heard: list[tuple[bytes, int, int]] = []
    good: list[int] = []
    packets: list[bytes] = []
    for number in range(400):
        size, ttl, traffic_class = mixed[number % len(mixed)] if number % 40 < 20 else (1300, 64, 0)
        payload = number.to_bytes(2, "big") * (size // 2) + b"!" * (size % 2)
        packet = client.datagram(payload, ttl=ttl, traffic_class=traffic_class)
        if number % 37 == 5:
            packet = packet[:-1] + bytes([packet[-1] ^ 1])
        else:
            sent.append((payload, ttl - 1, traffic_class))
            good.append(number)
        packets.append(packet)
    for at in range(0, len(packets), 40):
        client.sock.send(b"".join(packets[at : at + 40]))
        rig.step(1)
        heard += [client.hears() for _ in range(sum(number // 40 == at // 40 for number in good))]
    assert heard == sent
    assert rig.drops() == {"bad_l4_checksum": len(packets) - len(sent)}
    assert rig.count("received") == len(packets) + 1
    assert rig.balanced()
    client.close()


ODD: dict[str, tuple[dict[int, str], Callable[[bool, bytes], bytes]]] = {
    "no checksum": ({4: "", 6: "bad_l4_checksum"}, lambda four, data: _put(data, 26 if four else 46, b"\0\0")),
    "bad checksum": ({4: "bad_l4_checksum", 6: "bad_l4_checksum"}, lambda four, data: data[:-1] + b"?"),
    "UDP says less": (
        {4: "bad_l4_checksum", 6: "bad_l4_checksum"},
        lambda four, data: _put(data, 24 if four else 44, b"\0\x20"),
    ),
    "UDP says more": (
        {4: "bad_udp_length", 6: "bad_udp_length"},
        lambda four, data: _put(data, 24 if four else 44, b"\1\0"),
    ),
    "bad header": ({4: "bad_ip_checksum", 6: ""}, lambda four, data: _put(data, 10, b"??") if four else data),
}
"""Why it isn't passed on, by family (empty: it is), and what is done to it."""


def _put(data: bytes, at: int, what: bytes) -> bytes:
    return data[:at] + what + data[at + len(what) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("place", [0, 1, 5])
def test_an_odd_one_in_a_pack_is_found_wherever_it_is(rig: FlowRig, family: int, what: str, place: int) -> None:
    client = Client(rig, Framing.RAW, family)
    client.begin()
    client.hears()
    reasons, change = ODD[what]
    payloads = [bytes([number]) * 50 for number in range(6)]
    packets = [client.datagram(payload) for payload in payloads]
    packets[place] = change(family == 4, packets[place])
    client.sock.send(b"".join(packets))
    rig.step()
    expected = [payload for number, payload in enumerate(payloads) if number != place or not reasons[family]]
    assert [client.hears()[0] for _ in expected] == expected
    assert rig.drops() == ({reasons[family]: 1} if reasons[family] else {})
    assert rig.balanced()
    client.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_whose_last_one_is_cut_and_one_whose_hops_are_used_up(rig: FlowRig, family: int) -> None:
    client = Client(rig, Framing.RAW, family)
    client.begin()
    client.hears()
    packets = [client.datagram(bytes([number]) * 50) for number in range(3)]
    client.sock.send(b"".join(packets)[:-1])
    rig.step()
    assert [client.hears()[0] for _ in range(2)] == [b"\0" * 50, b"\1" * 50]
    assert sum(rig.drops().values()) == 1
    client.sock.send(b"".join([*packets, client.datagram(b"x" * 50, ttl=1)]))
    rig.step()
    assert [client.hears()[0] for _ in range(3)] == [bytes([number]) * 50 for number in range(3)]
    ((told, _),) = client.packets()
    assert told.is_icmp_error
    assert rig.balanced()
    client.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_that_ends_while_its_packets_wait_begins_anew(rig: FlowRig, family: int) -> None:
    """The client says that nobody listens, in between: what came before leaves, what comes after is another session's."""
    client = Client(rig, Framing.RAW, family)
    client.begin()
    client.hears()
    client.far.sendto(b"answer", client.peer)
    ((_, _),) = client.packets()
    answer = Heads(client.server, client.device, client.to, client.port)
    quoted = bytearray(answer.size) + b"answer"
    answer.put(quoted, 0, 6, 64, 0)
    kind, code = unreachable(client, icmp.Unreachable.PORT)
    told = icmp_packet(bytearray(icmp.build(kind, code, 0)) + quoted, client.device, client.server)
    packets = [client.datagram(bytes([number]) * 50) for number in range(4)]
    client.sock.send(b"".join([*packets[:2], told, *packets[2:]]))
    rig.step()
    assert [client.hears()[0] for _ in range(2)] == [b"\0" * 50, b"\1" * 50]
    wish = client.wish()
    rig.give_socket(wish, datagrams.udp(LOOPBACK[family], client.far.getsockname()[1], b"", wish.local))
    rig.step()
    assert [client.hears()[0] for _ in range(2)] == [b"\2" * 50, b"\3" * 50]
    client.close()
