"""The other workers of this node, as far as flows lead from one's tunnels to another's.

Each two workers have a SEQPACKET pair, made by their parent. A flow belongs to the worker that reads the tunnel it began in; when it
leads to a tunnel of another worker, that one is first told of it (`Foreign`: under which key its replies come), then gets the
packets for the tunnel, and passes the replies on. The order on the pair is the order in which they were sent, so that no packet and no
reply overtakes the word about it.

    owner  ── Foreign, PACKET, PACKET … Forget ──►  the other tunnel's worker
    owner  ◄── REPLY, ERROR … Gone ───────────────

A datagram is a head of 16 bytes (what it is, two numbers) and either a packet behind its virtio-net header, or MessagePack messages.
A pair's end is its other worker's: foreign entries go with their owner, and flows that led there are led anew
(`falkirk.flow.forward`). A successor gets new pairs.

Limits: packets that the pair doesn't take wait, up to `tunnel_queue_bytes` a pair; more are dropped as `sibling_full`. Words are never dropped.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from falkirk.flow import peers
from falkirk.flow.counters import RECEIVED
from falkirk.flow.lane import BUDGET, BUFFER
from falkirk.wire.handover import Message, batches

if TYPE_CHECKING:
    from falkirk.flow.forward import Forward
    from falkirk.flow.worker import Worker

_HEAD: Final = struct.Struct("=BxxxIQ")
WORDS: Final = 0
PACKET: Final = 1
"""A packet for tunnel `number`; where `handle` isn't 0 it came in fragments, and that was the size of the largest."""
REPLY: Final = 2
"""A packet that answers flow `handle`; `number` is where its upper layer starts, and from bit 16 on the size of its largest fragment, or 0."""
ERROR: Final = 3
"""An ICMP error about a packet of flow `handle`."""


class Foreign(Message, frozen=True, tag=True):
    """Owner to the other tunnel's worker: packets under this key from the tunnel answer my flow `handle`, whose initiator's tunnel
    has this MTU."""

    handle: int
    tunnel: int
    key: bytes
    mtu: int
    prefix: str
    """Of the route that leads there."""


class Forget(Message, frozen=True, tag=True):
    """Owner to the other tunnel's worker: the flow has ended. With `reset` the other end's TCP is to be told."""

    handle: int
    reset: bool


class Gone(Message, frozen=True, tag=True):
    """The other way: the flow can't lead there; because its tunnel is `closed`, or as another flow has the same key."""

    handle: int
    closed: bool


_decode: Final = msgspec.msgpack.Decoder(list[Foreign | Forget | Gone]).decode


class Carrier:
    """A lane's buffer for packets that come over a pair: always behind a virtio-net header that was found to be true."""

    raw = False

    def __init__(self) -> None:
        self.buffer = bytearray(BUFFER)
        self.view = memoryview(self.buffer)
        self.words = self.view.cast("H")


class SiblingLink:
    """The pair with one other worker."""

    def __init__(self, worker: Worker, forward: Forward, number: int, sock: socket.socket) -> None:
        self._worker = worker
        self._forward = forward
        self.number = number
        self.sock = sock
        self.fd = sock.fileno()
        self.foreign: dict[int, tuple[int, bytes]] = {}
        """Tunnel and key of each passage of a flow of the other worker."""
        self._head = bytearray(_HEAD.size)
        self._buffers = [memoryview(self._head), forward.carrier.view]
        self._waiting: deque[bytes] = deque()
        self._queued = 0
        worker.watch(self.fd, peers.READ, self.ready, urgent=True)

    def ready(self, mask: int) -> None:
        """What epoll says of it."""
        if mask & select.EPOLLOUT:
            self._drain()
        for _ in range(BUDGET):
            if self.fd < 0:
                return
            try:
                size = os.readv(self.fd, self._buffers)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if size <= _HEAD.size:
                self._forward.link_lost(self)
                return
            self._datagram(size - _HEAD.size)

    def _datagram(self, end: int) -> None:
        kind, number, handle = _HEAD.unpack(self._head)
        forward = self._forward
        if kind == WORDS:
            for message in _decode(self._buffers[1][:end]):
                match message:
                    case Foreign():
                        forward.foreign(self, message)
                    case Forget():
                        forward.forget(self, message)
                    case Gone():
                        forward.gone(message)
            return
        self._worker.counts[RECEIVED] += 1
        if kind == PACKET:
            forward.from_owner(number, handle, end)
        elif kind == REPLY:
            forward.reply(handle, number, end)
        else:
            forward.error_reply(handle, end)

    @property
    def backlog(self) -> int:
        """Datagrams that wait."""
        return len(self._waiting)

    def tell(self, message: Message) -> None:
        """Say something; it waits its turn behind packets, and is never lost while the other worker lives."""
        for data in batches([message]):
            self._send(_HEAD.pack(WORDS, 0, 0), data, bounded=False)

    def packet(self, kind: int, number: int, handle: int, data: memoryview) -> bool:
        """Send a packet; False where it was dropped, and counted."""
        return self._send(_HEAD.pack(kind, number, handle), data, bounded=True)

    def _send(self, head: bytes, data: bytes | memoryview, *, bounded: bool) -> bool:
        worker = self._worker
        if self.fd < 0:
            if bounded:
                worker.drop("tunnel_closed")
            return False
        if not self._waiting:
            try:
                os.writev(self.fd, [head, data])
            except BlockingIOError:
                worker.rewatch(self.fd, peers.READ | select.EPOLLOUT)
            except OSError:
                # The reader's side finds the end.
                if bounded:
                    worker.drop("tunnel_closed")
                return False
            else:
                return True
        size = len(head) + len(data)
        if bounded and self._queued + size > worker.settings.tunnel_queue_bytes:
            worker.drop("sibling_full")
            return False
        self._waiting.append(head + bytes(data))
        self._queued += size
        return True

    def _drain(self) -> None:
        while self._waiting:
            try:
                os.write(self.fd, self._waiting[0])
            except BlockingIOError:
                return
            except OSError:
                return
            self._queued -= len(self._waiting.popleft())
        self._worker.rewatch(self.fd, peers.READ)

    def close(self) -> None:
        """The other worker is gone, or has a successor."""
        if self.fd >= 0:
            self._worker.unwatch(self.fd)
            self.sock.close()
            self.fd = -1
        self._waiting.clear()
        self._queued = 0
