"""What belongs to one flow or tenant stays with it: the path MTU, and flows that look the same."""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP

from falkirk.linux import seqpacket
from tests.netns.fidelity import DEADLINE_S, Client, Way, World, receive
from tools.mesh import resource
from tools.netlab import wait_for

pytestmark = pytest.mark.netns
SOL_PACKET = 263
PACKET_VNET_HDR = 15
ETH_P_ALL = 3
VNET_HEADER = 10
NARROW = 1280
"""The smallest path MTU that IPv6 knows (RFC 8200 5); for IPv4 just a small one."""
ANSWER = 1 << 20
TENANTS = ("twins-a", "twins-b")
TWIN = ["100.96.7.7", "fd00:7::7"]
SOURCE_PORT = 41_000


class Segment:
    """A TCP segment as it came out of the tunnel: perhaps a super-packet, whose header tells the size of its parts."""

    def __init__(self, data: bytes) -> None:
        gso_type, gso_size = data[1], struct.unpack_from("=H", data, 4)[0]
        packet = data[VNET_HEADER:]
        self.version = packet[0] >> 4
        at = (packet[0] & 15) * 4 if self.version == 4 else 40
        self.head = packet[: at + 8]
        self.tcp = (packet[9] if self.version == 4 else packet[6]) == socket.IPPROTO_TCP
        self.destination_port = int.from_bytes(packet[at + 2 : at + 4], "big")
        length = len(packet) - at - (packet[at + 12] >> 4) * 4 if self.tcp else 0
        self.payload = gso_size if gso_type else length
        self.sequence = int.from_bytes(packet[at + 4 : at + 8], "big")
        self.next = self.sequence + length & 0xFFFFFFFF

    def quotation(self, sequence: int) -> bytes:
        """Its IP header and eight bytes more, with another sequence number."""
        return self.head[:-4] + sequence.to_bytes(4, "big")


@contextmanager
def sniffer(client: Client) -> Iterator[socket.socket]:
    """What arrives and leaves at the client's TUN device."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
        sock.bind(("falkirk0", ETH_P_ALL))
        return sock

    with client.call(make) as sock:
        sock.settimeout(DEADLINE_S)
        yield sock


def download(way: Way, client: socket.socket, server: socket.socket) -> tuple[int, Segment]:
    """Bytes from server to client: the largest segment's payload, and the last segment with the header of a largest one (an error about
    a packet that is no larger than the path isn't believed)."""
    port = client.getsockname()[1]
    with sniffer(way.client) as wire:
        server.sendall(bytes(ANSWER))
        receive(client, ANSWER)
        largest, head, last, left = 0, b"", None, ANSWER
        while left > 0:
            segment = Segment(wire.recv(1 << 17))
            if segment.tcp and segment.destination_port == port and segment.payload:
                if segment.payload > largest:
                    largest, head = segment.payload, segment.head
                left -= segment.next - segment.sequence & 0xFFFFFFFF
                last = segment
    assert last is not None
    last.head = head
    return largest, last


def too_big(way: Way, quoted: bytes) -> None:
    """The ICMP error that a router beyond the client would send, about a segment to the client."""
    if way.family == socket.AF_INET:
        message = struct.pack("!BBHHH", 3, 4, 0, 0, NARROW) + quoted
        total = sum(struct.unpack(f"!{len(message) // 2}H", message))
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        message = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
        protocol = socket.IPPROTO_ICMP
    else:
        message = struct.pack("!BBHI", 2, 0, 0, NARROW) + quoted
        protocol = socket.IPPROTO_ICMPV6
    with way.client.socket(way.family, socket.SOCK_RAW, protocol) as sock:
        sock.sendto(message, (way.server, 0))


def test_packet_too_big_narrows_its_own_flow_only(way: Way) -> None:
    room = NARROW - (40 if way.family == socket.AF_INET else 60)
    with way.pair() as narrow, way.pair() as wide:
        before, last = download(way, *narrow)
        assert before > room
        assert download(way, *wide)[0] == before
        heard = last

        def smaller() -> bool:
            nonlocal heard
            too_big(way, heard.quotation(heard.next))
            largest, heard = download(way, *narrow)
            return largest <= room

        # As a router does: each time, for one may be lost.
        wait_for("smaller segments", smaller, DEADLINE_S)
        assert download(way, *wide)[0] == before
        with way.pair() as later:
            assert download(way, *later)[0] == before


@pytest.fixture(scope="module")
def twins(world: World) -> World:
    """Two tenants with one device each, of the same addresses; each has its own egress addresses."""
    server = world.server
    documents: list[dict[str, Any]] = []
    for number, tenant in zip((3, 4), TENANTS, strict=True):
        egress = {"address4": server.host4(number), "address6": server.host6(number)}
        for address in egress.values():
            server.add_here(address)
        documents += world.tenant(tenant, **egress)
        documents.append(resource("Device", "twin", tenant, user="alice", addresses=TWIN))
    world.apply(documents)
    return world


@pytest.mark.parametrize("framing", ["vnet", "raw"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_equal_signatures_of_two_tenants_are_two_flows(
    twins: World, framing: str, family: socket.AddressFamily
) -> None:
    first, second = (Way(twins, twins.client(framing, device="twin", tenant=tenant), family) for tenant in TENANTS)
    with first.listener() as listener:
        port = listener.getsockname()[1]
        with (
            first.connect(port, source_port=SOURCE_PORT) as client,
            second.connect(port, source_port=SOURCE_PORT) as other,
        ):
            assert client.getsockname() == other.getsockname()
            assert client.getpeername() == other.getpeername()
            accepted = [listener.accept() for _ in TENANTS]
            with accepted[0][0], accepted[1][0]:
                by_address = {str(ipaddress.ip_address(peer[0])): sock for sock, peer in accepted}
                assert by_address.keys() == {first.host(3), first.host(4)}
                for sock, number in ((client, 3), (other, 4)):
                    sock.sendall(f"tenant {number}".encode())
                    server = by_address[first.host(number)]
                    assert server.recv(64) == f"tenant {number}".encode()
                    server.sendall(f"for {number}".encode())
                for sock, number in ((client, 3), (other, 4)):
                    assert sock.recv(64) == f"for {number}".encode()


def test_a_tenants_tunnel_does_not_speak_from_another_tenants_address(twins: World) -> None:
    way = Way(twins, twins.client("raw", worker=1), socket.AF_INET)
    context = {"v": 1, "tenant": TENANTS[0], "device": "twin", "framing": "raw"}
    with way.pair() as (client, server), way.listener() as listener:
        address, port = client.getsockname()[0], listener.getsockname()[1]
        with seqpacket.connect(twins.mesh.run_dir / "tunnel.sock") as tunnel:
            tunnel.setblocking(True)
            tunnel.settimeout(DEADLINE_S)
            tunnel.send(json.dumps(context).encode())
            assert "admitted" in json.loads(tunnel.recv(16384))
            before = twins.drops("spoofed_source")
            for packet in (
                IP(src=address, dst=way.server) / TCP(sport=999, dport=port, flags="S"),
                IP(src=address, dst=way.server)
                / TCP(sport=client.getsockname()[1], dport=client.getpeername()[1], flags="R"),
            ):
                tunnel.send(bytes(packet))
            wait_for("the dropped packets", lambda: twins.drops("spoofed_source") == before + 2, DEADLINE_S)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        client.sendall(b"x")
        assert server.recv(1) == b"x"
