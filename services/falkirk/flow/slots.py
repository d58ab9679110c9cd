"""NAT slots. A slot names a flow to the kernel of the private namespace.

A pool hands out indices: rested ones first, then fresh ones. A freed index rests for `REST` seconds (Linux TIME_WAIT,
RFC 9293 3.6.1 in the kernel's measure) before it may be handed out again, so nothing that the kernel still remembers
of an address can meet the next flow. Limit: exhaustion refuses new flows, never evicts.

The ring of resting indices is one preallocated array (8 bytes a slot): churn costs no memory.
"""

from __future__ import annotations

from array import array
from typing import Final

REST: Final = 60
"""Seconds that a freed slot rests: TCP_TIMEWAIT_LEN of Linux."""


class SlotPool:
    """Indices [first, first + size). Time is an argument, in monotonic seconds (whole numbers)."""

    def __init__(self, first: int, size: int, *, start: int = 0) -> None:
        """`start` skips that many fresh indices (a predecessor's), wrapping around: they are handed out last."""
        self._first = first
        self._size = size
        self._start = start % size if size else 0
        self._fresh = 0
        self._ring_index = array("I", bytes(4 * size))
        self._ring_time = array("I", bytes(4 * size))
        self._head = 0
        self._resting = 0
        self.active = 0

    @property
    def resting(self) -> int:
        """Freed indices that may not be used yet, or not again so far."""
        return self._resting

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
        if self._resting and now - self._ring_time[self._head] >= REST:
            index = self._ring_index[self._head]
            self._head = (self._head + 1) % self._size
            self._resting -= 1
        elif self._fresh < self._size:
            index = (self._start + self._fresh) % self._size
            self._fresh += 1
        else:
            return None
        self.active += 1
        return self._first + index

    def release(self, index: int, now: int) -> None:
        """Put a claimed index to rest."""
        tail = (self._head + self._resting) % self._size
        self._ring_index[tail] = index - self._first
        self._ring_time[tail] = now
        self._resting += 1
        self.active -= 1
