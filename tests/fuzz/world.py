"""Everything around a flow worker under fuzz: producers, an upgrader in several moods, a kernel behind the TUN devices.

Every flow's payload is marked with its tunnel. What reaches a slot tells whose slot it is; what the kernel says to that slot
is marked likewise, and must come out of that tunnel only. None of this looks into the worker.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import Counter
from pathlib import Path
from random import Random

from falkirk.decide import rules as rule_table
from falkirk.flow.session import Session
from falkirk.flow.settings import FlowSettings
from falkirk.flow.table import TcpLift
from falkirk.wire.context import Framing
from falkirk.wire.handover import (
    Abort,
    Closed,
    Connected,
    DialFailed,
    Message,
    OpenSocket,
    Prepare,
    SocketFailed,
    SocketOpened,
    TunnelClosed,
    encode,
)
from falkirk.wire.packet import parse, verify
from tests.flow_rig import OTHER_TENANT, PORT, TENANT, FlowRig, context, read
from tests.fuzz.mutants import ACK, FIN, GSO_SIZE, MAGIC, NEVER, PSH, RST, SYN, VNET, ZERO, Mutator, Sender, fix, tcp

RULES = [
    rule_table.RuleSource("no-telnet", "net.port == 23", "deny"),
    rule_table.RuleSource("all", "net.port != 25", "allow"),
]
POLICIES = tuple(rule_table.PolicySource(tenant, "main", 0, RULES) for tenant in (TENANT, OTHER_TENANT))
PHONE4 = bytes([100, 96, 0, 3])
PEOPLE = (
    (Framing.RAW, context()),
    (Framing.VNET, context()),
    (Framing.RAW, context(tenant=OTHER_TENANT)),
    (Framing.VNET, context(tenant=OTHER_TENANT)),
    (Framing.RAW, context(device="phone", addresses=(PHONE4,), max_flows=200)),
)
ERRNOS = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EACCES, 0, -1)
SLOT_BITS = 0xFFFFFF


class Producer:
    """One tunnel's producer."""

    def __init__(self, world: World, framing: Framing, who: int) -> None:
        self.world, self.framing, self.who = world, framing, who
        self.vnet = framing is Framing.VNET
        self.mark = MAGIC + world.chance.randbytes(4)
        world.marks.add(self.mark)
        self.addresses = PEOPLE[who][1].addresses
        self.number = world.rig.next_tunnel
        self.sock = world.rig.tunnel(framing, PEOPLE[who][1])
        self.senders: dict[tuple[int, bytes], Sender] = {}
        self.recent: list[bytes] = []
        self.waiting: list[bytes] = []
        # The same ports in every tunnel: only the tunnel tells the flows apart.
        self._port = 10_000

    def sender(self) -> Sender:
        """A flow of this tunnel."""
        chance = self.world.chance
        if len(self.senders) < 12:
            self._port = self._port + 1 if self._port < 60_000 else 10_000
            source = chance.choice(self.addresses)
            self.senders[self._port, source] = Sender(chance, source, self.mark, self._port)
        return chance.choice(list(self.senders.values()))

    def send(self, data: bytes) -> None:
        """Send it, now or as soon as there is room."""
        if not self.waiting:
            try:
                self.sock.send(data)
            except BlockingIOError:
                self.waiting.append(data)
        else:
            self.waiting.append(data)

    def flush(self) -> None:
        """Send what waits."""
        waiting, self.waiting = self.waiting, []
        for data in waiting:
            self.send(data)


def _server(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    return sock


class World:
    """The rig with its surroundings; `close` gives everything back."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.chance = Random(seed)
        self.rig = FlowRig(directory, FlowSettings(icmp_per_second=200), policies=POLICIES)
        self.offset = 0
        self.rig.worker.clock = lambda: time.monotonic_ns() + self.offset
        self.mutator = Mutator(self.chance)
        self.marks: set[bytes] = set()
        """Of all tunnels that there ever were."""
        self.producers = [Producer(self, framing, who) for who, (framing, _) in enumerate(PEOPLE)]
        self.owners: dict[tuple[Framing, int], bytes] = {}
        """Whose mark came to a slot first."""
        self.connected: dict[int, bytes] = {}
        self.dialling: list[Prepare] = []
        self.opening: list[OpenSocket] = []
        self.far = {size: _server(family) for size, family in ((4, socket.AF_INET), (16, socket.AF_INET6))}
        """Where every session leads to, by the length of its addresses."""
        self.mutants = 0
        self.seen: Counter[str] = Counter()

    def close(self) -> None:
        """Give everything back."""
        for producer in self.producers:
            producer.sock.close()
        for far in self.far.values():
            far.close()
        self.rig.close()

    # producers

    def speak(self, mutants: int) -> None:
        """One flow says one thing: the valid packet, and mutants of it around it."""
        chance = self.chance
        producer = chance.choice(self.producers)
        sender = producer.sender()
        said = sender.next()
        if said is None:
            producer.senders = {key: other for key, other in producer.senders.items() if other is not sender}
            return
        packet, big = said
        big = big and producer.vnet
        if not producer.vnet and len(packet) > 1500:
            del packet[1500:]
            packet[2:4] = (1500).to_bytes(2, "big") if packet[0] == 0x45 else packet[2:4]
            if packet[0] != 0x45:
                packet[4:6] = (1460).to_bytes(2, "big")
            fix(packet)
        producer.recent = [*producer.recent[-8:], bytes(packet)]
        datagrams = [
            self.mutator.mutant(packet, vnet=producer.vnet, big=big, others=producer.recent) for _ in range(mutants)
        ]
        self.mutants += mutants
        if not big and chance.random() < 0.1:
            datagrams += self.mutator.fragments(packet, vnet=producer.vnet)
        else:
            datagrams.insert(chance.randrange(mutants + 1), self.mutator.framed(packet, vnet=producer.vnet, big=big))
        for data in datagrams:
            producer.send(data)

    def listen(self) -> None:
        """Read what came back to the producers: each gets its own, and it is well made."""
        for producer in self.producers:
            for data in read(producer.sock):
                packet = data[10:] if producer.vnet else data
                at = packet.find(MAGIC)
                # A mark that a mutant garbled is nobody's.
                others = self.marks - {producer.mark}
                assert at < 0 or packet[at : at + 8] not in others, "a packet of another tunnel"
                self.seen["came back"] += 1
                parsed = parse(packet, 0, len(packet), fragments=True)
                assert parsed.destination in producer.addresses
                assert parsed.total_length == len(packet)
                if not producer.vnet or data[:10] == ZERO:
                    verify(packet, parsed)
                sender = producer.senders.get((parsed.destination_port, parsed.destination))
                if sender is not None and parsed.protocol == 6:
                    sender.down = packet[:300]
                    sender.acknowledgment = (parsed.sequence + parsed.segment_length) % (1 << 32)

    def replace(self, producer: Producer) -> None:
        """A tunnel ends, with packets still in it, and another comes in its place."""
        producer.send(b"\x45")
        if self.chance.random() < 0.5:
            producer.sock.close()
        else:
            self.rig.say_onramp(TunnelClosed(producer.number, "removed"))
            producer.sock.close()
        self.seen["tunnels closed"] += 1
        self.producers[self.producers.index(producer)] = Producer(self, producer.framing, producer.who)

    # upgrader

    def dial(self) -> None:
        """Answer what the worker asked, in time, late, wrongly, or not at all."""
        chance = self.chance
        answers: list[Message] = []
        for message in self.rig.asked():
            if isinstance(message, Prepare):
                self.dialling.append(message)
                self.owners.pop(self._slot(message.slot), None)
            elif isinstance(message, Abort) and self.connected.pop(message.slot, None) is not None:
                answers.append(Closed(message.slot, "aborted", 0, 0))
            elif isinstance(message, OpenSocket):
                self.opening.append(message)
        self._open()
        later = []
        for prepare in self.dialling:
            mood = chance.random()
            if mood < 0.25:
                later.append(prepare)
            elif mood < 0.85:
                self.connected[prepare.slot] = prepare.flow_id
                answers.append(Connected(prepare.slot, 1))
            elif mood < 0.95:
                answers.append(DialFailed(prepare.slot, chance.choice(ERRNOS), 1))
            elif mood < 0.97:
                answers.append(Closed(prepare.slot, chance.choice(("aborted", "idle", "never_opened", "")), 0, 0))
            elif mood < 0.98:
                self.connected[prepare.slot] = prepare.flow_id
                answers += [Connected(prepare.slot, 1), Connected(prepare.slot, 2), DialFailed(prepare.slot, 1, 1)]
        self.dialling = later
        for slot in chance.sample(sorted(self.connected), min(len(self.connected), chance.randrange(4))):
            del self.connected[slot]
            reason = chance.choice(("finished", "finished", "upstream_reset", "client_reset", "idle", "relay_error"))
            answers.append(Closed(slot, reason, 1, 1))
        if chance.random() < 0.05:
            answers.append(chance.choice((Closed(999_999, "x", 0, 0), Connected(-3, 1), DialFailed(1 << 33, 1, 1))))
        for start in range(0, len(answers), 64):
            assert self.rig.upgrader is not None
            self.rig.upgrader.send(encode(answers[start : start + 64]))

    def _open(self) -> None:
        """The same for sockets."""
        chance = self.chance
        later = []
        for wish in self.opening:
            mood = chance.random()
            if mood < 0.25:
                later.append(wish)
            elif mood < 0.85:
                far = self.far[len(wish.destination)]
                sock = socket.socket(far.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                sock.connect(far.getsockname())
                self.seen["sockets given"] += 1
                self.rig.give_socket(wish, sock)
            elif mood < 0.95:
                code = chance.choice((*ERRNOS, errno.EMFILE, errno.EADDRINUSE, errno.EPERM))
                self.rig.say_upgrader(SocketFailed(wish.token, code))
        self.opening = later
        if chance.random() < 0.05:
            self.rig.say_upgrader(SocketFailed(999_999, 1), SocketOpened(1 << 33, 1, False))

    def world(self) -> None:
        """What left by a session's socket comes back, with more behind it."""
        for far in self.far.values():
            while True:
                try:
                    data, peer = far.recvfrom(1 << 16)
                except BlockingIOError:
                    break
                self.seen["reached the world"] += 1
                assert NEVER not in data, "what must never pass has passed"
                far.sendto(data[:1400] + bytes(self.chance.choice((0, 10, 1000, 3000))), peer)

    # the private namespace's kernel

    def _slot(self, slot: int) -> tuple[Framing, int]:
        return (Framing.RAW if slot >> 22 & 2 else Framing.VNET), slot & SLOT_BITS

    def kernel(self) -> None:
        """Read both devices, look at whose packets came to which slot, and answer as a TCP would."""
        for framing, tun in self.rig.tun.items():
            for data in read(tun):
                self.seen["reached the kernel"] += 1
                assert NEVER not in data, "what must never pass has passed"
                self._segment(framing, tun, data)

    def _segment(self, framing: Framing, tun: socket.socket, data: bytes) -> None:
        packet = memoryview(data)[10:]
        if packet[0] >> 4 == 4:
            l4, protocol, slot, listener = (packet[0] & 15) << 2, packet[9], data[22:26], data[26:30]
        else:
            l4, protocol, slot, listener = 40, packet[6], data[18:34], data[34:50]
        assert packet[0] in (0x45, *range(0x60, 0x70)), "an option came through"
        index = int.from_bytes(slot[-3:], "big")
        assert int.from_bytes(listener[-3:], "big") == (0x800001 if framing is Framing.RAW else 1)
        at = data.find(MAGIC)
        if at >= 0 and len(data) >= at + 8:
            tag = data[at : at + 8]
            if tag in self.marks:
                assert self.owners.setdefault((framing, index), tag) == tag, "a slot of another tunnel"
        if protocol != 6:
            assert data[:10] == ZERO
            self.seen["icmp errors"] += 1
            return
        ports = struct.unpack_from(">HH", packet, l4)
        assert ports[1] == PORT
        header = VNET.unpack_from(data)
        assert header[0] in (0, 1)
        assert header[1] in (0, 1, 4)
        if framing is Framing.RAW:
            assert header == (0,) * 6
        self._answer(framing, tun, (listener, slot), ports[0], packet[l4:])

    def _answer(
        self, framing: Framing, tun: socket.socket, addresses: tuple[bytes, bytes], port: int, segment: memoryview
    ) -> None:
        chance = self.chance
        sequence, acknowledgment = struct.unpack_from(">II", segment, 4)
        flags = segment[13]
        if chance.random() < 0.1 or flags & RST:
            return
        index = int.from_bytes(addresses[1][-3:], "big")
        payload = b""
        if flags & SYN:
            reply = SYN | ACK
        elif flags & FIN:
            reply = FIN | ACK
        else:
            reply = ACK | PSH
            owner = self.owners.get((framing, index))
            payload = (owner or b"") + bytes(chance.choice((0, 0, 10, 100, 1400)))
        if chance.random() < 0.03:
            reply = RST | ACK
        ack = (sequence + max(len(segment) - (segment[12] >> 4 << 2), 0) + (flags & 1) + (flags >> 1 & 1)) % (1 << 32)
        big = framing is Framing.VNET and len(payload) > 1000
        if big:
            payload *= 3
        packet = tcp(*addresses, (PORT, port), (acknowledgment, ack), reply, payload)
        head = ZERO
        if big or (framing is Framing.VNET and chance.random() < 0.5):
            four = len(addresses[0]) == 4
            fix(packet, partial=True)
            upper = 20 if four else 40
            head = VNET.pack(1, (1 if four else 4) if big else 0, upper + 20, GSO_SIZE if big else 0, upper, 16)
        self.device(tun, head + packet)
        if chance.random() < 0.02:
            stray = chance.choice(
                (
                    tcp(*addresses, (PORT, port ^ 1), (1, 1), ACK),
                    tcp(addresses[0], addresses[1][:-3] + b"\x3f\xff\xfe", (PORT, port), (1, 1), RST),
                    bytearray.fromhex("600000000008003a") + bytes(40),
                )
            )
            self.device(tun, ZERO + stray)

    def device(self, tun: socket.socket, data: bytes) -> None:
        """The kernel says something, where there is room."""
        try:
            tun.send(data)
        except BlockingIOError:
            self.seen["device full"] += 1

    # the loop

    def settle(self, limit: int) -> int:
        """Turn until nothing is ready; returns how many turns that took. More than `limit` is a busy loop."""
        worker = self.rig.worker
        for turn in range(limit):
            worker.turn(0)
            if not worker._epoll.poll(0):
                return turn + 1
        raise AssertionError(f"still busy after {limit} turns")

    def held(self) -> int:
        """Packets that wait for their upstream."""
        flows = [flow for tunnel in self.rig.worker.tunnels.values() for flow in tunnel.flows.values()]
        packets = sum(len(flow.held or ()) for flow in flows if isinstance(flow, Session))
        return packets + sum(flow.held is not None for flow in flows if isinstance(flow, TcpLift))

    def balance(self) -> int:
        """received - forwarded - answered - dropped - held: 0."""
        rig = self.rig
        return (
            rig.count("received")
            - rig.count("forwarded")
            - rig.count("answered")
            - sum(rig.drops().values())
            - self.held()
        )

    def round(self, flows: int) -> None:
        """Some flows speak; everybody else reacts."""
        for _ in range(flows):
            self.speak(4)
        if self.chance.random() < 0.05:
            self.replace(self.chance.choice(self.producers))
        if self.chance.random() < 0.1:
            self.offset += self.chance.choice((1, 3, 100, 300)) * 1_000_000_000
        for producer in self.producers:
            producer.flush()
        self.settle(200)
        self.dial()
        self.kernel()
        self.world()
        self.settle(200)
        self.listen()
