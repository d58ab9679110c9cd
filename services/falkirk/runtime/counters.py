"""Counters in shared memory: a packet worker counts, its parent reads, nobody waits.

The parent makes a memfd of one u64 a name with `Counters.create`, passes `.fd` to the worker (over the pair, or as an inherited descriptor), and
the worker opens it with `Counters.attach` and the same names. Counting is `counters.view[INDEX] += n` on a memoryview of format "Q": about
60 ns, no lock, no system call. One writer a memory (a worker); a restarted worker attaches the same memory and goes on, so counts never
go back. Eight aligned bytes are read and written whole on the machines that we run on, so a reader never sees half a number.

Imports nothing heavy: packet workers use it. `falkirk.runtime.metrics.CountersCollector` shows counters to Prometheus.

Limit: a count wraps nowhere near 2^64; adding beyond raises ValueError in the writer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence

_WIDTH = 8


class Counters:
    """Named u64s. `view[i]` is the count of `names[i]`; `index` gives i by name; `fd` is the memory's descriptor (close-on-exec)."""

    def __init__(self, fd: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.index: Mapping[str, int] = {name: place for place, name in enumerate(self.names)}
        if len(self.index) != len(self.names):
            raise ValueError("a counter's name is given twice")
        self.fd = fd
        size = max(1, len(self.names)) * _WIDTH
        self._map = mmap.mmap(fd, size)  # ValueError where the memory is smaller than the names need
        self.view = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, names: Sequence[str]) -> Counters:
        """New memory, all zero."""
        fd = os.memfd_create("falkirk-counters", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(1, len(names)) * _WIDTH)
        return cls(fd, names)

    @classmethod
    def attach(cls, fd: int, names: Sequence[str]) -> Counters:
        """Memory that another process made with the same names; takes the descriptor over. ValueError where the sizes differ."""
        if os.fstat(fd).st_size != max(1, len(names)) * _WIDTH:
            raise ValueError(f"the memory has {os.fstat(fd).st_size} bytes, {len(names)} counters need others")
        return cls(fd, names)

    def add(self, name: str, count: int = 1) -> None:
        """Counts by name, off the hot path."""
        self.view[self.index[name]] += count

    def read(self, name: str) -> int:
        """One count."""
        return self.view[self.index[name]]

    def values(self) -> dict[str, int]:
        """All counts by name."""
        return dict(zip(self.names, self.view, strict=False))

    def close(self) -> None:
        """Lets go of the memory; other processes keep theirs."""
        self.view.release()
        self._map.close()
        os.close(self.fd)
