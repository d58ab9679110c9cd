"""Small packets of one WireGuard device, as many as it can encrypt; prints one JSON object.

64-byte IPv4 UDP packets in trains of 64, from our own engine. Limit: IPv4; whatever comes back is thrown away.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import socket
import time
from pathlib import Path

from falkirk.linux import trains
from falkirk.wire.datagram import Heads
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals

PAYLOAD = 36
TRAIN = 64
PATIENCE_S = 30.0


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("key", type=Path)
    parser.add_argument("server_key")
    parser.add_argument("endpoint")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=2)
    arguments = parser.parse_args()
    host, _, port = arguments.endpoint.rpartition(":")
    address, _, to = arguments.target.rpartition(":")
    sock = trains.open_socket()
    place = trains.destination(sock, host, int(port))
    node = Node(base64.b64decode(arguments.key.read_text()), rng=os.urandom)
    peer = node.add_peer(base64.b64decode(arguments.server_key), allowed=[(bytes(4), 0)], endpoint=place)
    heads = Heads(socket.inet_aton(arguments.source), socket.inet_aton(address), 20000, int(to))
    packet = bytearray(heads.size + PAYLOAD)
    heads.put(packet, 0, PAYLOAD, 64, 0)
    packets = [bytes(packet)] * TRAIN
    buffer, arrivals = memoryview(bytearray(trains.MAX_RECEIVE)), Arrivals()
    trains.send(sock, place, node.send(peer, packets[:1], time.monotonic(), time.time_ns()))
    deadline = time.monotonic() + PATIENCE_S
    while not peer.usable(time.monotonic()):
        if time.monotonic() > deadline:
            raise SystemExit("no session: the server doesn't answer")
        select.select([sock], [], [], 1)
        # Asks again where the node didn't know of the device yet, or was under load.
        node.poll(time.monotonic(), time.time_ns(), arrivals)
        _receive(node, sock, buffer, arrivals)
    began = time.monotonic()
    sent, now = 0, began
    while now < began + arguments.seconds:
        lost = trains.send(sock, place, node.send(peer, packets, now, time.time_ns()))
        sent += TRAIN - lost
        _receive(node, sock, buffer, arrivals)
        now = time.monotonic()
    print(json.dumps({"sent": sent, "seconds": now - began}))


def _receive(node: Node, sock: socket.socket, buffer: memoryview, arrivals: Arrivals) -> None:
    while (got := trains.receive(sock, buffer)) is not None:
        length, segment, address = got
        node.receive(buffer[:length], address, time.monotonic(), time.time_ns(), arrivals, segment)
    for endpoint, datagram in arrivals.datagrams:
        trains.send(sock, endpoint, (datagram,))
    arrivals.clear()


if __name__ == "__main__":
    main()
