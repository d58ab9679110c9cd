"""Ids of flows and spans."""

from __future__ import annotations

import os


class Randomness:
    """Random bytes, a page at a time: a system call a flow would cost more than the bytes."""

    def __init__(self) -> None:
        self._page = b""
        self._at = 0

    def __call__(self, size: int) -> bytes:
        """That many bytes, each given out once; `size` is small."""
        if self._at + size > len(self._page):
            self._page, self._at = os.urandom(4096), 0
        self._at += size
        return self._page[self._at - size : self._at]
