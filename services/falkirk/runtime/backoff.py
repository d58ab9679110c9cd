"""How long to wait before a process is started again. Time is an argument.

The first restart is at once; then 50 ms, doubling to 2 s. A process that lived 5 s starts the count anew.
"""

from __future__ import annotations

from typing import Final

FIRST_SECONDS: Final = 0.05
LONGEST_SECONDS: Final = 2.0
RESET_SECONDS: Final = 5.0


class Backoff:
    """The waits of one place."""

    def __init__(self) -> None:
        self._next = 0.0

    def ended(self, lived: float) -> float:
        """Seconds to wait after a process that lived for `lived` seconds."""
        if lived >= RESET_SECONDS:
            self._next = 0.0
        wait = self._next
        self._next = min(LONGEST_SECONDS, max(FIRST_SECONDS, 2 * wait))
        return wait
