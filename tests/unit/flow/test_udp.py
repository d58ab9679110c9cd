"""UDP sessions: real sockets on loopback stand for the world; the upgrader is the test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.linux import datagrams
from falkirk.wire import vnet
from falkirk.wire.context import Framing
from falkirk.wire.datagram import Heads
from falkirk.wire.handover import OpenSocket
from falkirk.wire.packet import Packet, parse, split, verify
from falkirk.wire.segment import segments
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, FlowRig, read

FAMILIES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
LOOPBACK = {4: socket.inet_aton("127.0.0.1"), 6: socket.inet_pton(socket.AF_INET6, "::1")}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


class Client:
    """A device on a tunnel, and the server that its sessions lead to."""

    def __init__(self, rig: FlowRig, framing: Framing, family: int) -> None:
        self.rig, self.framing, self.family = rig, framing, family
        self.sock = rig.tunnel(framing)
        self.device, self.server = FAMILIES[family]
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self.far = socket.socket(kind, socket.SOCK_DGRAM)
        self.far.bind(("127.0.0.1" if family == 4 else "::1", 0))
        self.far.settimeout(5)
        self.port = 40000
        self.to = 5000

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
