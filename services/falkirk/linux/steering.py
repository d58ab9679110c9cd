"""WireGuard's port shared by several workers: one socket each, and the kernel gives a datagram to the one whose session it is of.

A responder's and an initiator's indices carry their worker's number (`falkirk.wireguard.table`): the first byte of the receiver index on the wire, modulo the
number of sockets, is the socket's place in its SO_REUSEPORT group. A classic BPF program reads it. What has no such index, an initiation above all, goes by the kernel's
hash of both addresses and ports: one sender's always to the same socket.

UDP_GRO makes trains before a socket is chosen, so the program sees a train's first datagram only. Data of one session are one owner's; what else may be in a train
behind them, or data behind an initiation, their receiver passes on.

The first socket is bound alone, so a port that anybody else has, another mesh of the same user included, is refused as ever.

Limits: the group stays whole for as long as its sockets are open, all of them in one process: a place that closes is filled by the last one. Any process of
the same uid may bind a further socket to the port once the group is there, and then gets some of what goes by hash (the program never names it): who has our uid could as well
read our key.
"""

from __future__ import annotations

import socket
from typing import Final

from falkirk.linux import sockets, trains

SO_ATTACH_REUSEPORT_CBPF: Final = 51
SHORTEST: Final = 32
"""Bytes of the shortest message with a receiver index, a keepalive; a load beyond the end would choose the first socket."""
_RESPONSE, _COOKIE, _DATA = 2, 3, 4


def open_group(address: str, port: int, count: int) -> list[socket.socket]:
    """`count` sockets of one port as `trains.open_socket` makes them, in the order of their numbers; one has nothing of all this. Raises OSError."""
    group = [trains.open_socket(address, port, told=not address)]
    try:
        if count > 1:
            group[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            port = group[0].getsockname()[1]
            group += [trains.open_socket(address, port, shared=True, told=not address) for _ in range(count - 1)]
            sockets.attach(group[0], SO_ATTACH_REUSEPORT_CBPF, program(count))
    except BaseException:
        for sock in group:
            sock.close()
        raise
    return group


def program(count: int) -> list[sockets.Instruction]:
    """Classic BPF: a datagram's place among `count` sockets, or a number that is none, for the kernel's own choice."""
    return [
        (0x80, 0, 0, 0),  # A = length
        (0x35, 0, 9, SHORTEST),  # shorter: none
        (0x30, 0, 0, 0),  # A = type
        (0x15, 4, 0, _DATA),
        (0x15, 3, 0, _COOKIE),
        (0x15, 0, 5, _RESPONSE),
        (0x30, 0, 0, 8),  # A = first byte of a response's receiver index
        (0x05, 0, 0, 1),
        (0x30, 0, 0, 4),  # A = the same of data and cookie replies
        (0x94, 0, 0, count),  # A %= count
        (0x16, 0, 0, 0),
        (0x06, 0, 0, 0xFFFFFFFF),
    ]
