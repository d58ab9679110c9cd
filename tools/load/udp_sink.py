"""Where a flood of datagrams ends: answers the first of each of --flows senders, then reads no more.

    python -m tools.load.udp_sink ADDRESS --flows 64

Prints its port, and stays until it is told to end. What arrives from then on is for the kernel to count (RcvbufErrors): a reader would take the
processor that the sender needs. Limit: IPv4.
"""

from __future__ import annotations

import argparse
import signal
import socket


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--flows", type=int, default=64)
    arguments = parser.parse_args()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((arguments.address, 0))
    print(sock.getsockname()[1], flush=True)
    seen: set[object] = set()
    while len(seen) < arguments.flows:
        data, sender = sock.recvfrom(65536)
        seen.add(sender)
        sock.sendto(data, sender)
    # The least there is, so that next to nothing waits uncounted.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    signal.pause()


if __name__ == "__main__":
    main()
