"""Client sockets of the lowering namespace, as a worker asks for them: one for each stream whose upstream is a device.

    flow     Prepare (lower slot reserved) ──► worker ── Connect ──► helper      in the namespace
             the SYN, out of the device   ◄──────────────────────── connect()
                                             worker ◄─ Connecting ── helper      the socket; from here on a dial like any other

The helper may die at any time: what was asked of it and not answered is asked again of the next one, until the flow's time for a dial is over. A
socket that went with it had sent a SYN at most.

Limit: what the helper doesn't take waits here, at most one request a slot.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from typing import Final

import msgspec

from falkirk.linux import namespace_messages as messages
from falkirk.linux import seqpacket
from falkirk.linux.sockets import Socket
from falkirk.wire.handover import Prepare
from falkirk.wire.slots import LOWERED

BUDGET: Final = 64
"""Answers taken a turn."""
_READ: Final = select.EPOLLIN | select.EPOLLRDHUP


class Asked:
    """A socket that is awaited. Times are monotonic seconds."""

    __slots__ = ("due", "number", "since", "wish")

    def __init__(self, number: int, wish: Prepare, now: float) -> None:
        self.number = number
        self.wish = wish
        self.since = now
        self.due = -1
        """Where `deadlines` keeps it."""

    def expires(self) -> float:
        """When it is given up."""
        return self.since + self.wish.connect_timeout_ms / 1000

    @property
    def request(self) -> messages.Connect:
        """What the helper is asked."""
        wish = self.wish
        version = 4 if len(wish.destination) == 4 else 6
        return messages.Connect(self.number, wish.lower - LOWERED, version, wish.source_port, wish.port)


class Lowering:
    """A worker's side of its pair with the helper."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._helper: socket.socket | None = None
        self._fd = -1
        self._number = 0
        self._asked: dict[int, Asked] = {}
        """By number, oldest first."""
        self._unsent: dict[int, Asked] = {}

    def attach(self, helper: socket.socket) -> None:
        """A (new) helper: what waits is asked of it."""
        self._detach()
        helper.setblocking(False)
        self._helper, self._fd = helper, helper.fileno()
        self._epoll.register(helper, _READ)
        self._unsent = dict(self._asked)
        self._send()

    def _detach(self) -> None:
        if self._helper is not None:
            self._epoll.unregister(self._fd)
            self._helper.close()
        self._helper, self._fd = None, -1

    def owns(self, fd: int) -> bool:
        """Is this descriptor the pair's?"""
        return fd == self._fd

    def ask(self, wish: Prepare, now: float) -> Asked:
        """Have a socket made; its answer comes by `on_event`."""
        self._number += 1
        asked = Asked(self._number, wish, now)
        self._asked[asked.number] = self._unsent[asked.number] = asked
        self._send()
        return asked

    def forget(self, asked: Asked) -> None:
        """Don't wait for it any longer: a socket that still comes is closed."""
        self._asked.pop(asked.number, None)
        self._unsent.pop(asked.number, None)

    def _send(self) -> None:
        if self._helper is None:
            return
        try:
            while self._unsent:
                number, asked = next(iter(self._unsent.items()))
                if not seqpacket.send(self._helper, messages.encode(asked.request)):
                    break
                del self._unsent[number]
        except OSError:
            self._detach()
            return
        self._epoll.modify(self._fd, _READ | (select.EPOLLOUT if self._unsent else 0))

    def on_event(self, events: int) -> Iterator[tuple[Asked, Socket | int]]:
        """Readiness of the pair: sockets that came, or the errno of those that don't."""
        if events & select.EPOLLOUT:
            self._send()
        for _ in range(BUDGET):
            if self._helper is None:
                return
            try:
                received = seqpacket.receive(self._helper, messages.MAX_DATAGRAM, 1)
            except OSError:
                received = (b"", [])
            if received is None:
                return
            answer = self._answer(*received)
            if answer is not None:
                yield answer

    def _answer(self, data: bytes, fds: list[int]) -> tuple[Asked, Socket | int] | None:
        """What a datagram answers; None where nobody waits for it, or where it is the end."""
        try:
            message = messages.TO_WORKER.decode(data)
        except msgspec.DecodeError:
            # No bytes are the end. Its successor comes by `attach`.
            self._detach()
            message = None
        asked = self._asked.pop(message.request, None) if message is not None else None
        if asked is None:
            for fd in fds:
                os.close(fd)
            return None
        if isinstance(message, messages.NotConnecting):
            return asked, message.errno
        return asked, Socket(fileno=fds[0]) if fds else errno.EMFILE

    def close(self) -> None:
        """Give the pair up."""
        self._detach()
