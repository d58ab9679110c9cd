"""Links to the flow workers: one SEQPACKET connection each, made again every 50 ms while it is down.

A link is up once the flow worker's `Hello` is read and fits: our protocol, its role and number, a generation not below the last one, and
a uid that we trust. What is sent meanwhile isn't queued: the owner hears `on_up` and sends again what still holds.

Limits: a datagram has at most 64 messages, 16 descriptors and about 100 KiB; what the socket doesn't take waits, without bound in
number, but the owner queues at most two messages a tunnel. A message whose tunnel was closed meanwhile loses its descriptor and isn't sent.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Final

import msgspec

from falkirk.linux import seqpacket
from falkirk.onramp.reactor import Reactor
from falkirk.runtime.log import Log
from falkirk.wire import handover
from falkirk.wire.handover import FLOW_TO_ONRAMP, MAX_DATAGRAM, MAX_DESCRIPTORS, MAX_MESSAGES, PROTOCOL, Hello, Message

RECONNECT_S: Final = 0.05
DATAGRAMS_A_TURN: Final = 32
_FULL: Final = 100 * 1024

OnUp = Callable[[int, int], None]
"""Worker and its generation."""
OnMessage = Callable[[int, Message, int | None], None]
"""Worker, message, and its descriptor, which the callee owns."""
OnDown = Callable[[int], None]


class _State(Enum):
    DOWN = auto()
    GREETING = auto()
    UP = auto()


class _PeerFault(Exception):
    """The flow worker said what it mustn't; the link is dropped."""


class FlowLink:
    """The connection to one flow worker, of the on-ramp worker with the number `onramp`."""

    def __init__(
        self,
        reactor: Reactor,
        path: str,
        worker: int,
        onramp: int,
        generation: int,
        peer_uids: Collection[int],
        log: Log,
        on_up: OnUp,
        on_message: OnMessage,
        on_down: OnDown,
    ) -> None:
        self._reactor, self._path, self._worker = reactor, path, worker
        self._onramp, self._generation = onramp, generation
        self._peer_uids, self._log = peer_uids, log
        self._on_up, self._on_message, self._on_down = on_up, on_message, on_down
        self._state = _State.DOWN
        self._sock: socket.socket | None = None
        self._seen_generation = 0
        self._outbox: deque[tuple[Message, bytes, socket.socket | None]] = deque()
        self._blocked = False
        self._complained = ""

    @property
    def up(self) -> bool:
        """True while messages can be sent."""
        return self._state is _State.UP

    def connect(self) -> None:
        """Connect now, and whenever the connection is lost. Idempotent."""
        if self._sock is not None:
            return
        try:
            sock = seqpacket.connect(self._path)
        except OSError as error:
            self._retry(os.strerror(error.errno or 0))
            return
        uid = seqpacket.peer(sock).uid
        if uid not in self._peer_uids:
            sock.close()
            self._retry(f"its uid {uid} isn't trusted")
            return
        self._sock, self._state = sock, _State.GREETING
        self._reactor.add(sock.fileno(), select.EPOLLIN, self._on_event)
        self._queue(Hello(role="onramp", worker=self._onramp, generation=self._generation), None)
        self.flush()

    def send(self, message: Message, descriptor: socket.socket | None = None) -> None:
        """Queue a message for the end of this turn; nothing where the link is down."""
        if self.up:
            self._queue(message, descriptor)

    def flush(self) -> bool:
        """Send what is queued. For `Reactor.after`; there is never more to do at once."""
        while self._sock is not None and self._outbox and not self._blocked:
            messages: list[Message] = []
            descriptors: list[int] = []
            taken = size = 0
            for message, encoded, carried in self._outbox:
                if carried is not None and carried.fileno() < 0:
                    taken += 1
                    continue
                full = len(messages) == MAX_MESSAGES or size + len(encoded) > _FULL
                if messages and (full or (carried is not None and len(descriptors) == MAX_DESCRIPTORS)):
                    break
                taken, size = taken + 1, size + len(encoded)
                messages.append(message)
                if carried is not None:
                    descriptors.append(carried.fileno())
            try:
                sent = not messages or seqpacket.send(self._sock, handover.encode(messages), descriptors)
            except OSError as error:
                self._drop(os.strerror(error.errno or 0))
                return False
            if sent:
                for _ in range(taken):
                    self._outbox.popleft()
            else:
                self._blocked = True
                self._reactor.mask(self._sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return False

    def _queue(self, message: Message, descriptor: socket.socket | None) -> None:
        self._outbox.append((message, msgspec.msgpack.encode(message), descriptor))

    def _on_event(self, mask: int) -> None:
        if mask & select.EPOLLOUT and self._sock is not None:
            self._blocked = False
            self._reactor.mask(self._sock.fileno(), select.EPOLLIN)
        for _ in range(DATAGRAMS_A_TURN):
            if self._sock is None:
                return
            try:
                received = seqpacket.receive(self._sock, MAX_DATAGRAM)
                if received is None:
                    return
                data, descriptors = received
                if not data:
                    self._drop("it has closed")
                    return
                self._read(data, descriptors)
            except OSError as error:
                self._drop(os.strerror(error.errno or 0))
            except (msgspec.DecodeError, UnicodeDecodeError, _PeerFault) as error:
                self._drop(str(error))

    def _read(self, data: bytes, descriptors: list[int]) -> None:
        waiting = deque(descriptors)
        try:
            for message in FLOW_TO_ONRAMP.decode(data):
                if self._sock is None:  # dropped by what the last message led to
                    return
                count = getattr(message, "descriptors", 0)
                if count > len(waiting):
                    raise _PeerFault(f"{type(message).__name__} without its descriptor")
                self._take(message, waiting.popleft() if count else None)
        finally:
            for descriptor in waiting:
                os.close(descriptor)

    def _take(self, message: Message, descriptor: int | None) -> None:
        if self._state is _State.UP and not isinstance(message, Hello):
            self._on_message(self._worker, message, descriptor)
            return
        if descriptor is not None:
            os.close(descriptor)
        if not isinstance(message, Hello) or self._state is _State.UP:
            raise _PeerFault(f"{type(message).__name__} out of order")
        if (message.protocol, message.role, message.worker) != (PROTOCOL, "flow", self._worker):
            raise _PeerFault(f"a {message.role} worker {message.worker} of protocol {message.protocol} answers")
        if message.generation < self._seen_generation:
            raise _PeerFault("it is a flow worker that was replaced")
        self._seen_generation, self._state, self._complained = message.generation, _State.UP, ""
        self._log.info("flow_worker_connected", worker=self._worker)
        self._on_up(self._worker, message.generation)

    def _drop(self, why: str) -> None:
        sock, was_up = self._sock, self.up
        if sock is None:
            return
        self._reactor.remove(sock.fileno())
        sock.close()
        self._sock, self._state, self._blocked = None, _State.DOWN, False
        self._outbox.clear()
        self._retry(why)
        if was_up:
            self._on_down(self._worker)

    def _retry(self, why: str) -> None:
        if why != self._complained:
            self._log.warning("flow_worker_away", worker=self._worker, why=why)
            self._complained = why
        self._reactor.later(RECONNECT_S, self.connect)
