"""A flood of WireGuard initiations of keys that are nobody's, each with the right mac1, so that a node has to do something about every one.

    python -m tools.load.wireguard_flood KEY ADDRESS PORT --rate 20000 --seconds 10

KEY is the node's public key in base64. Prints one JSON object: what was sent, and how many cookie replies came back.

Limit: IPv4; the same few hundred initiations again and again, which a node under load can't tell from new ones.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import time

from falkirk.linux import trains
from falkirk.wireguard.messages import COOKIE, COOKIE_SIZE
from falkirk.wireguard.node import Node

DISTINCT = 256
TRAIN = 50


def initiations(key: bytes, endpoint: tuple[object, ...]) -> list[bytes]:
    """Of as many strangers."""
    made = []
    for _ in range(DISTINCT):
        node = Node(os.urandom(32), rng=os.urandom)
        made += node.initiate(node.add_peer(key, endpoint=endpoint), time.monotonic(), time.time_ns())
    return made


def main() -> None:
    """Send at the rate until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key")
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=20_000, help="initiations a second")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    sock = trains.open_socket("0.0.0.0")
    endpoint = trains.destination(sock, arguments.address, arguments.port)
    made = initiations(base64.b64decode(arguments.key), endpoint)
    buffer = memoryview(bytearray(trains.MAX_RECEIVE))
    sent = lost = replies = at = 0
    begin = time.monotonic()
    while (elapsed := time.monotonic() - begin) < arguments.seconds:
        behind = int(elapsed * arguments.rate) - sent
        if behind < TRAIN:
            time.sleep((TRAIN - behind) / arguments.rate)
            continue
        for _ in range(behind // TRAIN):
            lost += trains.send(sock, endpoint, made[at : at + TRAIN])
            sent += TRAIN
            at = (at + TRAIN) % (DISTINCT - TRAIN)
        while got := trains.receive(sock, buffer):
            if buffer[0] == COOKIE:
                replies += got[0] // COOKIE_SIZE
    seconds = time.monotonic() - begin
    print(json.dumps({"sent": sent, "per_s": round(sent / seconds), "lost": lost, "cookie_replies": replies}))


if __name__ == "__main__":
    main()
