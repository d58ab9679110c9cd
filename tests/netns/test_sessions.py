"""UDP and echo sessions of a flow worker with a network of its own beyond: a router, a link of 1,300 bytes, a host, nobody.

worker (here) ──1500── router ──1300── host 10.9.2.2, fd09:2::2
                         └── 10.9.1.9, fd09:1::9: nobody
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.linux import datagrams, netns
from falkirk.linux.netlink import Netlink
from falkirk.upgrader import sessions
from falkirk.wire import icmp, vnet
from falkirk.wire.build import icmp_packet
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads
from falkirk.wire.handover import OpenSocket, SocketFailed
from falkirk.wire.packet import Packet, parse, split, verify
from tests.flow_rig import DEVICE4, DEVICE6, FlowRig, read
from tests.netns.conftest import add_address, in_namespace, in_thread

pytestmark = pytest.mark.netns


def address(number: int, family: int, net: int = 2) -> str:
    return f"10.9.{net}.{number}" if family == 4 else f"fd09:{net}::{number}"


class Network:
    """Three namespaces in a row."""

    def __init__(self, ping: bool) -> None:
        self.near, self.router, self.host = (
            in_thread(netns.unshare_network, lambda: netns.self_descriptor("net")) for _ in range(3)
        )
        self._cable(self.near, "up", self.router, "down", net=1, mtu=1500)
        self._cable(self.router, "up", self.host, "down", net=2, mtu=1300)
        in_namespace(self.router, self._forward)
        for here, net in ((self.near, 1), (self.host, 2)):
            gateway = 2 if here == self.near else 1
            for family in (4, 6):
                in_namespace(here, self._default, "up" if here == self.near else "down", address(gateway, family, net))
        if ping:
            in_namespace(self.near, lambda: Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647"))

    def _cable(self, here: int, name: str, there: int, other: str, *, net: int, mtu: int) -> None:
        def make() -> None:
            with Netlink() as links:
                links.add_veth(name, other, there)

        def up(device: str, number: int) -> None:
            with Netlink() as links:
                links.set_link(socket.if_nametoindex("lo"))
                links.set_link(socket.if_nametoindex(device), mtu=mtu)

        def give(device: str, number: int) -> None:
            for family in (4, 6):
                packed = ipaddress.ip_address(address(number, family, net)).packed
                add_address(device, packed, 24 if family == 4 else 64)

        in_namespace(here, make)
        for step in (up, give):
            in_namespace(here, step, name, 1)
            in_namespace(there, step, other, 2)

    @staticmethod
    def _forward() -> None:
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", name).write_text("1")
        # Its errors come at once and one by one, whatever came before.
        for name in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
            Path("/proc/sys/net", name).write_text("0")

    @staticmethod
    def _default(device: str, gateway: str) -> None:
        there = ipaddress.ip_address(gateway).packed
        with Netlink() as links:
            links.add_route(socket.if_nametoindex(device), bytes(len(there)), 0, gateway=there)

    def close(self) -> None:
        for namespace in (self.near, self.router, self.host):
            os.close(namespace)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """Echo leaves by ping sockets, or where a test says so by raw ones."""
    network = Network(getattr(request, "param", "ping") == "ping")
    yield network
    network.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Client:
    """A device whose sessions leave from the near namespace."""

    def __init__(self, rig: FlowRig, network: Network, framing: Framing, family: int) -> None:
        self.rig, self.network, self.framing, self.family = rig, network, framing, family
        self.sock = rig.tunnel(framing)
        self.device = DEVICE4 if family == 4 else DEVICE6
        self.to = self.packed(2)
        self.identifier = 0x1234
        self.router = self.packed(2, 1)

    def packed(self, number: int, net: int = 2) -> bytes:
        return ipaddress.ip_address(address(number, self.family, net)).packed

    @property
    def falkirk(self) -> bytes:
        settings = self.rig.worker.settings
        return ipaddress.ip_address(settings.icmp_source4 if self.family == 4 else settings.icmp_source6).packed

    def say(self, packet: bytes) -> None:
        """Send a packet; what it needs is opened."""
        self.sock.send(packet if self.framing is Framing.RAW else vnet.ZERO + packet)
        for wish in self.rig.asked():
            assert isinstance(wish, OpenSocket)
            sock, local, raw = in_namespace(self.network.near, sessions.start, wish)
            self.rig.give_socket(wish, sock, local=local, raw=raw)

    def request(self, sequence: int, payload: bytes = b"abcdefgh", ttl: int = 64, traffic_class: int = 0) -> bytes:
        kind = icmp.ECHO4 if self.family == 4 else icmp.ECHO6
        message = bytearray(icmp.build(kind, 0, self.identifier << 16 | sequence)) + payload
        return icmp_packet(message, self.device, self.to, ttl=ttl, traffic_class=traffic_class)

    def datagram(self, payload: bytes, port: int, ttl: int = 64, dont_fragment: bool = True) -> bytes:
        heads = Heads(self.device, self.to, 40000, port)
        buf = bytearray(heads.size) + payload
        heads.put(buf, 0, len(payload), ttl, 0, identification=-1 if dont_fragment else 9)
        return bytes(buf)

    def heard(self, count: int = 1) -> list[tuple[Packet, bytes]]:
        """The next packets to the device, each with all that is behind its upper layer's header."""
        packets: list[bytes] = []

        def come() -> bool:
            for data in read(self.sock):
                data = data if self.framing is Framing.RAW else data[10:]
                packets.extend(data[at : at + size] for at, size in split(data, len(data)))
            return len(packets) >= count

        self.rig.until(come, 20)
        assert len(packets) == count
        made = []
        self.packets = packets
        for packet in packets:
            parsed = parse(packet, 0, len(packet), fragments=True)
            assert parsed.destination == self.device
            if self.framing is Framing.RAW or parsed.protocol != 17:
                verify(packet, parsed)
            made.append((parsed, packet[parsed.payload_offset :]))
        return made

    def kind(self, four: tuple[int, int], six: tuple[int, int]) -> tuple[int, int]:
        return four if self.family == 4 else six


@pytest.fixture(params=[(framing, family) for framing in Framing for family in (4, 6)], ids=lambda p: f"{p[0]}-{p[1]}")
def client(request: pytest.FixtureRequest, rig: FlowRig, network: Network) -> Iterator[Client]:
    framing, family = request.param
    client = Client(rig, network, framing, family)
    yield client
    client.sock.close()


def far(client: Client, port: int = 0) -> socket.socket:
    """A UDP socket of the host's."""

    def make() -> socket.socket:
        family = socket.AF_INET if client.family == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((address(2, client.family), port))
        sock.settimeout(20)
        return sock

    return in_namespace(client.network.host, make)


EITHER = pytest.mark.parametrize("network", ["ping", "raw"], indirect=True)


@EITHER
def test_a_host_answers_for_itself(client: Client) -> None:
    for sequence, payload in ((1, b""), (2, os.urandom(1000)), (0xFFFF, b"x")):
        client.say(client.request(sequence, payload, traffic_class=0x28))
        ((reply, data),) = client.heard()
        assert (reply.icmp_type, reply.icmp_code) == client.kind((0, 0), (129, 0))
        assert (reply.source, reply.identifier, reply.sequence, data) == (client.to, 0x1234, sequence, payload)
        # The host's 64, less the router and this one.
        assert reply.ttl == 62
    (flow,) = client.rig.worker.tunnels[1].flows.values()
    assert (flow.packets_up, flow.packets_down) == (3, 3)
    record = client.rig.records()[0]
    assert (record.protocol, record.source_port, record.destination_port) == (
        "icmp" if client.family == 4 else "icmpv6",
        0x1234,
        0,
    )
    assert client.rig.balanced()


def test_a_host_that_is_not_there_does_not_answer(client: Client) -> None:
    client.to = client.packed(9, 1)
    client.say(client.request(1))
    # All that comes is what the neighbour of the host says, who looked for it.
    ((error, quoted),) = client.heard()
    assert (error.icmp_type, error.icmp_code) == client.kind((3, 1), (1, 3))
    quote = parse(quoted, 0, len(quoted))
    assert (quote.destination, quote.identifier, quote.sequence) == (client.to, 0x1234, 1)
    assert client.rig.balanced()


@EITHER
def test_the_same_identifier_of_two_tunnels_is_two_sessions(client: Client) -> None:
    other = Client(client.rig, client.network, Framing.RAW, client.family)
    for number, one in enumerate((client, other)):
        one.say(one.request(7, bytes([number]) * 10))
    for number, one in enumerate((client, other)):
        ((reply, data),) = one.heard()
        assert (reply.identifier, reply.sequence, data) == (0x1234, 7, bytes([number]) * 10)
    # Nor does one hear the other's errors.
    client.say(client.request(8, ttl=2))
    other.say(other.request(9, ttl=2))
    for sequence, one in ((8, client), (9, other)):
        ((_, quoted),) = one.heard()
        assert parse(quoted, 0, len(quoted)).sequence == sequence
    assert client.rig.balanced()
    other.sock.close()


@EITHER
def test_hops_beyond_are_seen(client: Client) -> None:
    client.say(client.request(1, ttl=1))
    ((error, quoted),) = client.heard()
    assert (error.icmp_type, error.icmp_code, error.source) == (
        *client.kind((11, 0), (3, 0)),
        client.falkirk,
    )
    assert quoted == client.request(1, ttl=1)
    for packet in (client.request(2, ttl=2), client.datagram(b"payload", 33434, ttl=2)):
        client.say(packet)
        ((error, quoted),) = client.heard()
        assert (error.icmp_type, error.icmp_code) == client.kind((11, 0), (3, 0))
        assert error.source == client.router
        sent, quote = parse(packet, 0, len(packet)), parse(quoted, 0, len(quoted))
        verify(quoted, quote)
        for field in ("source", "destination", "protocol", "source_port", "destination_port", "identifier", "sequence"):
            assert getattr(quote, field) == getattr(sent, field)
        assert quoted[quote.payload_offset :] == packet[sent.payload_offset :]
    client.say(client.request(3, ttl=3))
    ((reply, _),) = client.heard()
    assert (reply.source, reply.sequence) == (client.to, 3)
    assert client.rig.balanced()


def test_a_closed_port_is_told_by_its_host(client: Client) -> None:
    packet = client.datagram(b"anybody there?", 9)
    client.say(packet)
    ((error, quoted),) = client.heard()
    assert (error.icmp_type, error.icmp_code, error.source) == (*client.kind((3, 3), (1, 4)), client.to)
    quote = parse(quoted, 0, len(quoted))
    assert (quote.source_port, quote.destination_port, quoted[quote.payload_offset :]) == (40000, 9, b"anybody there?")
    # What is sent next isn't lost for it.
    with far(client, 9) as server:
        client.say(client.datagram(b"and now?", 9))
        assert server.recv(100) == b"and now?"
    assert client.rig.balanced()


def test_the_paths_mtu_is_told_and_kept(client: Client) -> None:
    overhead = 28 if client.family == 4 else 48
    kind = client.kind((3, 4), (2, 0))

    with far(client) as server:
        port = server.getsockname()[1]
        for sender in (client.router, client.falkirk):
            client.say(client.datagram(bytes(1400), port))
            ((error, _),) = client.heard()
            assert (error.icmp_type, error.icmp_code, error.source) == (*kind, sender)
            word = client.packets[0][error.header_length + 4 : error.header_length + 8]
            assert int.from_bytes(word, "big") == 1300
        client.say(client.datagram(bytes(1300 - overhead), port))
        assert server.recv(2000) == bytes(1300 - overhead)
        if client.family == 4:
            # Nothing against fragments: then nobody is told anything.
            client.say(client.datagram(bytes(1400), port, dont_fragment=False))
            assert server.recv(2000) == bytes(1400)
    client.say(client.request(1, bytes(1400)))
    ((error, _),) = client.heard()
    assert (error.icmp_type, error.icmp_code) == kind
    assert client.rig.balanced()


def test_the_marks_of_an_answer_come_with_it(client: Client) -> None:
    with far(client) as server:
        client.say(client.datagram(b"x", server.getsockname()[1]))
        _, peer = server.recvfrom(100)
        datagrams.set_traffic_class(server, 0xB9, six=client.family == 6)
        datagrams.set_ttl(server, 7, six=client.family == 6)
        server.sendto(b"y", peer)
        ((answer, data),) = client.heard()
        assert (data, answer.traffic_class, answer.ttl) == (b"y", 0xB9, 5)
        datagrams.set_ttl(server, 2, six=client.family == 6)
        server.sendto(b"z", peer)
        ((answer, data),) = client.heard()
        assert (data, answer.ttl) == (b"z", 1)


def test_an_upgrader_that_may_have_no_socket_for_echo(client: Client) -> None:
    client.sock.send(client.request(1) if client.framing is Framing.RAW else vnet.ZERO + client.request(1))
    (wish,) = client.rig.asked()
    assert isinstance(wish, OpenSocket)
    client.rig.say_upgrader(SocketFailed(wish.token, errno.EPERM))
    ((error, _),) = client.heard()
    assert (error.icmp_type, error.icmp_code) == client.kind((3, 13), (1, 1))
    assert client.rig.records()[-1].reason == "echo_not_permitted"
    assert client.rig.balanced()


def test_other_queries_are_not_carried(client: Client) -> None:
    kind = 13 if client.family == 4 else 139
    message = bytearray(icmp.build(kind, 0, 1)) + bytes(12)
    client.say(icmp_packet(message, client.device, client.to))
    assert client.rig.drops() == {"icmp_not_carried": 1}
