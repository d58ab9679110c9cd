"""Fragments with the kernel's IP at both ends: what is whole arrives, what isn't never does, and nothing grows."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import pytest

from falkirk.linux.netlink import Netlink
from falkirk.wire import icmp
from falkirk.wire.build import too_big
from falkirk.wire.checksum import checksum
from falkirk.wire.context import Framing
from falkirk.wire.fragments import cut
from falkirk.wire.packet import parse
from tests.netns.fidelity import DEADLINE_S, FAMILIES, Way, World, open_world
from tests.netns.wired import HEADER, WiredClient
from tests.unit.wire import samples
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
TUNNEL_MTU = 1400
SIZES = (1372, 1400, 4000, 60000)
FLOOD = 20_000


@pytest.fixture(scope="module")
def narrow() -> Iterator[World]:
    """A mesh whose tunnels take less than the server's cable."""
    with open_world(1, {"onramp": {"mtu": TUNNEL_MTU}}) as world:
        yield world


@pytest.fixture(
    params=[(framing, family) for framing in Framing for family in FAMILIES], ids=lambda p: f"{p[0]}-{p[1].name}"
)
def way(narrow: World, request: pytest.FixtureRequest) -> Iterator[Way]:
    """One of the four ways."""
    framing, family = request.param
    with closing(WiredClient(narrow.mesh, "device0", framing)) as client:
        yield Way(narrow, client, family)


def cable(way: Way) -> WiredClient:
    assert isinstance(way.client, WiredClient)
    return way.client


@dataclass
class Sight:
    """Plain packets that have passed."""

    up: list[bytes] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)

    def fragments(self, packets: list[bytes]) -> int:
        return sum(parse(packet, 0, len(packet), fragments=True).is_fragment for packet in packets)


def watch(client: WiredClient) -> Sight:
    sight = Sight()

    def up(data: bytes) -> bool:
        sight.up.append(data[HEADER:])
        return True

    def down(data: bytes) -> bool:
        sight.down.append(data[HEADER:])
        return True

    client.up, client.down = up, down
    return sight


@contextlib.contextmanager
def echo_server(way: Way) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a UDP server that answers what it gets, and all that it got."""
    got: list[bytes] = []
    with way.world.server.call(socket.socket, way.family, socket.SOCK_DGRAM) as sock:
        sock.bind((way.server, 0))
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                if select.select([sock], [], [], 0.05)[0]:
                    data, peer = sock.recvfrom(65536)
                    got.append(data)
                    sock.sendto(data, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield sock.getsockname()[1], got
        finally:
            ended.set()
            thread.join()


def ask(sock: socket.socket, payload: bytes, to: tuple[str, int]) -> bytes:
    """The answer; UDP may lose a question on a busy machine, so it is asked again."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            # It may be what an ICMP error said of one before, which is told once.
            sock.sendto(payload, to)
        while select.select([sock], [], [], 2)[0]:
            data = sock.recv(65536)
            if data == payload:
                return data
    raise AssertionError(f"no answer to {len(payload)} bytes")


def test_datagrams_of_any_size_go_and_come(way: Way) -> None:
    sight = watch(cable(way))
    with echo_server(way) as (port, _), way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        for size in SIZES:
            payload = os.urandom(size)
            assert ask(sock, payload, (way.server, port)) == payload
    for packets in (sight.up, sight.down):
        assert sight.fragments(packets) >= 2 + 3 + 43
        assert max(len(packet) for packet in packets if packet[0] >> 4 in (4, 6)) <= TUNNEL_MTU


@pytest.mark.parametrize("size", [4000, 20000])
def test_ping_with_large_packets(way: Way, size: int) -> None:
    sight = watch(cable(way))
    four = way.family == socket.AF_INET
    protocol = socket.IPPROTO_ICMP if four else socket.IPPROTO_ICMPV6
    kind, answer = (icmp.ECHO4, icmp.ECHO_REPLY4) if four else (icmp.ECHO6, icmp.ECHO_REPLY6)
    payload = os.urandom(size)
    with way.client.socket(way.family, socket.SOCK_RAW, protocol) as sock:
        message = bytearray(struct.pack(">BBHHH", kind, 0, 0, 0x4242, 1) + payload)
        if four:
            message[2:4] = checksum(message).to_bytes(2, "big")
        deadline = time.monotonic() + DEADLINE_S
        came = b""
        while not came and time.monotonic() < deadline:
            sock.sendto(message, (way.server, 0))
            while not came and select.select([sock], [], [], 2)[0]:
                data = sock.recv(65536)
                data = data[(data[0] & 15) << 2 :] if four else data
                if data[0] == answer and data[4:6] == b"\x42\x42":
                    came = data[8:]
    assert came == payload
    assert sight.fragments(sight.up) >= size // TUNNEL_MTU
    assert sight.fragments(sight.down) >= size // TUNNEL_MTU


def test_datagrams_follow_a_path_that_says_what_it_takes(way: Way) -> None:
    client = cable(way)
    longest = 0

    def down(data: bytes) -> bool:
        nonlocal longest
        packet = parse(data, HEADER, len(data) - HEADER, fragments=True)
        longest = max(longest, packet.total_length)
        if packet.total_length <= 1300:
            return True
        answer = too_big(data, packet, 1300, packet.destination)
        assert answer is not None
        client.inject(answer)
        return False

    client.down = down
    with echo_server(way) as (port, got), way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        payload = os.urandom(1340)
        assert ask(sock, payload, (way.server, port)) == payload
        # The first answer was too large; what was learned is kept.
        assert longest > 1300
        asked = len(got)
        assert asked >= 2
        longest = 0
        assert ask(sock, payload, (way.server, port)) == payload
        assert 0 < longest <= 1300


def test_a_datagram_that_is_too_large_for_the_way_on_is_answered_with_its_mtu(way: Way) -> None:
    four = way.family == socket.AF_INET
    level, discover, current = (
        (socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_MTU) if four else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_MTU)
    )
    with echo_server(way) as (port, _), way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(level, discover, _PMTUDISC_DO)
        sock.connect((way.server, port))
        assert sock.getsockopt(level, current) == TUNNEL_MTU
        with narrow_cable(way.world, 1300):
            ask(sock, b"small", (way.server, port))

            def heard() -> bool:
                with contextlib.suppress(OSError):
                    sock.send(bytes(1340))
                return sock.getsockopt(level, current) == 1300

            wait_for("the path's MTU", heard, DEADLINE_S)
            payload = os.urandom(1300 - (28 if four else 48))
            assert ask(sock, payload, (way.server, port)) == payload


_IP_MTU_DISCOVER, _IP_MTU = 10, 14
_IPV6_MTU_DISCOVER, _IPV6_MTU = 23, 24
_PMTUDISC_DO = 2


@contextlib.contextmanager
def narrow_cable(world: World, mtu: int) -> Iterator[None]:
    """The mesh's way to the server takes less for a while."""
    index = socket.if_nametoindex(world.server.device)
    with Netlink() as links:
        links.set_link(index, mtu=mtu)
        try:
            yield
        finally:
            links.set_link(index, mtu=1500)


def attacks(way: Way, port: int) -> dict[str, list[bytes]]:
    """Fragments of datagrams to the server, none of which is a datagram; each has an identification of its own."""
    four = way.family == socket.AF_INET
    client, server = cable(way).addresses[4 if four else 16], socket.inet_pton(way.family, way.server)
    number = 0x1000

    def fragment(offset: int, data: bytes, more: bool, protocol: int = 17) -> bytes:
        if four:
            word = offset >> 3 | (0x2000 if more else 0)
            return samples.ip4(
                protocol, data, source=client, destination=server, fragment=word, identification=number & 0xFFFF
            )
        head = struct.pack(">BBHI", protocol, 0, offset | more, number)
        return samples.ip6(protocol, data, source=client, destination=server, extensions=head, first=44)

    def begin(length: int) -> bytes:
        """A UDP header without a checksum that matters: no datagram comes of it."""
        return struct.pack(">HHHH", 4444, port, length, 0x1234)

    made: dict[str, list[bytes]] = {}
    # The second one lies inside the first one: a negative length, once.
    made["teardrop"] = [fragment(0, begin(72) + bytes(56), True), fragment(24, bytes(8), False)]
    number += 1
    made["overlap"] = [
        fragment(0, begin(48) + bytes(24), True),
        fragment(16, b"other".ljust(16), True),
        fragment(32, bytes(16), False),
    ]
    number += 1
    made["rewritten header"] = [
        fragment(0, begin(40) + bytes(16), True),
        fragment(0, begin(40) + b"X" * 16, True),
        fragment(24, bytes(16), False),
    ]
    number += 1
    made["two ends"] = [
        fragment(32, bytes(8), False),
        fragment(48, bytes(8), False),
        fragment(0, begin(40) + bytes(24), True),
    ]
    number += 1
    made["tiny"] = [fragment(0, begin(32)[:4] + bytes(4), True, 6), fragment(8, bytes(24), False, 6)]
    number += 1
    made["ping of death"] = [fragment(65528, bytes(64), False)]
    number += 1
    made["odd length"] = [fragment(0, begin(40) + bytes(5), True), fragment(16, bytes(24), False)]
    number += 1
    made["nothing"] = [fragment(0, b"", True), fragment(8, b"", False)]
    number += 1
    made["no beginning"] = [fragment(8 * at, bytes(8), True) for at in range(1, 20)]
    number += 1
    made["no end"] = [fragment(0, begin(1000) + bytes(16), True), fragment(24, bytes(16), True)]
    return made


def test_what_is_not_whole_never_arrives(way: Way) -> None:
    with echo_server(way) as (port, got), way.client.socket(way.family, socket.SOCK_DGRAM) as sock:
        ask(sock, b"before", (way.server, port))
        for packets in attacks(way, port).values():
            for packet in packets:
                cable(way).inject(packet)
        # It comes after them, and is whole.
        ask(sock, os.urandom(3000), (way.server, port))
        assert {len(data) for data in got} == {6, 3000}
    for reason in ("fragment_overlap", "fragment_past_end", "fragment_tiny"):
        assert way.world.drops(reason) > 0


def test_a_flood_of_fragments_is_bounded_and_others_notice_nothing(narrow: World) -> None:
    with (
        closing(WiredClient(narrow.mesh, "device0", Framing.RAW)) as greedy,
        closing(WiredClient(narrow.mesh, "device0", Framing.VNET)) as modest,
    ):
        way = Way(narrow, modest, socket.AF_INET)
        source, server = greedy.addresses[4], socket.inet_pton(way.family, way.server)
        with echo_server(way) as (port, _), modest.socket(way.family, socket.SOCK_DGRAM) as sock:
            ask(sock, os.urandom(3000), (way.server, port))
            before = {name: process.resident for name, process in narrow.processes().items()}
            dropped = narrow.drops("fragment_packets") + narrow.drops("fragment_memory")
            whole = samples.ip4(253, bytes(2600), source=source, destination=server, fragment=0)
            for number in range(FLOOD):
                greedy.inject(cut(whole, TUNNEL_MTU, number)[number & 1])
            ask(sock, os.urandom(3000), (way.server, port))

            def all_but_few() -> bool:
                now = narrow.drops("fragment_packets") + narrow.drops("fragment_memory")
                return now - dropped >= FLOOD - 2000

            wait_for("the flood to be dropped", all_but_few, DEADLINE_S)
            for name, process in narrow.processes().items():
                assert process.resident - before[name] < 24 * 1024, name
