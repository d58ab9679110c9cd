"""UDP sessions: real sockets on loopback stand for the world; the upgrader is the test."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow import control
from falkirk.flow.session import HELD_PACKETS
from falkirk.flow.settings import FlowSettings
from falkirk.linux import datagrams, seqpacket
from falkirk.wire import icmp, vnet
from falkirk.wire.build import icmp_packet
from falkirk.wire.checksum import checksum
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.datagram import Heads
from falkirk.wire.handover import Adopt, OpenSocket, SocketFailed, SocketOpened, encode
from falkirk.wire.packet import Packet, parse, split, verify
from falkirk.wire.segment import segments
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, FlowRig, context, read

FAMILIES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
LOOPBACK = {4: socket.inet_aton("127.0.0.1"), 6: socket.inet_pton(socket.AF_INET6, "::1")}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Client:
    """A device on a tunnel, and the server that its sessions lead to."""

    def __init__(self, rig: FlowRig, framing: Framing, family: int, who: TunnelContext | None = None) -> None:
        self.rig, self.framing, self.family = rig, framing, family
        self.sock = rig.tunnel(framing, who)
        self.device, self.server = FAMILIES[family]
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self.far = socket.socket(kind, socket.SOCK_DGRAM)
        self.far.bind(("127.0.0.1" if family == 4 else "::1", 0))
        self.far.settimeout(5)
        self.port = 40000
        self.to = 5000
        self.came = 0
        """Datagrams in the tunnel, when `packets` looked last."""

    def close(self) -> None:
        self.sock.close()
        self.far.close()

    def datagram(self, payload: bytes, *, ttl: int = 64, traffic_class: int = 0, partial: bool = False) -> bytes:
        heads = Heads(self.device, self.server, self.port, self.to)
        buf = bytearray(heads.size) + payload
        heads.put(buf, 0, len(payload), ttl, traffic_class, partial=partial)
        return bytes(buf)

    def send_packet(self, packet: bytes, header: bytes = vnet.ZERO) -> None:
        self.sock.send(packet if self.framing is Framing.RAW else header + packet)
        self.rig.step()

    def send(self, payload: bytes, **fields: int) -> None:
        self.send_packet(self.datagram(payload, **fields))  # type: ignore[arg-type]

    def wish(self) -> OpenSocket:
        (wish,) = self.rig.asked()
        assert isinstance(wish, OpenSocket)
        return wish

    def begin(self, payload: bytes = b"first") -> OpenSocket:
        """A session whose socket leads to the server on loopback."""
        self.send(payload)
        wish = self.wish()
        self.rig.give_socket(wish, datagrams.udp(LOOPBACK[self.family], self.far.getsockname()[1], b"", wish.local))
        return wish

    def hears(self) -> tuple[bytes, int, int]:
        """What the server gets: payload, TTL, traffic class."""
        four = self.family == 4
        level = socket.IPPROTO_IP if four else socket.IPPROTO_IPV6
        wanted = (
            (datagrams.IP_RECVTTL, datagrams.IP_RECVTOS)
            if four
            else (
                datagrams.IPV6_RECVHOPLIMIT,
                datagrams.IPV6_RECVTCLASS,
            )
        )
        for option in wanted:
            self.far.setsockopt(level, option, 1)
        payload, ancillary, _, self.peer = self.far.recvmsg(65536, 200)
        told = {kind: data[0] for _, kind, data in ancillary}
        ttl = told.get(datagrams.IP_TTL if four else datagrams.IPV6_HOPLIMIT, -1)
        return payload, ttl, told.get(datagrams.IP_TOS if four else datagrams.IPV6_TCLASS, -1)

    def packets(self, wait: bool = True) -> list[tuple[Packet, bytes]]:
        """Whole packets that the device gets, with right checksums, and the payload of each."""
        datagrams: list[bytes] = []

        def come() -> bool:
            datagrams.extend(read(self.sock))
            return bool(datagrams)

        if wait:
            self.rig.until(come)
        self.rig.step()
        come()
        made = []
        self.came = len(datagrams)
        for data in datagrams:
            plain: list[bytes]
            if self.framing is Framing.VNET:
                header = vnet.unpack(data, 0, len(data))
                packet = parse(data, 10, len(data) - 10, fragments=True)
                assert vnet.validate(header, packet, 1500) == header
                plain = segments(header, data, 10, len(data) - 10)
            else:
                plain = [data[at : at + size] for at, size in split(data, len(data))]
            for one in plain:
                packet = parse(one, 0, len(one), fragments=True)
                assert packet.total_length == len(one)
                verify(one, packet)
                made.append((packet, one[packet.payload_offset :]))
        return made


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


def unreachable(client: Client, why: icmp.Unreachable) -> tuple[int, int]:
    code4, type6, code6 = why.value
    return (icmp.UNREACHABLE4, code4) if client.family == 4 else (type6, code6)


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
    before = len(list(Path("/proc/self/fd").iterdir()))
    rig.give_socket(wish, datagrams.udp(LOOPBACK[client.family], client.far.getsockname()[1], b"", 0))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
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


def client_error(client: Client, kind: int, code: int, rest: int, payload: bytes = b"answer") -> bytes:
    """What the client says of a datagram that it was sent."""
    heads = Heads(client.server, client.device, client.to, client.port)
    quote = bytearray(heads.size) + payload
    heads.put(quote, 0, len(payload), 60, 0)
    return icmp_packet(bytearray(icmp.build(kind, code, rest)) + quote, client.device, client.server)


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
    client.send_packet(client_error(client, kind, code, 1300))
    client.far.sendto(bytes(1400), client.peer)
    packets = client.packets()
    assert len(packets) == 2
    assert all(packet.is_fragment and packet.total_length <= 1300 for packet, _ in packets)
    # Nothing needs to be as small as this (RFC 1191 3, RFC 8200 5).
    client.send_packet(client_error(client, kind, code, 1))
    client.far.sendto(bytes(200), client.peer)
    least = 68 if client.family == 4 else 1280
    assert max(packet.total_length for packet, _ in client.packets()) <= least
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
    seqpacket.send(rig._parent, encode([control.Terminate(1, flow.key, flow.flow_id, "enough")]))
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
