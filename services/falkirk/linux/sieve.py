"""A WireGuard socket's sieve: of initiations that show no cookie the kernel lets in a share, taken by chance, and drops the others unread.

What isn't let in costs this process nothing, not even a system call, and takes no room in the socket's buffer from other messages. Everything else
passes: data, responses, cookie replies, and initiations with anything in mac2, which their receiver verifies.

Limits: a train (UDP_GRO) passes whole, whatever is in it: it costs its receiver one call. The kernel counts what it dropped for want of room in the same number.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import Final

from falkirk.linux import sockets
from falkirk.wireguard.messages import INITIATION, INITIATION_SIZE, MAC_SIZE

SO_ATTACH_FILTER: Final = 26
SO_DETACH_FILTER: Final = 27
SO_MEMINFO: Final = 55
_MEMINFO: Final = Struct("=9I")
_UDP: Final = 8
"""Bytes of the UDP header, with which the data begin that the program sees."""
_RANDOM: Final = 0xFFFFF000 + 56
"""Where classic BPF reads a random word (SKF_AD_RANDOM)."""
_EVERYTHING: Final = 0xFFFFFFFF


def program(share: float) -> list[sockets.Instruction]:
    """Classic BPF that lets in this share (0 to 1) of the initiations without a cookie."""
    words = range(_UDP + INITIATION_SIZE - MAC_SIZE, _UDP + INITIATION_SIZE, 4)
    # Each test jumps to the end, which lets in, where the datagram is another one.
    tests = [
        (0x80, 0, _UDP + INITIATION_SIZE),  # A = length
        (0x20, _UDP, INITIATION << 24),  # A = type, and three zeros
        *((0x20, word, 0) for word in words),  # A = a part of mac2
    ]
    steps: list[sockets.Instruction] = []
    rest = 2 * len(tests) + 3
    for load, where, wanted in tests:
        at = len(steps)
        steps += [(load, 0, 0, where), (0x15, 0, rest - at - 2, wanted)]
    return [
        *steps,
        (0x20, 0, 0, _RANDOM),
        (0x25, 0, 1, min(int(share * 0x100000000), _EVERYTHING)),  # above: it stays outside
        (0x06, 0, 0, 0),
        (0x06, 0, 0, _EVERYTHING),
    ]


def let_in(sock: socket.socket, share: float) -> None:
    """From now on this share; 1 takes the sieve away."""
    if share < 1:
        sockets.attach(sock, SO_ATTACH_FILTER, program(share))
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    except FileNotFoundError:
        # There was none.
        return


def unread(sock: socket.socket) -> int:
    """Datagrams that the kernel has dropped of this socket's, modulo 2^32: by the sieve, or for want of room. A train counts as one."""
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size))[8])
