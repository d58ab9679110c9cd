"""The sliding window of a session's counters (5.4.6; after RFC 6479): each is accepted once, in any order within `WINDOW`.

Kept is what is *missing* below the highest counter, as the bits of one integer: in order that is zero, so that a session whose
packets come in order has no bitmap to move, and an idle one costs nothing.

Limit: a counter more than `WINDOW` - 1 below the highest is refused, seen or not. 8,192 is what other implementations have, and is
enough for what several queues of a network card reorder.
"""

from __future__ import annotations

from typing import Final

WINDOW: Final = 8192
"""How many counters are remembered, the highest included."""
_MASK: Final = (1 << WINDOW) - 1


class Window:
    """The counters of one direction. `may` asks, `take` says that the packet was authentic."""

    __slots__ = ("highest", "missing")

    def __init__(self) -> None:
        self.highest = -1
        """The highest counter that was taken; -1 before the first."""
        self.missing = 0
        """Bit i: `highest` - i wasn't taken. Bits below counter 0 are never set."""

    def may(self, counter: int) -> bool:
        """Whether this counter is new, and not too old to know."""
        age = self.highest - counter
        return age < 0 or (age < WINDOW and self.missing >> age & 1 == 1)

    def take(self, counter: int) -> None:
        """Take a counter that `may` allowed, once its packet has been authenticated."""
        step = counter - self.highest
        if step <= 0:
            self.missing ^= 1 << -step
        else:
            self.highest = counter
            if step >= WINDOW:
                self.missing = _MASK - 1
            elif step > 1 or self.missing:
                self.missing = (self.missing << step | (1 << step) - 2) & _MASK
