"""What carries a tunnel's packets, where that has a descriptor of its own: the SEQPACKET connection, or the producer's device.

A device is awaited on the connection, which says nothing but that, and stays what the tunnel lives by. The device's file is shared with the
producer, who can make it blocking or change its framing at any time: so each call says itself that it doesn't wait, and each packet
is checked as any other.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import TYPE_CHECKING

from falkirk.flow import peers
from falkirk.flow.table import Bearer, Tunnel
from falkirk.wire.checksum import Buffer
from falkirk.wire.context import Transport

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker


class SocketBearer(Bearer):
    """A connection of the tunnel's own."""

    __slots__ = ("_events", "_worker", "descriptor")
    open = True

    def __init__(self, worker: Worker, descriptor: int) -> None:
        """`descriptor` is this object's from now on."""
        self._worker = worker
        self.descriptor = descriptor
        self._events = peers.READ
        """What is waited for while nothing waits to be written."""

    @property
    def fd(self) -> int:
        """Where packets are."""
        return self.descriptor

    def read(self, buffers: Sequence[Buffer]) -> int:
        """A datagram."""
        return os.readv(self.descriptor, buffers)

    def write(self, tunnel: Tunnel, data: Buffer) -> int:
        """A datagram."""
        return os.write(self.descriptor, data)

    def ended(self) -> bool:
        """Whether the producer is gone."""
        return ended(self.fd)

    def keep(self, tunnel: Tunnel, data: bytes) -> None:
        """It waits until there is room."""
        if not tunnel.queue:
            self._worker.rewatch(self.fd, self._events | select.EPOLLOUT)
        super().keep(tunnel, data)

    def serve(self, tunnel: Tunnel) -> None:
        """There is room again."""
        try:
            while tunnel.serve():
                pass
        except BlockingIOError:
            return
        self._worker.rewatch(self.fd, self._events)

    def close(self, tunnel: Tunnel) -> None:
        """Close the descriptor."""
        self._worker.unwatch(self.descriptor)
        os.close(self.descriptor)
        self.descriptor = -1


class DeviceBearer(SocketBearer):
    """A device of the producer's, behind a connection that carries no packets."""

    __slots__ = ("device", "open")
    transport = Transport.DEVICE

    def __init__(self, worker: Worker, descriptor: int) -> None:
        super().__init__(worker, descriptor)
        self._events = select.EPOLLIN
        self.device = -1
        self.open = False

    @property
    def fd(self) -> int:
        """The device."""
        return self.device

    def attach(self, device: int) -> None:
        """Packets go by this device, which is this object's, from now on."""
        self.device, self.open = device, True

    def read(self, buffers: Sequence[Buffer]) -> int:
        """A packet."""
        return os.preadv(self.device, buffers, -1, os.RWF_NOWAIT)

    def write(self, tunnel: Tunnel, data: Buffer) -> int:
        """A packet."""
        return os.pwritev(self.device, (data,), -1, os.RWF_NOWAIT)

    def close(self, tunnel: Tunnel) -> None:
        """Close both."""
        super().close(tunnel)
        if self.open:
            self._worker.unwatch(self.device)
            os.close(self.device)
            self.device, self.open = -1, False


def ended(fd: int) -> bool:
    """Whether reading nothing meant the end: a SEQPACKET peer may also send a datagram of no bytes."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
