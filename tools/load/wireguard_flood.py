"""A flood of WireGuard initiations without cookies, each with the right mac1, so that a node has to do something about every one.

    python -m tools.load.wireguard_flood KEY ADDRESS PORT --rate 20000 --seconds 10

KEY is the node's public key in base64. The initiations are of keys that are nobody's, or with --device FILE (a private key in base64) all of that device.
They leave one by one, from each of --sources in turn, so that nothing on the way joins them. Prints "begun" with the first, and at the end, or at
SIGTERM, one JSON object: what was sent, how many cookie replies came back, and the processor time of both.

Limit: IPv4; the same few hundred initiations again and again, which a node under load can't tell from new ones.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import signal
import time
from pathlib import Path

from falkirk.linux import trains
from falkirk.wireguard.messages import COOKIE, COOKIE_SIZE
from falkirk.wireguard.node import Node

DISTINCT = 256
APART_S = 6.0
"""Between two initiations of one device: a node of ours makes no more."""
BURST = 20
"""Initiations that leave at once: one every millisecond would take a system call to wait for each."""


def initiations(key: bytes, endpoint: trains.Address, device: bytes | None = None) -> list[bytes]:
    """Of as many strangers, or of one device at as many times."""
    made: list[bytes] = []
    if device is not None:
        node = Node(device, rng=os.urandom)
        peer = node.add_peer(key, endpoint=endpoint)
    for number in range(DISTINCT):
        if device is None:
            node = Node(os.urandom(32), rng=os.urandom)
            peer = node.add_peer(key, endpoint=endpoint)
        made += node.initiate(peer, number * APART_S, time.time_ns())
    return made


def main() -> None:
    """Send at the rate until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key")
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=20_000, help="initiations a second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--sources", default="0.0.0.0", help="addresses of ours, with commas")
    parser.add_argument("--device", type=Path)
    arguments = parser.parse_args()
    socks = [trains.open_socket(source) for source in arguments.sources.split(",")]
    endpoint = trains.destination(socks[0], arguments.address, arguments.port)
    device = base64.b64decode(arguments.device.read_text()) if arguments.device else None
    made = initiations(base64.b64decode(arguments.key), endpoint, device)
    sends = itertools.cycle([sock.sendto for sock in socks])
    buffer = memoryview(bytearray(trains.MAX_RECEIVE))
    sent = lost = replies = 0
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    print("begun", flush=True)
    used = time.process_time()
    begin = time.monotonic()
    while (elapsed := time.monotonic() - begin) < arguments.seconds and not told:
        behind = int(elapsed * arguments.rate) - sent
        if behind < BURST:
            time.sleep((BURST - behind) / arguments.rate)
            continue
        for _ in range(behind):
            try:
                next(sends)(made[sent % DISTINCT], endpoint)
            except OSError:
                lost += 1
            sent += 1
        for sock in socks:
            while got := trains.receive(sock, buffer):
                if buffer[0] == COOKIE:
                    replies += got[0] // COOKIE_SIZE
    seconds = time.monotonic() - begin
    result = {
        "sent": sent,
        "per_s": round(sent / seconds),
        "lost": lost,
        "cookie_replies": replies,
        "cpu": round((time.process_time() - used) / seconds, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
