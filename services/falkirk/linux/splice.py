"""Moving bytes between two descriptors without reading them: splice(2) through a pipe.

A relay direction owns a pipe while it has bytes in it. `Pipes` keeps a few empty ones for reuse, because making one
costs more than a small transfer. Limit: an unprivileged user's pipes share a page allowance (pipe-user-pages-soft);
past it a pipe keeps the kernel's smaller default size, which only costs speed.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final, NamedTuple

SPLICE_MOVE: Final = 1
SPLICE_NONBLOCK: Final = 2
PIPE_SIZE: Final = 256 * 1024
"""Bytes that a pipe holds, and that one splice moves at most."""


class Pipe(NamedTuple):
    """A pipe's two ends: bytes enter at `write` and leave at `read`."""

    read: int
    write: int


def splice(source: int, target: int, count: int) -> int | None:
    """Move up to `count` bytes; one of the two must be a pipe. None where it would block; 0 at the source's end.

    Raises OSError as reading the source or writing the target would.
    """
    try:
        return os.splice(source, target, count, flags=SPLICE_MOVE | SPLICE_NONBLOCK)
    except BlockingIOError:
        return None


class Pipes:
    """Empty pipes to borrow. `open` counts those that exist, lent or spare: two descriptors each."""

    def __init__(self, spare: int, size: int = PIPE_SIZE) -> None:
        """Keep at most `spare` unused ones."""
        self._keep = spare
        self._size = size
        self._spare: list[Pipe] = []
        self.open = 0

    def take(self) -> Pipe:
        """An empty pipe. Raises OSError (EMFILE, ENFILE)."""
        if self._spare:
            return self._spare.pop()
        pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        self.open += 1
        try:
            fcntl.fcntl(pipe.write, fcntl.F_SETPIPE_SZ, self._size)
        except PermissionError:
            # Past pipe-user-pages-soft: the default size serves, slower.
            return pipe
        return pipe

    def give_back(self, pipe: Pipe, empty: bool) -> None:
        """Return a pipe; one that may still hold bytes is closed, so that they never reach another stream."""
        if empty and len(self._spare) < self._keep:
            self._spare.append(pipe)
            return
        self.open -= 1
        os.close(pipe.read)
        os.close(pipe.write)

    def close(self) -> None:
        """Close the spare ones."""
        while self._spare:
            pipe = self._spare.pop()
            self.open -= 1
            os.close(pipe.read)
            os.close(pipe.write)
