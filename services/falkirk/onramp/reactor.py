"""The worker's loop: epoll and timers, one thread, nothing else.

Handlers are called with the event mask; after all handlers of a turn the `after` callbacks run (they flush what the turn has queued, and do
a slice of longer work). A handler that was removed earlier in the same turn isn't called.

Limit: 64 events a turn; timers are as exact as epoll's millisecond.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
from collections.abc import Callable
from typing import Final

EVENTS_A_TURN: Final = 64

Handler = Callable[[int], None]


class Timer:
    """A call that is to come; `cancel` it, or let it happen."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """It won't be called. Idempotent."""
        self._call = None

    def fire(self) -> None:
        """Call it, unless cancelled."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Reactor:
    """Descriptors, timers, and the loop over both."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._running = True
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self.after: list[Callable[[], bool]] = []
        """Called after each turn; true: there is more to do, so don't wait."""

    def add(self, fd: int, mask: int, handler: Handler) -> None:
        """Watch a descriptor."""
        self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def mask(self, fd: int, mask: int) -> None:
        """Watch a descriptor for other events."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Watch a descriptor no more; call it before the descriptor is closed or handed on."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, after so many seconds."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """`run` returns after this turn. May be called by a signal handler."""
        self._running = False
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Turn until `stop`."""
        more = False
        while self._running:
            more = self._turn(0 if more else self._wait())
        self._epoll.close()
        os.close(self._wake)

    def _turn(self, timeout: float) -> bool:
        for fd, mask in self._epoll.poll(timeout, EVENTS_A_TURN):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(mask)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()
        return sum(call() for call in self.after) > 0

    def _wait(self) -> float:
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())
