"""Echoes whatever it gets, on several ports, in one epoll loop; closes after the other side has.

So the side that opens a connection is always the one that closes it first and keeps the TIME_WAIT, whichever way the
connection came: loopback, Falkirk, pasta or slirp4netns are measured under the same rule.
Limit: echoes of at most 64 KiB a turn; a peer that doesn't read is dropped, since this is a measuring instrument.
"""

from __future__ import annotations

import argparse
import select
import socket

READ = select.EPOLLIN | select.EPOLLRDHUP


def listeners(ports: list[int]) -> dict[int, socket.socket]:
    """One listener a port, on all addresses of both families, by descriptor."""
    found = {}
    for port in ports:
        sock = socket.socket(socket.AF_INET6)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        sock.listen(1024)
        sock.setblocking(False)
        found[sock.fileno()] = sock
    return found


def serve(listening: dict[int, socket.socket]) -> None:
    """Never returns."""
    poll = select.epoll()
    for descriptor in listening:
        poll.register(descriptor, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        for descriptor, _ in poll.poll():
            listener = listening.get(descriptor)
            if listener is not None:
                accept(listener, poll, connections)
                continue
            connection = connections[descriptor]
            try:
                data = connection.recv(65536)
                if data and connection.send(data) == len(data):
                    continue
            except BlockingIOError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                pass
            del connections[descriptor]
            connection.close()


def accept(listener: socket.socket, poll: select.epoll, connections: dict[int, socket.socket]) -> None:
    """Take every waiting connection."""
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[connection.fileno()] = connection
        poll.register(connection.fileno(), READ)


def main() -> None:
    """Serve until killed; "ready" on standard output once connections are taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ports", type=int, nargs="+")
    listening = listeners(parser.parse_args().ports)
    print("ready", flush=True)
    serve(listening)


if __name__ == "__main__":
    main()
