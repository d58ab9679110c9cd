"""Trunks: one pair with each on-ramp worker, for all its tunnels that have no descriptor of their own (`falkirk.wire.trunk`).

    on-ramp worker ──► arena of the raw lane ──► the tunnel of the number ──► walked like a datagram of its own
                   ◄── what a tunnel's queue couldn't hold back ◄── deliver

A tunnel belongs to the trunk by which its on-ramp worker handed it over: what comes by another one with its number is nobody's. While the on-ramp
worker is away its tunnels stay, with their flows, and what is sent to them waits; its successor brings the next pair.

One that is full makes all its tunnels wait, each in its own queue, and serves them in turn, a datagram each: so that a device with much
to receive doesn't hold up another's.

Limits: all queues of a trunk hold `QUEUES` bytes together; nobody is asked to send less. An on-ramp worker that stays away for `AWAY` seconds loses its tunnels.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Final

from falkirk.flow import peers
from falkirk.flow.bearers import ended
from falkirk.flow.raw import RawLane
from falkirk.flow.table import Bearer, Tunnel
from falkirk.wire.checksum import Buffer
from falkirk.wire.context import Framing, Transport
from falkirk.wire.trunk import HEADER, NUMBER

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

QUEUES: Final = 64 * 1024 * 1024
"""Bytes that wait for one on-ramp worker, in the queues of all its tunnels."""
AWAY: Final = 180
"""Seconds: no WireGuard session is older than that and still carries, so whoever is there has to come anew either way."""


class Trunk(Bearer):
    """The pair with one on-ramp worker, whichever process that is at present."""

    __slots__ = ("_head", "_lane", "_waiting", "_worker", "fd", "gone", "number", "queued")
    open = True
    transport = Transport.TRUNK

    def __init__(self, worker: Worker, number: int) -> None:
        self._worker = worker
        self.number = number
        """The on-ramp worker's."""
        self.fd = -1
        """Negative while that is away."""
        self.gone = worker.second
        """The second since which it is."""
        self.queued = 0
        """Bytes that wait in its tunnels' queues."""
        self._waiting: dict[Tunnel, None] = {}
        """Tunnels with a queue, in the order in which they are served."""
        self._head = bytearray(HEADER)
        lane = worker.lanes[Framing.RAW]
        assert isinstance(lane, RawLane)
        self._lane = lane

    def arrived(self, fd: int) -> None:
        """The next pair; `fd` is this object's from now on."""
        self.lost()
        os.set_blocking(fd, False)
        self.fd = fd
        self._worker.watch(fd, peers.READ, self._ready)
        self._serve()

    def lost(self) -> None:
        """The on-ramp worker is gone."""
        if self.fd >= 0:
            self._worker.unwatch(self.fd)
            os.close(self.fd)
            self.fd, self.gone = -1, self._worker.second

    # from the on-ramp

    def _ready(self, mask: int) -> None:
        if mask & select.EPOLLOUT:
            self._serve()
        if mask & ~select.EPOLLOUT and not self._lane.from_trunk(self):
            self.lost()

    def receive(self, buffer: Buffer) -> int:
        """A datagram's packets into the buffer; how many bytes they are, negative where it has no number. Raises BlockingIOError where there is none,
        other OSError where there never will be."""
        return os.readv(self.fd, (self._head, buffer)) - HEADER

    def tunnel(self) -> Tunnel | None:
        """Whose that was; None where it is no tunnel of this trunk."""
        tunnel = self._worker.tunnels.get(NUMBER.unpack(self._head)[0])
        return tunnel if tunnel is not None and tunnel.bearer is self else None

    def ended(self) -> bool:
        """Whether the on-ramp worker is gone."""
        return ended(self.fd)

    # to the on-ramp

    def write(self, tunnel: Tunnel, data: Buffer) -> int:
        """A datagram of a tunnel's, behind its number."""
        if self.fd < 0 or (self._waiting and not tunnel.queue):
            # It takes its turn behind those that wait.
            raise BlockingIOError
        try:
            return os.writev(self.fd, (NUMBER.pack(tunnel.id), data))
        except BlockingIOError:
            raise
        except OSError as error:
            # The on-ramp worker has just gone, as the reader's side will find; the next one takes it.
            raise BlockingIOError from error

    @property
    def full(self) -> str:  # type: ignore[override]  # as far as others are concerned it only has a value
        """Why what there is no room for is dropped."""
        return "tunnel_full" if self.fd >= 0 else "onramp_away"

    def room(self, size: int) -> bool:
        """Whether all queues together have room for that."""
        return self.queued + size <= QUEUES

    def keep(self, tunnel: Tunnel, data: bytes) -> None:
        """It waits for its tunnel's turn."""
        if not self._waiting and self.fd >= 0:
            self._worker.rewatch(self.fd, peers.READ | select.EPOLLOUT)
        self._waiting[tunnel] = None
        self.queued += len(data)
        super().keep(tunnel, data)

    def _serve(self) -> None:
        """There is room again."""
        waiting = self._waiting
        while waiting:
            tunnel = next(iter(waiting))
            before = tunnel.queued
            try:
                more = tunnel.serve()
            except BlockingIOError:
                self._worker.rewatch(self.fd, peers.READ | select.EPOLLOUT)
                return
            self.queued -= before - tunnel.queued
            del waiting[tunnel]
            if more:
                waiting[tunnel] = None
        self._worker.rewatch(self.fd, peers.READ)

    def close(self, tunnel: Tunnel) -> None:
        """The tunnel is over, and what waits for it dropped; the trunk stays."""
        if tunnel in self._waiting:
            del self._waiting[tunnel]
            self.queued -= tunnel.queued


class Trunks(dict[int, Trunk]):
    """By the number of the on-ramp worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def arrived(self, number: int, fd: int) -> None:
        """An on-ramp worker has made its pair; `fd` is this object's from now on. Raises ValueError, and it stays the caller's, where it can't be one."""
        if not peers.grow(fd):
            raise ValueError("a trunk must be a SEQPACKET socket")
        trunk = self.get(number)
        if trunk is None:
            trunk = self[number] = Trunk(self._worker, number)
        trunk.arrived(fd)

    def each_second(self) -> None:
        """End what was left by on-ramp workers that don't come back."""
        tunnels = self._worker.tunnels
        for number, trunk in list(self.items()):
            if trunk.fd < 0 and self._worker.second - trunk.gone >= AWAY:
                del self[number]
                for tunnel in [tunnel for tunnel in tunnels.values() if tunnel.bearer is trunk]:
                    tunnels.close(tunnel.id, "onramp_away")

    def close(self) -> None:
        """Let go of all descriptors."""
        for trunk in self.values():
            trunk.lost()
