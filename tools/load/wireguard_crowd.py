"""Many WireGuard devices that join and then say nothing; says "joined" once all have a session, and stays until it is ended.

A socket for 32 of them: the server tells them apart by their keys. Limit: no rekeying, so sessions last three minutes.
"""

from __future__ import annotations

import argparse
import base64
import os
import select
import socket
import time
from pathlib import Path

from falkirk.linux import trains
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from falkirk.wireguard.peer import Peer

AHEAD = 32
"""Handshakes under way at a time: a server under load asks for cookies."""
AGAIN_S = 6.0


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", type=Path, help="private keys, 32 bytes each")
    parser.add_argument("server_key")
    parser.add_argument("endpoint")
    arguments = parser.parse_args()
    data, server = arguments.keys.read_bytes(), base64.b64decode(arguments.server_key)
    host, _, port = arguments.endpoint.rpartition(":")
    keys = [data[at : at + 32] for at in range(0, len(data), 32)]
    buffer, arrivals = memoryview(bytearray(trains.MAX_RECEIVE)), Arrivals()
    kept = []
    for at in range(0, len(keys), AHEAD):
        sock = trains.open_socket()
        kept.append(sock)
        place = trains.destination(sock, host, int(port))
        # One engine a device: each has a key of its own. Indices tell their answers apart.
        nodes = [Node(key, rng=os.urandom) for key in keys[at : at + AHEAD]]
        peers = [node.add_peer(server, allowed=[(bytes(4), 0)], endpoint=place) for node in nodes]
        _join(sock, nodes, peers, buffer, arrivals)
    print("joined", flush=True)
    while True:
        time.sleep(60)


def _join(sock: socket.socket, nodes: list[Node], peers: list[Peer], buffer: memoryview, arrivals: Arrivals) -> None:
    asked = 0.0
    while not all(peer.usable(time.monotonic()) for peer in peers):
        now = time.monotonic()
        if now - asked > AGAIN_S:
            asked = now
            for node, peer in zip(nodes, peers, strict=True):
                if not peer.usable(now) and peer.endpoint is not None:
                    trains.send(sock, peer.endpoint, node.initiate(peer, now, time.time_ns()))
        select.select([sock], [], [], 0.1)
        while (got := trains.receive(sock, buffer)) is not None:
            length, segment, address = got
            for begin in range(0, length, segment):
                for node in nodes:
                    node.receive(buffer[begin : begin + segment], address, time.monotonic(), time.time_ns(), arrivals)
        for endpoint, datagram in arrivals.datagrams:
            trains.send(sock, endpoint, (datagram,))
        arrivals.clear()


if __name__ == "__main__":
    main()
