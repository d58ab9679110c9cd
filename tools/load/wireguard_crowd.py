"""Many WireGuard devices that join and then say nothing but keepalives; says "joined" once all have a session, and stays until it is ended.

A socket for 32 of them: the server tells them apart by their keys. A keepalive of each every --keepalive seconds (0: none), spread evenly, and a handshake
where its session asks for one. Limit: a device whose handshake isn't answered asks again after six seconds, while they join only.
"""

from __future__ import annotations

import argparse
import base64
import os
import select
import time
from collections.abc import Sequence
from pathlib import Path

from falkirk.linux import trains
from falkirk.wireguard.messages import HEADER, INITIATION, RESPONSE, RESPONSE_HEADER
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import Peer

AHEAD = 32
"""Devices of a socket, whose handshakes are under way at a time: a server under load asks for cookies."""
AGAIN_S = 6.0
SLICE_S = 0.05


class Device:
    """One engine a device: each has a key of its own."""

    __slots__ = ("node", "peer")

    def __init__(self, key: bytes, server: bytes, place: trains.Address) -> None:
        self.node = Node(key, rng=os.urandom)
        self.peer: Peer = self.node.add_peer(server, allowed=[(bytes(4), 0)], endpoint=place)


class Group:
    """The devices of a socket."""

    def __init__(self, keys: Sequence[bytes], server: bytes, host: str, port: int) -> None:
        self.sock = trains.open_socket()
        self._place = trains.destination(self.sock, host, port)
        self.devices = [Device(key, server, self._place) for key in keys]
        self._asking: dict[int, Device] = {}
        """By the index of the initiation that isn't answered yet."""

    def send(self, device: Device, datagrams: Sequence[bytes]) -> None:
        """What a device's engine gave."""
        for datagram in datagrams:
            kind, index = HEADER.unpack_from(datagram)
            if kind == INITIATION:
                self._asking[index] = device
        trains.send(self.sock, self._place, datagrams)

    def receive(self, buffer: memoryview, arrivals: Arrivals) -> None:
        """Responses to who asked; nothing else is answered, as nothing else comes to devices that are idle."""
        while (got := trains.receive(self.sock, buffer)) is not None:
            length, segment, address = got
            now, wall = time.monotonic(), time.time_ns()
            for begin in range(0, length, segment):
                datagram = buffer[begin : begin + segment]
                kind, index = RESPONSE_HEADER.unpack_from(datagram)[::2]
                device = self._asking.pop(index, None) if kind == RESPONSE else None
                if device is not None:
                    device.node.receive(datagram, address, now, wall, arrivals)
                    self.send(device, [datagram for _, datagram in arrivals.datagrams])
                    arrivals.clear()

    def join(self, buffer: memoryview, arrivals: Arrivals) -> None:
        """Until all have a session."""
        asked = 0.0
        while True:
            now = time.monotonic()
            waiting = [device for device in self.devices if not device.peer.usable(now)]
            if not waiting:
                return
            if now - asked > AGAIN_S:
                asked = now
                for device in waiting:
                    self.send(device, device.node.initiate(device.peer, now, time.time_ns()))
            select.select([self.sock], [], [], 0.1)
            self.receive(buffer, arrivals)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path, help="private keys, 32 bytes each")
    parser.add_argument("server_key")
    parser.add_argument("endpoint")
    parser.add_argument("--keepalive", type=float, default=0.0)
    arguments = parser.parse_args()
    data, server = arguments.keys.read_bytes(), base64.b64decode(arguments.server_key)
    host, _, port = arguments.endpoint.rpartition(":")
    keys = [data[at : at + 32] for at in range(0, len(data), 32)]
    buffer, arrivals = memoryview(bytearray(trains.MAX_RECEIVE)), Arrivals()
    groups: list[Group] = []
    for at in range(0, len(keys), AHEAD):
        groups.append(Group(keys[at : at + AHEAD], server, host, int(port)))
        groups[-1].join(buffer, arrivals)
    print("joined", flush=True)
    _stay(groups, len(keys), arguments.keepalive, buffer, arrivals)


def _stay(groups: list[Group], count: int, keepalive: float, buffer: memoryview, arrivals: Arrivals) -> None:
    everyone = [(group, device) for group in groups for device in group.devices]
    begin, sent = time.monotonic(), 0
    while True:
        time.sleep(SLICE_S if keepalive else 60)
        now, wall = time.monotonic(), time.time_ns()
        due = int((now - begin) * count / keepalive) - sent if keepalive else 0
        for _ in range(due):
            group, device = everyone[sent % count]
            sent += 1
            group.send(device, device.node.send(device.peer, (b"",), now, wall))
        for group in groups:
            group.receive(buffer, arrivals)


if __name__ == "__main__":
    main()
