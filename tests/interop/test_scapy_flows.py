"""10,000 random flows, and scapy judges every packet that leaves: lengths, checksums, fields (`tests.packets.read`).

TCP lifted from a tunnel to the private namespace and back, UDP sessions back from sockets, TCP, UDP, echo and SCTP between devices; raw and
vnet, super-packets included, which are cut into what the wire would carry. What goes in is made by hand (`tests.packets.craft`), and what comes
out must be that, with the addresses, ports and TTL that it should have by then.

Limit: UDP that leaves by a socket is compared as payload, since its headers are the kernel's.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.settings import FlowSettings
from falkirk.linux import datagrams
from falkirk.wire.context import Framing
from falkirk.wire.handover import Closed, Connected, OpenSocket, Prepare
from tests.flow_rig import DEVICE4, DEVICE6, PORT, SERVER4, SERVER6, FlowRig, read
from tests.forward_rig import LAPTOP, NAS, Pair, between
from tests.packets import craft
from tests.packets.craft import Endpoints
from tests.packets.read import VNET, Seen, plain, seen
from tests.packets.script import Key, Step

LIFTED, SESSIONS, FORWARDED = 6000, 2000, 2000
BATCH = 50
AT_ONCE = 10
"""Datagrams that a socket's buffer certainly holds."""
FAMILIES = ("ipv4", "ipv6")
SETTINGS = FlowSettings(fragment_timeout_s=60)


def text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


DEVICE = {"ipv4": text(DEVICE4), "ipv6": text(DEVICE6)}
SERVER = {"ipv4": text(SERVER4), "ipv6": text(SERVER6)}


def step(**fields: object) -> Step:
    """A step with these keys; None is a bare word."""
    keys = tuple(Key(name, "=", "" if value is None else str(value)) for name, value in fields.items())
    return Step(0, "", "", (), keys, None)


class Chance:
    """Random fields of packets."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.port = 1024

    def ip(self, family: str) -> dict[str, object]:
        """Fields of an IP header."""
        chosen: dict[str, object] = {"ttl": self.random.randint(2, 255), "tos": self.random.randrange(256)}
        if family == "ipv4":
            chosen["ipid"] = self.random.randrange(65536)
        else:
            chosen["label"] = self.random.randrange(1 << 20)
        return chosen

    def options(self) -> dict[str, object]:
        """TCP options, and a window."""
        chosen: dict[str, object] = {"win": self.random.randrange(65536), "ts": self.random.randrange(1 << 32)}
        return {name: value for name, value in chosen.items() if self.random.random() < 0.7}

    def payload(self, most: int) -> bytes:
        """Bytes of a random length, often an odd or an extreme one."""
        length = self.random.choice((0, 1, 2, 3, most - 1, most, self.random.randint(1, most)))
        return self.random.randbytes(length)

    def number(self) -> int:
        """A sequence number, often one about to wrap."""
        return self.random.choice((self.random.randrange(1 << 32), (1 << 32) - self.random.randint(1, 3000)))

    def next_port(self) -> int:
        """A client port that no other flow has."""
        self.port += 1
        return self.port


def framed(packet: bytes, framing: Framing, chance: Chance, gso: int = 0) -> bytes:
    """A packet as a tunnel or device of that framing carries it; a partial checksum half of the time, with `gso` always."""
    if framing is Framing.RAW:
        return packet
    four = packet[0] >> 4 == 4
    upper, protocol = (20, packet[9]) if four else (40, packet[6])
    if protocol not in (6, 17) or (not gso and chance.random.random() < 0.5):
        return bytes(VNET.size) + packet
    return partial(packet, four, upper, protocol, gso)


def partial(packet: bytes, four: bool, upper: int, protocol: int, gso: int) -> bytes:
    at = upper + (16 if protocol == 6 else 6)
    addresses = (packet[12:16], packet[16:20]) if four else (packet[8:24], packet[24:40])
    total = craft.pseudo(addresses[0], addresses[1], protocol, len(packet) - upper)
    kind = 0 if not gso else 5 if protocol == 17 else 1 if four else 4
    header = upper + (packet[upper + 12] >> 4 << 2 if protocol == 6 else 8)
    return (
        VNET.pack(1, kind, header, gso, upper, at - upper) + packet[:at] + total.to_bytes(2, "big") + packet[at + 2 :]
    )


def judged(data: bytes, framing: Framing) -> list[Seen]:
    """What a datagram carries, each packet judged by scapy."""
    return [seen(packet) for packet in (plain(data) if framing is Framing.VNET else [data])]


def joined(packets: list[Seen]) -> bytes:
    return b"".join(packet.payload for packet in packets)


class Lifted:
    """One lifted flow: what the client and the private namespace's kernel say."""

    def __init__(self, chance: Chance, family: str, framing: Framing) -> None:
        self.chance, self.family, self.framing = chance, family, framing
        self.ends = Endpoints(DEVICE[family], SERVER[family], chance.next_port(), chance.random.randint(1024, 65535))
        self.sequence, self.base = chance.number(), chance.number()
        self.slot = b""

    def up(self, flags: str, payload: bytes = b"", gso: int = 0) -> bytes:
        fields = self.chance.ip(self.family) | self.chance.options()
        if flags == "S":
            fields |= {"mss": self.chance.random.randint(536, 9000), "ws": 7}
        segment = craft.tcp(step(**fields), self.ends, flags, self.sequence, self.base if "." in flags else 0, payload)
        return framed(craft.ip(step(**fields), self.ends, self.family, 6, segment), self.framing, self.chance, gso)

    def down(self, flags: str, payload: bytes, gso: int = 0) -> bytes:
        """From the kernel, by the TUN device: a partial checksum for `vnet`, a complete one for `raw`."""
        host = self.slot[:-3] + (int.from_bytes(self.slot[-3:], "big") & 0x800000 | 1).to_bytes(3, "big")
        ends = Endpoints(text(host), text(self.slot), PORT, self.ends.source_port)
        fields = self.chance.ip(self.family) | self.chance.options()
        segment = craft.tcp(step(**fields), ends, flags, self.base, self.sequence, payload)
        packet = craft.ip(step(**fields), ends, self.family, 6, segment)
        if self.framing is Framing.RAW:
            return bytes(VNET.size) + packet
        return partial(packet, self.family == "ipv4", 20 if self.family == "ipv4" else 40, 6, gso)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path, SETTINGS)
    yield rig
    rig.close()


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("family", FAMILIES)
def test_lifted_flows(rig: FlowRig, framing: Framing, family: str) -> None:
    chance = Chance(1)
    tunnel, tun = rig.tunnel(framing), rig.tun[framing]
    for _ in range(LIFTED // 4 // BATCH):
        flows = [Lifted(chance, family, framing) for _ in range(BATCH)]
        by_port = {flow.ends.source_port: flow for flow in flows}
        for flow in flows:
            tunnel.send(flow.up("S"))
        rig.step()
        wishes = [wish for wish in rig.asked() if isinstance(wish, Prepare)]
        assert len(wishes) == BATCH
        rig.say_upgrader(*(Connected(wish.slot, 1) for wish in wishes))
        for data in read(tun):
            (syn,) = judged(data, Framing.VNET)
            flow = by_port[syn.source_port]
            assert (syn.flags, syn.sequence, syn.destination_port) == ("S", flow.sequence, PORT)
            flow.slot = socket.inet_pton(socket.AF_INET if family == "ipv4" else socket.AF_INET6, syn.source)
        for flow in flows:
            tun.send(flow.down("S.", b""))
        rig.step()
        answers = [answer for data in read(tunnel) for answer in judged(data, framing)]
        assert {
            (answer.source, answer.source_port, answer.destination_port, answer.sequence) for answer in answers
        } == {(SERVER[family], flow.ends.destination_port, flow.ends.source_port, flow.base) for flow in flows}
        for at in range(0, BATCH, AT_ONCE):
            _exchange(rig, chance, flows[at : at + AT_ONCE], tunnel)
        # An RST of nobody's: what Falkirk says itself is judged as well.
        stray = Lifted(chance, family, framing)
        tunnel.send(stray.up(".", b"stray"))
        rig.step()
        (reset,) = [packet for data in read(tunnel) for packet in judged(data, framing)]
        assert (reset.flags, reset.sequence) == ("R", stray.base)
        rig.say_upgrader(*(Closed(wish.slot, "client_reset", 0, 0) for wish in wishes))
    assert rig.drops() == {}
    assert rig.balanced()


def _exchange(rig: FlowRig, chance: Chance, flows: list[Lifted], tunnel: socket.socket) -> None:
    """Some data of each flow, both ways."""
    framing = flows[0].framing
    tun = rig.tun[framing]

    def some() -> tuple[int, bytes]:
        gso = chance.random.choice((0, 0, 536, 1448)) if framing is Framing.VNET else 0
        return gso, chance.payload(6 * gso if gso else 1400) or b"x"

    sent, came = {}, dict.fromkeys((flow.ends.source_port for flow in flows), b"")
    for flow in flows:
        gso, sent[flow.ends.source_port] = some()
        tunnel.send(flow.up(".", sent[flow.ends.source_port], gso))
    rig.step()
    for data in read(tun):
        for packet in judged(data, Framing.VNET):
            came[packet.source_port] += packet.payload
    assert came == sent
    sent, came = {}, dict.fromkeys(sent, b"")
    for flow in flows:
        gso, sent[flow.ends.source_port] = some()
        tun.send(flow.down("P.", sent[flow.ends.source_port], gso))
    rig.step()
    for data in read(tunnel):
        for packet in judged(data, framing):
            came[packet.destination_port] += packet.payload
    assert came == sent


@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("family", FAMILIES)
def test_sessions(rig: FlowRig, framing: Framing, family: str) -> None:
    chance = Chance(2)
    tunnel = rig.tunnel(framing)
    kind, host = (socket.AF_INET, "127.0.0.1") if family == "ipv4" else (socket.AF_INET6, "::1")
    with socket.socket(kind, socket.SOCK_DGRAM) as far:
        far.bind((host, 0))
        far.settimeout(5)
        for _ in range(SESSIONS // 4):
            ends = Endpoints(DEVICE[family], SERVER[family], chance.next_port(), chance.random.randint(1024, 65535))
            fields, payload = chance.ip(family), chance.payload(1400)
            packet = craft.ip(step(**fields), ends, family, 17, craft.udp(step(), ends, payload))
            tunnel.send(framed(packet, framing, chance))
            (wish,) = rig.asked()
            assert isinstance(wish, OpenSocket)
            address = socket.inet_pton(kind, host)
            rig.give_socket(wish, datagrams.udp(address, far.getsockname()[1], b"", wish.local))
            data, peer = far.recvfrom(65536)
            assert data == payload
            answer = chance.payload(chance.random.choice((1400, 5000)))
            far.sendto(answer, peer)
            got: list[Seen] = []

            def come(got: list[Seen] = got) -> bool:
                got.extend(each for data in read(tunnel) for each in judged(data, framing))
                return bool(got) and not got[-1].fields["mf"]

            rig.until(come)
            upper = joined(sorted(got, key=lambda each: int(each.fields["off"] or 0)))
            if got[0].kind == "fragment":
                head = Endpoints(ends.destination, ends.source, ends.destination_port, ends.source_port)
                assert upper == craft.udp(step(), head, answer)
            else:
                assert upper == answer
                assert (got[0].source, got[0].source_port) == (ends.destination, ends.destination_port)
                assert got[0].destination_port == ends.source_port
            assert all(len(each.data) <= 1500 for each in got)
            (only,) = rig.worker.tunnels.values()
            for flow in list(only.flows.values()):
                rig.worker.lifecycle.finish(flow, "done")
    assert rig.drops() == {}
    assert rig.balanced()


@pytest.mark.parametrize(
    "framings", [(near, far) for near in Framing for far in Framing], ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
def test_forwarded_flows(tmp_path: Path, framings: tuple[Framing, Framing]) -> None:
    chance = Chance(3)
    with between(tmp_path, 1, framings) as pair:
        for _ in range(FORWARDED // 4):
            _forwarded(chance, pair)
        assert pair.drops() == {}
        assert pair.balanced()


def _forwarded(chance: Chance, pair: Pair) -> None:
    """One flow: its first packet there, one packet back."""
    family = chance.random.choice(FAMILIES)
    version = 4 if family == "ipv4" else 6
    near, far = text(LAPTOP[version]), text(NAS[version])
    ends = Endpoints(near, far, chance.next_port(), chance.random.randint(1024, 65535))
    protocol = chance.random.choice((6, 17, 1 if version == 4 else 58, 132))
    for sender, receiver, way in (
        (pair.laptop, pair.nas, ends),
        (pair.nas, pair.laptop, Endpoints(far, near, ends.destination_port, ends.source_port)),
    ):
        fields, payload = chance.ip(family), chance.payload(1400)
        if protocol == 6:
            flags, number = ("S", 1000) if sender is pair.laptop else ("S.", 7000)
            payload = b""
            upper = craft.tcp(step(mss=chance.random.randint(536, 9000), ts=1), way, flags, number, 1001, payload)
        elif protocol == 17:
            upper = craft.udp(step(), way, payload)
        elif protocol == 132:
            upper = chance.random.randbytes(60)
            payload = upper
        else:
            name = "echo" if sender is pair.laptop else "echo-reply"
            upper = craft.icmp(step(id=ends.source_port, seq=1), way, family, name, payload)
        packet = craft.ip(step(**fields), way, family, protocol, upper)
        sender.sock.send(framed(packet, sender.framing, chance))
        pair.step()
        (got,) = [each for data in read(receiver.sock) for each in judged(data, receiver.framing)]
        assert (got.source, got.destination, got.payload) == (way.source, way.destination, payload)
        assert got.fields["ttl"] == int(str(fields["ttl"])) - 1
        assert got.fields["tos"] == fields["tos"]


@pytest.mark.parametrize(
    "framings", [(near, far) for near in Framing for far in Framing], ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_forwarded_super_packets(tmp_path: Path, framings: tuple[Framing, Framing], family: str) -> None:
    """Segments of a connection between devices, super-packets where the sender has them, arrive as that many bytes."""
    chance = Chance(4)
    version = 4 if family == "ipv4" else 6
    with between(tmp_path, 1, framings) as pair:
        near, far = text(LAPTOP[version]), text(NAS[version])
        ends = Endpoints(near, far, 40000, 80)
        back = Endpoints(far, near, 80, 40000)

        def say(way: Endpoints, flags: str, number: int, ack: int, payload: bytes = b"", gso: int = 0) -> list[Seen]:
            sender, receiver = (pair.laptop, pair.nas) if way is ends else (pair.nas, pair.laptop)
            fields = chance.ip(family) | {"ttl": 64}
            upper = craft.tcp(step(**fields), way, flags, number, ack, payload)
            packet = craft.ip(step(**fields), way, family, 6, upper)
            sender.sock.send(framed(packet, sender.framing, chance, gso if sender.framing is Framing.VNET else 0))
            pair.step()
            return [each for data in read(receiver.sock) for each in judged(data, receiver.framing)]

        say(ends, "S", 1000, 0)
        say(back, "S.", 7000, 1001)
        say(ends, ".", 1001, 7001)
        numbers = {id(ends): 1001, id(back): 7001}
        for _ in range(100):
            for way, other in ((ends, back), (back, ends)):
                sender = pair.laptop if way is ends else pair.nas
                gso = chance.random.choice((536, 1000, 1440)) if sender.framing is Framing.VNET else 0
                payload = chance.payload(12 * gso if gso else 1400) or b"x"
                if len(payload) <= gso:
                    gso = 0
                got = say(way, "P.", numbers[id(way)], numbers[id(other)], payload, gso)
                assert joined(got) == payload
                assert [each.sequence for each in got] == [
                    numbers[id(way)] + at for at in range(0, len(payload), gso or len(payload))
                ]
                numbers[id(way)] += len(payload)
        assert pair.drops() == {}
        assert pair.balanced()
