"""Small packets, as many as a tunnel takes: a producer of a raw connected tunnel that speaks TCP and UDP by hand; prints one JSON object.

With --kind ack it opens --flows connections to the targets (SYN, SYN-ACK, ACK), then sends pure ACKs of 64 bytes (24 of them options). Nothing can join
pure ACKs, so each one goes the whole way by itself: tunnel, flow, NAT, device, kernel. With --kind udp it has the targets answer one datagram of each
flow, then sends UDP packets of 64 bytes, whose payloads are all different.

--run packets of a flow follow each other, then as many of the next one; --packed go to a datagram, for --seconds and until the last one has left.

Limit: IPv4; whatever comes back after the beginning is thrown away.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import json
import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterator

from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.datagram import Heads
from falkirk.wire.packet import Packet, parse, split
from falkirk.wire.protocol import TCP, UDP

SIOCOUTQ = 0x5411
PATIENCE_S = 20.0
PADDING = b"\x01" * 24
SYN, ACK = 2, 16
DATA = 36
"""Bytes of a UDP packet's payload: 64 with the headers."""
TRIES_S = 0.5


def segment(
    ends: tuple[bytes, int, bytes, int], sequence: int, acknowledgment: int, flags: int, options: bytes
) -> bytes:
    """A TCP segment without payload; `ends` are addresses and ports, source first."""
    source, source_port, destination, destination_port = ends
    offset = (20 + len(options)) << 2
    tcp = bytearray(
        struct.pack(">HHIIBBHHH", source_port, destination_port, sequence, acknowledgment, offset, flags, 65535, 0, 0)
    )
    tcp += options
    tcp[16:18] = checksum(tcp, pseudo_header(source, destination, TCP, len(tcp))).to_bytes(2, "big")
    head = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, TCP, 0)) + source + destination
    head[10:12] = checksum(head).to_bytes(2, "big")
    return bytes(head + tcp)


def datagram(heads: Heads, payload: bytes) -> bytes:
    """A UDP packet."""
    packet = bytearray(heads.size) + payload
    heads.put(packet, 0, len(payload), 64, 0)
    return bytes(packet)


class Producer:
    """An admitted tunnel."""

    def __init__(self, path: str, tenant: str, device: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(path)
        context = {"v": 1, "tenant": tenant, "device": device, "framing": "raw", "packed": True}
        self.socket.send(json.dumps(context).encode())
        answer = json.loads(self.socket.recv(16384))
        if "admitted" not in answer:
            raise SystemExit(f"not admitted: {answer}")
        self.address = next(socket.inet_aton(one) for one in answer["admitted"]["addresses"] if ":" not in one)

    def packets(self) -> Iterator[Packet]:
        """Those of the next datagram."""
        data = self.socket.recv(65536)
        for at, length in split(data, len(data)):
            yield parse(data, at, length)

    def connect(self, targets: list[tuple[bytes, int]], flows: int, run: int) -> list[bytes]:
        """Open that many connections; `run` small packets of each, one flow after another."""
        waiting = {20000 + number: targets[number % len(targets)] for number in range(flows)}
        for port, (address, to) in waiting.items():
            self.socket.send(segment((self.address, port, address, to), 1000, 0, SYN, b""))
        made: list[bytes] = []
        deadline = time.monotonic() + PATIENCE_S
        while waiting:
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(waiting)} connections weren't opened")
            for packet in self.packets():
                target = waiting.get(packet.destination_port)
                if packet.flags != SYN | ACK or target is None:
                    continue
                del waiting[packet.destination_port]
                ends = (self.address, packet.destination_port, *target)
                self.socket.send(segment(ends, 1001, packet.sequence + 1 & 0xFFFFFFFF, ACK, b""))
                made += [segment(ends, 1001, packet.sequence + 1 & 0xFFFFFFFF, ACK, PADDING)] * run
        return made

    def converse(self, targets: list[tuple[bytes, int]], flows: int, run: int) -> list[bytes]:
        """The same for UDP: each flow has been answered once, so that it is known that its packets arrive."""
        heads = {
            20000 + number: Heads(
                self.address, targets[number % len(targets)][0], 20000 + number, targets[number % len(targets)][1]
            )
            for number in range(flows)
        }
        waiting = set(heads)
        deadline = time.monotonic() + PATIENCE_S
        while waiting:
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(waiting)} flows weren't answered")
            for port in waiting:
                self.socket.send(datagram(heads[port], bytes(DATA)))
            while waiting and select.select([self.socket], [], [], TRIES_S)[0]:
                waiting -= {packet.destination_port for packet in self.packets() if packet.protocol == UDP}
        return [datagram(one, os.urandom(DATA)) for one in heads.values() for _ in range(run)]

    def flood(self, packets: list[bytes], packed: int, seconds: float) -> tuple[int, float]:
        """Send them over and over; how many, and how long it took until they had been read."""
        # As many datagrams as it takes until one begins with the first packet again.
        total = math.lcm(len(packets), packed)
        datagrams = [
            b"".join(packets[number % len(packets)] for number in range(at, at + packed))
            for at in range(0, total, packed)
        ]
        self.socket.settimeout(None)
        send, number, turn = self.socket.send, 0, 0
        start = time.monotonic()
        end = start + seconds
        while time.monotonic() < end:
            for _ in range(16):
                send(datagrams[turn])
                turn = (turn + 1) % len(datagrams)
            number += 16 * packed
            while select.select([self.socket], [], [], 0)[0]:
                self.socket.recv(65536)
        left = array.array("i", [1])
        while left[0]:
            fcntl.ioctl(self.socket, SIOCOUTQ, left)
        return number, time.monotonic() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tunnel", help="the on-ramp's socket")
    parser.add_argument("targets", help="address:port,...")
    parser.add_argument("--tenant", default="acme")
    parser.add_argument("--device", default="laptop")
    parser.add_argument("--kind", choices=("ack", "udp"), default="ack")
    parser.add_argument("--flows", type=int, default=64)
    parser.add_argument("--run", type=int, default=1)
    parser.add_argument("--packed", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    targets = []
    for one in arguments.targets.split(","):
        host, _, port = one.rpartition(":")
        targets.append((socket.inet_aton(host), int(port)))
    producer = Producer(arguments.tunnel, arguments.tenant, arguments.device)
    begin = producer.connect if arguments.kind == "ack" else producer.converse
    packets = begin(targets, arguments.flows, arguments.run)
    sent, took = producer.flood(packets, arguments.packed, arguments.seconds)
    print(json.dumps({"sent": sent, "seconds": took, "per_s": sent / took, "size": len(packets[0])}))


if __name__ == "__main__":
    main()
