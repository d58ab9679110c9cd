"""The other workers of the on-ramp: datagrams that came to one and are for another.

Each worker has an inbox, a SEQPACKET pair of the parent's, into which all others write. Like the UDP sockets it outlives the worker: what is written while that is being replaced waits.

Limit: what the inbox has no room for, about a thousand datagrams that nobody has read, is dropped and counted (`worker_full`); a sender of initiations tries again.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import Final

from falkirk.linux import seqpacket, sockets
from falkirk.onramp import control
from falkirk.onramp.control import PASSED, WIREGUARD, Asked, Passed
from falkirk.onramp.reactor import Reactor

INBOX: Final = 1 << 20
"""Bytes in the kernel's count, in which a datagram of 300 has about 800."""
BUDGET: Final = 64
"""Datagrams a turn."""
_MOST: Final = 1 << 17

Take = Callable[[list[Passed | Asked]], None]


def inbox() -> tuple[socket.socket, socket.socket]:
    """A new pair: where its worker reads, and where the others write."""
    reading, writing = seqpacket.pair()
    sockets.raise_buffers(writing, INBOX)
    return reading, writing


class Neighbours:
    """One worker's inbox, and the ways to those of the others. `count` counts by name."""

    def __init__(self, reactor: Reactor, reading: socket.socket, count: Callable[[str, int], None]) -> None:
        self._reactor, self._reading, self._count = reactor, reading, count
        self._others: dict[int, socket.socket] = {}

    def start(self, take: Take) -> None:
        """Join the loop; `take` gets what comes."""
        self._reactor.add(self._reading.fileno(), select.EPOLLIN, lambda _: take(self._mail()))

    def know(self, worker: int, writing: socket.socket) -> None:
        """The inbox of another one."""
        self._others[worker] = writing

    def give(self, worker: int, message: Passed | Asked) -> None:
        """Something that is for another worker."""
        other = self._others.get(worker)
        sent = False
        # Where the pair has ended the mesh is on its way out.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = other is not None and seqpacket.send(other, control.encode(message))
        self._count(PASSED if sent else WIREGUARD + "worker_full", 1)

    def _mail(self) -> list[Passed | Asked]:
        found: list[Passed | Asked] = []
        for _ in range(BUDGET):
            received = seqpacket.receive(self._reading, _MOST, 0)
            if received is None or not received[0]:
                break
            found.append(control.BETWEEN.decode(received[0]))
        return found
