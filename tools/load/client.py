"""Measures an echo server from where this runs; prints one JSON object.

    connections   connect, send 1 byte, read it, close; --parallel at a time, over all targets in turn
    rtt           64 bytes there and back on one connection
    messages      64 bytes there and back on --parallel connections at once: small packets, one a message
    idle          --parallel connections, opened one after another, a message exchanged on each; then nothing

The first 20 % of the time warm up and aren't counted. The client closes first. TCP_NODELAY is set.
Limit: one process, so at most one core of load; errors are counted and shown, never hidden in a rate.
"""

from __future__ import annotations

import argparse
import errno
import json
import select
import socket
import time
from typing import Any

MESSAGE = b"\xfa" * 64
WARM_UP = 0.2
WRITE = select.EPOLLOUT
READ = select.EPOLLIN
Target = tuple[int, tuple[str, int]]


def targets(text: str) -> list[Target]:
    """`address:port,[address]:port,...` -> family and socket address."""
    found: list[Target] = []
    for item in text.split(","):
        host, _, port = item.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        found.append((family, (host.strip("[]"), int(port))))
    return found


def open_connection(target: Target) -> socket.socket:
    """A non-blocking connection under way."""
    sock = socket.socket(target[0])
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    code = sock.connect_ex(target[1])
    if code not in {0, errno.EINPROGRESS}:
        sock.close()
        raise OSError(code, errno.errorcode.get(code, "?"))
    return sock


def connections(where: list[Target], seconds: float, parallel: int) -> dict[str, Any]:
    """Connections a second."""
    poll = select.epoll()
    live: dict[int, socket.socket] = {}
    done = failed = total = turn = 0
    start = time.monotonic()
    begin, end = start + seconds * WARM_UP, start + seconds
    now = start
    while now < end:
        while len(live) < parallel:
            sock = open_connection(where[turn % len(where)])
            turn += 1
            live[sock.fileno()] = sock
            poll.register(sock.fileno(), WRITE)
        for descriptor, events in poll.poll(0.5):
            sock = live[descriptor]
            try:
                if events & WRITE and not events & (select.EPOLLERR | select.EPOLLHUP):
                    sock.send(b"x")
                    poll.modify(descriptor, READ)
                    continue
                good = sock.recv(16) == b"x"
            except OSError:
                good = False
            del live[descriptor]
            sock.close()
            total += good
            if now >= begin:
                done += good
                failed += not good
        now = time.monotonic()
    for sock in live.values():
        sock.close()
    return {"per_s": done / (now - begin), "failed": failed, "total": total}


def connect(target: Target) -> socket.socket:
    """A blocking connection; raises OSError after 10 s."""
    sock = socket.socket(target[0])
    sock.settimeout(10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect(target[1])
    return sock


def exchange(sock: socket.socket) -> None:
    """One message there and back."""
    sock.sendall(MESSAGE)
    left = len(MESSAGE)
    while left:
        data = sock.recv(left)
        if not data:
            raise ConnectionResetError("closed by the server")
        left -= len(data)


def rtt(where: list[Target], seconds: float, parallel: int) -> dict[str, Any]:
    """Round trips of one connection, microseconds."""
    times = []
    with connect(where[0]) as sock:
        start = time.monotonic()
        begin, end = start + seconds * WARM_UP, start + seconds
        while (now := time.monotonic()) < end:
            before = time.perf_counter_ns()
            exchange(sock)
            if now >= begin:
                times.append((time.perf_counter_ns() - before) / 1000)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100], "samples": len(times)}


def messages(where: list[Target], seconds: float, parallel: int) -> dict[str, Any]:
    """Messages there and back a second, over all connections."""
    poll = select.epoll()
    live = {sock.fileno(): sock for sock in (connect(where[i % len(where)]) for i in range(parallel))}
    for descriptor, sock in live.items():
        poll.register(descriptor, READ)
        sock.sendall(MESSAGE)
    got = 0
    start = now = time.monotonic()
    begin, end = start + seconds * WARM_UP, start + seconds
    while now < end:
        for descriptor, _ in poll.poll(0.5):
            data = live[descriptor].recv(len(MESSAGE))
            if not data:
                raise ConnectionResetError("closed by the server")
            # A short read leaves the rest for the next turn; as many bytes as were read go out again.
            live[descriptor].sendall(data)
            if now >= begin:
                got += len(data)
        now = time.monotonic()
    for sock in live.values():
        sock.close()
    return {"per_s": got / len(MESSAGE) / (now - begin)}


def idle(where: list[Target], seconds: float, parallel: int) -> dict[str, Any]:
    """Open --parallel connections, a few at a time, say so, and hold them for the time, idle."""
    live = []
    for number in range(parallel):
        sock = connect(where[number % len(where)])
        exchange(sock)
        live.append(sock)
    print(f"open {len(live)}", flush=True)
    time.sleep(seconds)
    lost = 0
    for sock in live:
        sock.setblocking(False)
        try:
            lost += not sock.recv(1)
        except BlockingIOError:
            pass
        except OSError:
            lost += 1
        sock.close()
    return {"open": len(live), "lost": lost}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {"connections": connections, "rtt": rtt, "messages": messages, "idle": idle}
    parser.add_argument("mode", choices=modes)
    parser.add_argument("targets", type=targets)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--parallel", type=int, default=16)
    arguments = parser.parse_args()
    print(json.dumps(modes[arguments.mode](arguments.targets, arguments.seconds, arguments.parallel)))


if __name__ == "__main__":
    main()
