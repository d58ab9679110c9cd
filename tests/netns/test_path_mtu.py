"""Packets fit their way: what SYNs offer, what ICMP says, what nobody says; with the kernel's TCP at both ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from falkirk.flow.segments import ACK, SYN
from falkirk.wire import build, icmp, ipv4, ipv6, tcp
from falkirk.wire.context import Framing
from falkirk.wire.packet import Packet, parse
from falkirk.wire.protocol import TCP
from tests.netns.fidelity import FAMILIES, Way, World, open_world, receive, together
from tests.netns.wired import HEADER, WiredClient, on_the_wire

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
TUNNEL_MTU = 1400
MIB = 1 << 20
HEADERS = {socket.AF_INET: 40, socket.AF_INET6: 60}


@pytest.fixture(scope="module")
def narrow() -> Iterator[World]:
    """A mesh whose tunnels take less than devices usually do."""
    with open_world(1, {"onramp": {"mtu": TUNNEL_MTU}}) as world:
        yield world


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1].name}"
)
def way(narrow: World, request: pytest.FixtureRequest) -> Iterator[Way]:
    """One of the four ways, with a device that believes in 1,500 bytes."""
    framing, family = request.param
    with closing(WiredClient(narrow.mesh, "device0", framing, mtu=1500)) as client:
        yield Way(narrow, client, family)


@dataclass
class Sight:
    """What has been seen on the cable."""

    up: list[bytes] = field(default_factory=list)
    """Heads of packets to the mesh."""
    down: list[bytes] = field(default_factory=list)
    largest_up: int = 0
    largest_down: int = 0


def watch(client: WiredClient) -> Sight:
    """Look at what passes from now on."""
    sight = Sight()

    def up(data: bytes) -> bool:
        sight.up.append(data[:140])
        sight.largest_up = max(sight.largest_up, on_the_wire(data))
        return True

    def down(data: bytes) -> bool:
        sight.down.append(data[:140])
        sight.largest_down = max(sight.largest_down, on_the_wire(data))
        return True

    client.up, client.down = up, down
    return sight


def wired(way: Way) -> WiredClient:
    assert isinstance(way.client, WiredClient)
    return way.client


def segment_size(heads: list[bytes], flags: int) -> int | None:
    """What the first segment with these flags offers."""
    for head in heads:
        packet = head[HEADER:]
        upper = 20 if packet[0] >> 4 == 4 else 40
        if packet[upper + 13] & (SYN | ACK) == flags:
            return tcp.maximum_segment_size(packet, upper, packet[upper + 12] >> 4 << 2)
    return None


def download(client: socket.socket, server: socket.socket, size: int) -> None:
    """So many bytes from the server, all of them right."""
    data = os.urandom(size)
    thread = threading.Thread(target=server.sendall, args=(data,))
    thread.start()
    assert receive(client, size) == data
    thread.join()


def test_no_segment_is_larger_than_the_tunnel_takes(way: Way) -> None:
    sight = watch(wired(way))
    most = TUNNEL_MTU - HEADERS[way.family]
    with way.pair() as (client, server):
        download(client, server, MIB)
        download(server, client, MIB)
        # Options take their part of it (RFC 6691).
        assert most - 40 <= client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= most
    # The client has offered what its device takes, and was offered what the tunnel takes.
    assert segment_size(sight.up, SYN) == 1500 - HEADERS[way.family]
    assert segment_size(sight.down, SYN | ACK) == most
    assert TUNNEL_MTU - 40 <= sight.largest_down <= TUNNEL_MTU
    assert TUNNEL_MTU - 40 <= sight.largest_up <= TUNNEL_MTU


def too_big(client: WiredClient, packet: Packet, data: bytes, mtu: int) -> None:
    """Say that a packet from the mesh was too big, as the device's kernel would."""
    answer = build.too_big(data, packet, mtu, packet.destination)
    assert answer is not None
    client.inject(answer)


def narrower(client: WiredClient, mtu: int, tell: bool) -> Sight:
    """From now on packets from the mesh larger than that don't arrive. Seen are those that came so far."""
    sight = Sight()

    def down(data: bytes) -> bool:
        size = on_the_wire(data)
        sight.largest_down = max(sight.largest_down, size)
        if size <= mtu:
            return True
        sight.down.append(data[:140])
        if tell:
            too_big(client, parse(data, HEADER, len(data) - HEADER), data, mtu)
        return False

    client.down = down
    return sight


def test_a_path_that_says_what_it_takes(way: Way) -> None:
    client_end = wired(way)
    with way.pair() as (client, server):
        sight = narrower(client_end, 1300, tell=True)
        download(client, server, MIB)
        assert sight.down, "nothing was too large"
        # It has been learned: nothing larger comes any more.
        sight.largest_down = 0
        download(client, server, MIB)
        assert 1300 - 40 <= sight.largest_down <= 1300
    # The next flow, in another slot, knows nothing of it.
    with way.pair() as (client, server):
        sight = watch(client_end)
        download(client, server, MIB)
        assert sight.largest_down > 1300


def test_a_path_that_swallows_large_packets_and_says_nothing(narrow: World) -> None:
    """RFC 4821 by the private namespace's kernel."""

    def run(at: tuple[str, socket.AddressFamily]) -> tuple[int, int]:
        with closing(WiredClient(narrow.mesh, "device0", at[0], mtu=1500)) as cable:
            way = Way(narrow, cable, at[1])
            with way.pair() as (client, server):
                sight = narrower(cable, 1200, tell=False)
                download(client, server, MIB)
                swallowed = len(sight.down)
                # And stays learned.
                download(client, server, MIB)
                return swallowed, len(sight.down)

    for before, after in together(run, [(framing, family) for framing in Framing for family in FAMILIES]):
        assert before > 0
        assert after == before


def forged(
    way: Way, cable: WiredClient, ports: tuple[int, int], sequence: int, kind: tuple[int, int], mtu: int
) -> None:
    """An ICMP error about a segment that the server may have sent."""
    server, client = (
        socket.inet_pton(way.family, way.server),
        cable.addresses[4 if way.family == socket.AF_INET else 16],
    )
    segment = tcp.build(*ports, sequence, 1, ACK)
    four = way.family == socket.AF_INET
    # As long as a full one, of which the beginning is quoted.
    head = (ipv4.build if four else ipv6.build)(server, client, TCP, TUNNEL_MTU - (20 if four else 40))
    message = bytearray(icmp.build(*kind, mtu)) + head + segment + bytes(100)
    cable.inject(build.icmp_packet(message, client, server))


def test_a_stranger_cannot_make_a_path_narrow(way: Way) -> None:
    cable = wired(way)
    four = way.family == socket.AF_INET
    kind = (icmp.UNREACHABLE4, icmp.FRAGMENTATION_NEEDED4) if four else (icmp.PACKET_TOO_BIG6, 0)
    smallest = 600 if four else 1280
    with way.pair() as (client, server):
        sight = watch(cable)
        download(client, server, 1000)
        ports = (way_port(server), client.getsockname()[1])
        following = under_way(sight.down)
        # RFC 5927 4.1: about a segment that isn't under way.
        for offset in (1 << 31, 1 << 30, 1 << 20, -(1 << 20)):
            forged(way, cable, ports, (following + offset) & 0xFFFFFFFF, kind, smallest)
        # What no path is: RFC 8201 4, RFC 791 3.2; and what would have let the segment through.
        for mtu in (0, 67, 1279, TUNNEL_MTU, 9000) if not four else (1, 67, TUNNEL_MTU, 9000):
            forged(way, cable, ports, following, kind, mtu)
        sight.largest_down = 0
        download(client, server, MIB)
        assert sight.largest_down > TUNNEL_MTU - 40
        # The same by somebody who sees what is under way.
        forged(way, cable, ports, under_way(sight.down), kind, smallest)
        # What was sent before the error was heard is larger.
        download(client, server, MIB)
        sight.largest_down = 0
        download(client, server, MIB)
        assert sight.largest_down <= smallest


def way_port(server: socket.socket) -> int:
    """The port that the client talks to."""
    port: int = server.getsockname()[1]
    return port


def under_way(heads: list[bytes]) -> int:
    """The sequence number behind the last byte of the segments; some may have come twice."""
    furthest = None
    for head in heads:
        packet = head[HEADER:]
        four = packet[0] >> 4 == 4
        upper = 20 if four else 40
        total = packet[2] << 8 | packet[3] if four else 40 + (packet[4] << 8 | packet[5])
        length = total - upper - (packet[upper + 12] >> 4 << 2) + (packet[upper + 13] >> 1 & 1)
        end = (int.from_bytes(packet[upper + 4 : upper + 8], "big") + length) & 0xFFFFFFFF
        if furthest is None or (end - furthest) & 0xFFFFFFFF < 1 << 31:
            furthest = end
    assert furthest is not None
    return furthest
