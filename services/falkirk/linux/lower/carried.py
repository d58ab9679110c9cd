"""A tunnel whose packets are moved by nobody here: its TUN device was handed to the flow worker.

What is left is the connection: it keeps the tunnel open, its end is the tunnel's end, and a flow worker that takes the tunnel over asks
on it for the device again. The interface is `pump.Pump`'s.
"""

from __future__ import annotations

import select
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from falkirk.linux import seqpacket
from falkirk.linux.lower.admission import TIMEOUT_S, Refusal
from falkirk.linux.lower.request import Exit, Stopped

MAX_WORD: Final = 16 * 1024
HERE: Final = b'{"device":{}}'


class Word(msgspec.Struct, frozen=True):
    """What the node says after the admission: one of these."""

    attached: str = ""
    wanted: str = ""
    error: Refusal | None = None


class Carried:
    """The device stays the caller's to close, and is the node's to read and write."""

    def __init__(self, device: int, tunnel: socket.socket, name: str) -> None:
        """Hand `device`, the interface `name`, over. Raises Stopped where the node doesn't take it."""
        self._device = device
        self._tunnel = tunnel
        self._name = name
        self._attached = False
        self._epoll = select.epoll()
        self._others: dict[int, Callable[[], None]] = {}
        self.closed = False
        """The tunnel's other end is gone."""
        self.dropped: Counter[str] = Counter()
        self._epoll.register(tunnel, select.EPOLLIN)
        self._hand_over()
        while not self._attached:
            if self.closed or not self.turn(TIMEOUT_S):
                raise Stopped(Exit.REFUSED, "TIMEOUT", f"the node didn't take the device within {TIMEOUT_S:g} s")

    @property
    def sent_datagrams(self) -> int:
        """Packets that the device gave to the node."""
        return self._statistics()[9]

    @property
    def received_datagrams(self) -> int:
        """Packets that it got from it."""
        return self._statistics()[1]

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call this once, when the descriptor becomes readable."""
        self._others[fd] = on_readable
        self._epoll.register(fd, select.EPOLLIN)

    def turn(self, timeout: float | None = None) -> bool:
        """Wait for something (seconds; None: as long as it takes) and see to it; False where there was nothing in time."""
        events = self._epoll.poll(timeout)
        for fd, _ in events:
            if fd == self._tunnel.fileno():
                self._hear()
            else:
                self._epoll.unregister(fd)
                self._others.pop(fd)()
        return bool(events)

    def close(self) -> None:
        """Free what this itself holds."""
        self._epoll.close()

    def _hear(self) -> None:
        received = seqpacket.receive(self._tunnel, MAX_WORD, max_descriptors=0)
        if received is None:
            return
        if not received[0]:
            self.closed = True
            self._epoll.unregister(self._tunnel)
            return
        try:
            word = msgspec.json.decode(received[0], type=Word)
        except msgspec.DecodeError as error:
            raise Stopped(Exit.REFUSED, "BAD_ANSWER", f"the node's word can't be read ({error})") from error
        if word.error is not None:
            raise Stopped(Exit.REFUSED, word.error.code, word.error.message)
        self._attached = self._attached or bool(word.attached)
        if word.wanted:
            self._hand_over()

    def _hand_over(self) -> None:
        try:
            seqpacket.send(self._tunnel, HERE, [self._device])
        except OSError:
            self.closed = True

    def _statistics(self) -> list[int]:
        """The interface's sixteen counters, proc(5): received bytes, packets, ..., transmitted bytes, packets, ..."""
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == self._name:
                return [int(field) for field in counters.split()]
        return [0] * 16
