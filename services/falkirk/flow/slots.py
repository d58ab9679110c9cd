"""NAT slots. A slot names a flow to the kernel of the private namespace. PURE.

A pool hands out indices: rested ones first, then fresh ones. A freed index rests before it may be handed out again, so
nothing that the kernel still remembers of an address can meet the next flow: `REST` seconds (Linux TIME_WAIT, RFC 9293
3.6.1 in the kernel's measure), or `LONG_REST` where the kernel learned an IPv6 path MTU for it, which it keeps ten minutes
(RFC 8201 4; there is no setting for less in a namespace, while IPv4's is set to less than `REST`).

Limit: exhaustion refuses new flows, never evicts.

Resting indices wait in two queues, one for each rest, threaded through two preallocated arrays (8 bytes a slot): churn
costs no memory.
"""

from __future__ import annotations

from array import array
from typing import Final

REST: Final = 60
"""Seconds that a freed slot rests: TCP_TIMEWAIT_LEN of Linux."""
LONG_REST: Final = 600
"""The same where a packet too big was told to its address: net.ipv6.route.mtu_expires of Linux."""


class _Queue:
    """First in, first out, of indices that rest equally long."""

    __slots__ = ("head", "length", "rest", "tail")

    def __init__(self, rest: int) -> None:
        self.rest = rest
        self.head = self.tail = self.length = 0


class SlotPool:
    """Indices [first, first + size). Time is an argument, in monotonic seconds (whole numbers)."""

    def __init__(self, first: int, size: int, *, start: int = 0) -> None:
        """`start` skips that many fresh indices (a predecessor's), wrapping around: they are handed out last."""
        self._first = first
        self._size = size
        self._start = start % size if size else 0
        self._fresh = 0
        self._next = array("I", bytes(4 * size))
        self._freed = array("I", bytes(4 * size))
        self._short = _Queue(REST)
        self._long = _Queue(LONG_REST)
        self.active = 0

    @property
    def resting(self) -> int:
        """Freed indices that may not be used yet, or not again so far."""
        return self._short.length + self._long.length

    @property
    def size(self) -> int:
        """Indices there are."""
        return self._size

    @property
    def cursor(self) -> int:
        """Where fresh indices go on; a successor's `start`."""
        return (self._start + self._fresh) % self._size if self._size else 0

    def claim(self, now: int) -> int | None:
        """An index, or None where all are in use or resting."""
        for queue in (self._short, self._long):
            if queue.length and now - self._freed[queue.head] >= queue.rest:
                index = queue.head
                queue.head = self._next[index]
                queue.length -= 1
                break
        else:
            if self._fresh == self._size:
                return None
            index = (self._start + self._fresh) % self._size
            self._fresh += 1
        self.active += 1
        return self._first + index

    def release(self, index: int, now: int, *, long: bool = False) -> None:
        """Put a claimed index to rest; `long` where the kernel was told a path MTU for its IPv6 address."""
        index -= self._first
        queue = self._long if long else self._short
        if queue.length:
            self._next[queue.tail] = index
        else:
            queue.head = index
        queue.tail = index
        queue.length += 1
        self._freed[index] = now
        self.active -= 1
