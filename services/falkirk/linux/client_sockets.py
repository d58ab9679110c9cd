"""Client sockets of a lowering namespace: made on demand, connecting, and handed to whoever asked.

A stream that is to leave as packets needs a TCP socket *inside* the namespace, so the helper makes it. It connects from the worker's device's own
address to the address of the slot that its flow has reserved, so the SYN comes out of that device, and the slot tells whose it is. Both ports are
those that the two peers see: the NAT is known before the first packet, and changes addresses only.

From its first moment the socket resets on close: a process that is killed must not make its stream look complete.

Limits: TCP only. A request whose answer the worker doesn't take keeps the next ones of that worker waiting, and no other worker's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from typing import Final

import msgspec

from falkirk.linux import namespace_messages as messages
from falkirk.linux import seqpacket, sockets
from falkirk.linux.slot_devices import FALLBACK_CONGESTION, HOST
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan

BUDGET: Final = 64
"""Requests of one worker before the others get their turn."""
_TYPE: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class ClientSockets:
    """The helper's side of one worker's pair."""

    def __init__(self, pair: socket.socket, settings: messages.HelperSettings, worker: int) -> None:
        pair.setblocking(False)
        self.pair = pair
        self._plan = SlotPlan(settings.workers)
        self._worker = worker
        self._congestion = settings.congestion
        self._waiting: deque[tuple[bytes, int]] = deque()
        """Answers that the worker hasn't taken, and their sockets (-1: none)."""

    @property
    def events(self) -> int:
        """What poll is to wait for."""
        return select.POLLOUT if self._waiting else select.POLLIN

    def serve(self) -> bool:
        """Answer what was asked, as far as the worker takes it; False where it is gone."""
        try:
            if not self._flush():
                return True
            for _ in range(BUDGET):
                received = seqpacket.receive(self.pair, messages.MAX_DATAGRAM, 0)
                if received is None:
                    return True
                if not received[0]:
                    return False
                self._waiting.append(self._make(messages.FROM_WORKER.decode(received[0])))
                if not self._flush():
                    return True
        except (OSError, msgspec.DecodeError):
            return False
        return True

    def _flush(self) -> bool:
        """True where nothing waits any more. Raises OSError where the worker is gone."""
        while self._waiting:
            data, fd = self._waiting[0]
            if not seqpacket.send(self.pair, data, [fd] if fd >= 0 else ()):
                return False
            self._waiting.popleft()
            if fd >= 0:
                os.close(fd)
        return True

    def _make(self, wish: messages.Connect) -> tuple[bytes, int]:
        try:
            sock = self._connecting(wish)
        except OSError as error:
            return messages.encode(messages.NotConnecting(wish.request, error.errno or errno.EIO)), -1
        except (ValueError, OverflowError):
            return messages.encode(messages.NotConnecting(wish.request, errno.EINVAL)), -1
        return messages.encode(messages.Connecting(wish.request)), sock.detach()

    def _connecting(self, wish: messages.Connect) -> socket.socket:
        plan = self._plan
        framing = Framing.RAW if wish.slot >> plan.index_bits else Framing.VNET
        family, address = (socket.AF_INET, plan.address4) if wish.version == 4 else (socket.AF_INET6, plan.address6)
        own, slot = (
            socket.inet_ntop(family, address(self._worker, number)) for number in (plan.slot(framing, HOST), wish.slot)
        )
        if not wish.source_port:
            raise OSError(errno.EINVAL, "the source port must be known")
        sock = socket.socket(family, _TYPE)
        try:
            sockets.reset_on_close(sock)
            sockets.no_delay(sock)
            sockets.urgent_in_line(sock)
            sockets.set_congestion(sock, self._congestion, FALLBACK_CONGESTION)
            # Many streams of one port, each to a slot of its own.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((own, wish.source_port))
            code = sock.connect_ex((slot, wish.port))
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Let the worker go, and what it didn't take."""
        self.pair.close()
        for _, fd in self._waiting:
            if fd >= 0:
                os.close(fd)
        self._waiting.clear()
