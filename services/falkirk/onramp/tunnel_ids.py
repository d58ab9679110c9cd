"""Numbers of tunnels, not used twice while the node runs, whoever is restarted.

A file holds a number that is above every one given out; it is moved on in steps well before it is reached, so a worker that dies
with unreported tunnels can't have passed it. Losing the file (or the machine) is harmless: no tunnel outlives either the flow workers
or the machine.

Limit: a restart leaves a gap of up to `STEP` numbers a worker; after 2^32 they start over.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

STEP: Final = 4096
_LAST: Final = (1 << 32) - 1


class TunnelIds:
    """The file and what it says."""

    def __init__(self, path: Path, workers: int = 1) -> None:
        """Reads the file. Each of the `workers` takes every so many-th number. Raises OSError where the file can't be read."""
        self._path = path
        self._step = STEP * workers
        self._bound = 0
        self._saved = -1
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._bound = int(path.read_text())

    def first(self) -> int:
        """Where a new worker starts; `save` before it does."""
        first = self._bound + 1 if 0 <= self._bound <= _LAST - 2 * self._step else 1
        self._bound = first + self._step
        return first

    def seen(self, number: int) -> None:
        """A worker has given this number out; `save` soon."""
        if self._bound - self._step // 2 < number <= _LAST - 2 * self._step:
            self._bound = number + self._step

    def save(self) -> None:
        """Writes the file where it has to change. Raises OSError."""
        if self._bound == self._saved:
            return
        draft = self._path.with_suffix(".new")
        draft.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(f"{self._bound}\n")
        draft.replace(self._path)
        self._saved = self._bound
