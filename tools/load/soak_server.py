"""Answers the soak: echoes datagrams; on a connection echoes the first bytes, and closes it first.

Who closes first keeps TIME-WAIT (RFC 9293 3.6.1): here that is the server, so that the node's own ports aren't used up by a million
connections in a row. Limit: IPv4; one loop, one address.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket


def serve(datagrams: socket.socket, listener: socket.socket) -> None:
    """Never returns."""
    poll = select.epoll()
    for sock in (datagrams, listener):
        sock.setblocking(False)
        poll.register(sock.fileno(), select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == datagrams.fileno():
                _echo(datagrams)
            elif descriptor == listener.fileno():
                _accept(listener, poll, connections)
            else:
                connection = connections.pop(descriptor)
                # The client may have been faster.
                with contextlib.suppress(OSError):
                    connection.send(connection.recv(65536))
                connection.close()


def _echo(datagrams: socket.socket) -> None:
    try:
        while True:
            data, peer = datagrams.recvfrom(65536)
            datagrams.sendto(data, peer)
    except BlockingIOError:
        return
    except ConnectionRefusedError:
        # An ICMP error about an answer.
        return


def _accept(listener: socket.socket, poll: select.epoll, connections: dict[int, socket.socket]) -> None:
    try:
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            connections[connection.fileno()] = connection
            poll.register(connection.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
    except BlockingIOError:
        return


def main() -> None:
    """Serve until killed; the UDP and the TCP port on standard output once both are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    address = parser.parse_args().address
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    datagrams.bind((address, 0))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(4096)
    print(datagrams.getsockname()[1], listener.getsockname()[1], flush=True)
    serve(datagrams, listener)


if __name__ == "__main__":
    main()
