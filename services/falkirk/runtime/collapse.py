"""The same thing over and over, told once and then counted. PURE.

The first one of a key is told at once; those that follow within the window are counted and told together, at its end, and a new window begins with
them. Limit: `most` keys at a time; what comes beside them is counted under no key, once a window.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Window:
    end: float
    count: int = 0


class Collapse(Generic[K]):
    """Windows of `seconds`, by key. Times are monotonic seconds."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._windows: dict[K | None, _Window] = {}

    def first(self, key: K, now: float) -> bool:
        """Count one; True where it must be told now."""
        window = self._windows.get(key)
        if window is not None:
            window.count += 1
            return False
        if len(self._windows) >= self._most:
            self._windows.setdefault(None, _Window(now + self._seconds)).count += 1
            return False
        self._windows[key] = _Window(now + self._seconds)
        return True

    def due(self, now: float) -> list[tuple[K | None, int]]:
        """What came again in windows that have ended, with how often; None stands for keys beyond the limit."""
        told = []
        for key, window in list(self._windows.items()):
            if window.end > now:
                continue
            if window.count:
                told.append((key, window.count))
                self._windows[key] = _Window(now + self._seconds)
            else:
                del self._windows[key]
        if None in self._windows and not self._windows[None].count:
            del self._windows[None]
        return told
