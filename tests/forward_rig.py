"""Two devices of one tenant, and what stands between them: one flow worker, or two with their pair.

`Pair.packets` are made by hand, each family and protocol alike; what comes out is parsed and its checksums verified.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteSource
from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.flow import control
from falkirk.flow.settings import FlowSettings
from falkirk.linux import seqpacket
from falkirk.runtime.spool import AuditRecord
from falkirk.wire import icmp, ipv4, ipv6, vnet
from falkirk.wire.build import icmp_packet, segment
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.packet import Packet, parse, verify
from tests.flow_rig import NETWORK, TENANT, FlowRig, context, read

LAPTOP = {4: bytes([100, 96, 0, 2]), 6: bytes.fromhex("fd000000000000010000000000000002")}
NAS = {4: bytes([100, 96, 0, 3]), 6: bytes.fromhex("fd000000000000010000000000000003")}
BEHIND = {4: bytes([10, 9, 1, 1]), 6: bytes.fromhex("fd090000000000000000000000000001")}
"""A host behind the NAS, which the route `site` leads to."""
TCP, UDP, SCTP, GRE, ESP = 6, 17, 132, 47, 50
SYN, RST, ACK = 2, 4, 16
SITE = "00000000-0000-4000-8000-00000000005e"


def own(device: DestinationDevice, address: str) -> RouteSource:
    """A device's own address, as the router compiles it."""
    entry = RouteEntry("", f"device/{device.device}", address, "device", device=device)
    return RouteSource(NETWORK, entry)


def device(name: str, tenant: str = TENANT) -> DestinationDevice:
    """As routes name it."""
    return DestinationDevice(f"{tenant}/{name}", name, "bob" if name == "nas" else "", ("storage",))


ROUTES = (
    own(device("laptop"), "100.96.0.2/32"),
    own(device("laptop"), "fd00:0:0:1::2/128"),
    own(device("nas"), "100.96.0.3/32"),
    own(device("nas"), "fd00:0:0:1::3/128"),
    own(device("off"), "100.96.0.4/32"),
    own(device("off"), "fd00:0:0:1::4/128"),
    RouteSource(NETWORK, RouteEntry(SITE, "site", "10.9.0.0/16", "device", device=device("nas"))),
    RouteSource(NETWORK, RouteEntry(SITE, "site6", "fd09::/64", "device", device=device("nas"))),
)
POLICIES = (
    PolicySource(
        TENANT,
        "main",
        0,
        [
            RuleSource("no-telnet", "net.port == 23", "deny"),
            RuleSource(
                "to-nas", 'device.name == "laptop" && net.dst_device == "nas" && net.dst_user == "bob"', "allow"
            ),
            RuleSource("to-off", 'net.dst_device == "off"', "allow"),
            RuleSource("out", 'net.dst_device == ""', "allow"),
        ],
    ),
)
"""The laptop may talk to the NAS, and nothing may talk to the laptop."""


def who(name: str, addresses: Sequence[bytes], tenant: str = TENANT) -> TunnelContext:
    """A device's context."""
    return context(tenant=tenant, device=name, addresses=addresses)


class End:
    """One device's tunnel, and what its host does by hand."""

    def __init__(self, rig: FlowRig, step: Callable[[], None], tunnel: socket.socket, framing: Framing) -> None:
        self.rig, self.sock, self.framing = rig, tunnel, framing
        self._step = step
        self.head = b"" if framing is Framing.RAW else vnet.ZERO

    def send(self, packet: bytes, header: bytes | None = None) -> None:
        """Into the tunnel; `header` in place of the virtio-net header of a plain packet."""
        self.sock.send((self.head if header is None or not self.head else header) + packet)
        self._step()

    def raw(self) -> list[bytes]:
        """Datagrams that came."""
        self._step()
        return read(self.sock)

    def received(self) -> list[tuple[Packet, bytes]]:
        """Packets that came, whole and with right checksums (of the upper layer where it isn't partial)."""
        packets = []
        for data in self.raw():
            header, body = data[: len(self.head)], data[len(self.head) :]
            packet = parse(body, 0, len(body), fragments=True)
            assert packet.total_length == len(body)
            if header[:1] != b"\1":
                verify(body, packet)
            packets.append((packet, body))
        return packets

    def probed(self) -> Packet:
        """The probe that came, alone but for its like (there is another one each second)."""
        first, *more = [packet for packet, _ in self.received()]
        assert first.flags == ACK
        for each in more:
            assert (each.source, each.source_port, each.flags) == (first.source, first.source_port, ACK)
        return first

    def reset_by(self) -> Packet:
        """The RST that came, perhaps beside probes."""
        (found,) = [packet for packet, _ in self.received() if packet.flags & RST]
        return found

    def bodies(self) -> list[bytes]:
        """The same, as bytes."""
        return [body for _, body in self.received()]


class Pair:
    """The laptop and the NAS."""

    def __init__(self, rigs: Sequence[FlowRig], framings: tuple[Framing, Framing], mtu: int = 1500) -> None:
        self.rigs = rigs
        self.laptop = self.end(0, framings[0], who("laptop", list(LAPTOP.values())))
        self.nas = self.end(len(rigs) - 1, framings[1], who("nas", list(NAS.values())), mtu)

    def end(self, rig: int, framing: Framing, whose: TunnelContext, mtu: int = 1500) -> End:
        """A tunnel of a device at a worker, which the other workers are told of, as their parent does."""
        here = self.rigs[rig]
        number = max(each.next_tunnel for each in self.rigs)
        here.next_tunnel = number
        sock = here.tunnel(framing, whose, mtu)
        self.attached(rig, number, framing, whose, mtu)
        return End(here, self.step, sock, framing)

    def attached(self, rig: int, number: int, framing: Framing, whose: TunnelContext, mtu: int = 1500) -> None:
        """Tell the other workers of a tunnel."""
        told = control.Attached(number, rig, whose.tenant_id, whose.device_id, whose.virtual_network_id, framing, mtu)
        for other in self.rigs:
            if other.number != rig:
                other.say_parent(told)

    def step(self) -> None:
        """Until nothing moves between the workers."""
        for _ in range(3):
            for rig in self.rigs:
                rig.step(2)

    def records(self) -> list[AuditRecord]:
        """Of all workers."""
        return [record for rig in self.rigs for record in rig.records()]

    def drops(self) -> dict[str, int]:
        """Of all workers."""
        found: dict[str, int] = {}
        for rig in self.rigs:
            for reason, count in rig.drops().items():
                found[reason] = found.get(reason, 0) + count
        return found

    def balanced(self) -> bool:
        """At each worker."""
        return all(rig.balanced() for rig in self.rigs)

    def flows(self) -> int:
        """Live ones."""
        return sum(rig.worker.flow_count for rig in self.rigs)

    def passages(self) -> int:
        """Directions that some worker knows."""
        return sum(len(tunnel.passages) for rig in self.rigs for tunnel in rig.worker.tunnels.values())

    def pass_time(self, seconds: int) -> None:
        """Let so much time pass for the workers."""
        for rig in self.rigs:
            clock = rig.worker.clock
            rig.worker.clock = lambda clock=clock: clock() + seconds * 1_000_000_000  # type: ignore[misc]
        self.step()


def connect(one: FlowRig, other: FlowRig) -> None:
    """Give two workers a (new) pair, as their parent does."""
    ours, theirs = seqpacket.pair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    one.say_parent(control.Sibling(other.number), fds=[ours.fileno()])
    other.say_parent(control.Sibling(one.number), fds=[theirs.fileno()])
    ours.close()
    theirs.close()


@contextmanager
def between(
    directory: Path,
    workers: int,
    framings: tuple[Framing, Framing] = (Framing.RAW, Framing.RAW),
    settings: FlowSettings | None = None,
    mtu: int = 1500,
    policies: Sequence[PolicySource] = POLICIES,
) -> Iterator[Pair]:
    """Two devices at one worker, or each at its own."""
    rigs = [
        FlowRig(directory, settings, policies=policies, routes=ROUTES, number=number, workers=workers)
        for number in range(workers)
    ]
    if workers == 2:
        connect(*rigs)
    pair = Pair(rigs, framings, mtu)
    yield pair
    for rig in rigs:
        rig.close()
    for end in (pair.laptop, pair.nas):
        end.sock.close()


def packet(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    traffic_class: int = 0,
    df: bool = True,
    identification: int = 0,
) -> bytes:
    """An IP packet around an upper layer that is whole."""
    if len(source) == 16:
        head = ipv6.build(source, destination, protocol, len(payload), hop_limit=ttl, traffic_class=traffic_class)
        return head + payload
    head4 = bytearray(
        ipv4.build(
            source,
            destination,
            protocol,
            len(payload),
            ttl=ttl,
            traffic_class=traffic_class,
            identification=identification,
        )
    )
    if not df:
        head4[6] = 0
        head4[10:12] = b"\0\0"
        head4[10:12] = checksum(head4).to_bytes(2, "big")
    return bytes(head4) + payload


def datagram(
    source: bytes, destination: bytes, source_port: int, destination_port: int, payload: bytes = b"", **ip: int
) -> bytes:
    """A UDP packet."""
    length = 8 + len(payload)
    data = struct.pack(">HHHH", source_port, destination_port, length, 0) + payload
    check = checksum(data, pseudo_header(source, destination, UDP, length)) or 0xFFFF
    return packet(source, destination, UDP, data[:6] + check.to_bytes(2, "big") + data[8:], **ip)  # type: ignore[arg-type]


def echo(source: bytes, destination: bytes, identifier: int, *, reply: bool = False, sequence: int = 1) -> bytes:
    """A ping, or what answers it."""
    four = len(source) == 4
    kind = (icmp.ECHO_REPLY4 if reply else icmp.ECHO4) if four else (icmp.ECHO_REPLY6 if reply else icmp.ECHO6)
    return icmp_packet(bytearray(icmp.build(kind, 0, identifier << 16 | sequence)) + b"ping", source, destination)


def hop(data: bytes) -> bytes:
    """The same packet one hop later."""
    aged = bytearray(data)
    if aged[0] >> 4 == 6:
        aged[7] -= 1
        return bytes(aged)
    aged[8] -= 1
    size = (aged[0] & 15) << 2
    aged[10:12] = b"\0\0"
    aged[10:12] = checksum(aged[:size]).to_bytes(2, "big")
    return bytes(aged)


def tcp(source: bytes, destination: bytes, ports: tuple[int, int], flags: int, sequence: int = 1000, acknowledged: int = 0) -> bytes:  # fmt: skip
    """A segment."""
    return segment(source, destination, *ports, sequence, acknowledged, flags, 65535)


def connected(pair: Pair, family: int, ports: tuple[int, int] = (40000, 80)) -> None:
    """A TCP connection from the laptop to the NAS."""
    there, back = (LAPTOP[family], NAS[family]), (NAS[family], LAPTOP[family])
    pair.laptop.send(tcp(*there, ports, SYN))
    pair.nas.send(tcp(*back, ports[::-1], SYN | ACK, 5000, 1001))
    pair.laptop.send(tcp(*there, ports, ACK, 1001, 5001))
    assert len(pair.nas.raw()) == 2
    assert len(pair.laptop.raw()) == 1


def reasons(pair: Pair, event: str = "ended") -> list[str]:
    """Why flows ended, or were denied."""
    return [record.reason for record in pair.records() if record.event == event]
