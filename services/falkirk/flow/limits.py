"""Flows of a tenant, counted over all workers of a node without asking anybody.

One shared file of rows: the tenant's id (16 bytes) and one u32 a worker. A worker writes only its own column and sums a
row at a flow's start; rows are found by hashing, and made under a file lock. The sum may miss starts of the same moment
in other workers: the limit is exact a worker and may be passed by at most one flow a worker in a race.

Limit: 16,384 tenants a node; a tenant beyond that is refused.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from typing import Final

ROWS: Final = 16384
MAX_WORKERS: Final = 64
_ID: Final = 16
_ROW: Final = _ID + 4 * MAX_WORKERS
SIZE: Final = ROWS * _ROW


class TenantCounts:
    """One worker's access to the shared rows in `fd` (a memfd of `SIZE` bytes)."""

    def __init__(self, fd: int, workers: int, worker: int) -> None:
        """Clears this worker's column: its predecessor's flows are gone."""
        self._fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._workers = workers
        self._words = memoryview(self._map).cast("I")
        self._offset = _ID + 4 * worker
        for row in range(ROWS):
            self._words[(row * _ROW + self._offset) >> 2] = 0

    def row(self, tenant_id: bytes) -> int | None:
        """The tenant's row, made where it is missing; None where there are too many tenants. `tenant_id`: 16 bytes."""
        start = zlib.crc32(tenant_id) % ROWS
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            for step in range(ROWS):
                at = (start + step) % ROWS * _ROW
                found = self._map[at : at + _ID]
                if found == tenant_id:
                    return at
                if not any(found):
                    self._map[at : at + _ID] = tenant_id
                    return at
            return None
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def total(self, row: int) -> int:
        """Flows of the tenant on this node."""
        first = (row + _ID) >> 2
        return self._words[first] if self._workers == 1 else sum(self._words[first : first + self._workers])

    def close(self) -> None:
        """Let go of the rows; they stay as they are."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def add(self, row: int, change: int) -> None:
        """Count a flow's start (1) or end (-1)."""
        self._words[(row + self._offset) >> 2] += change


def flows_of(fd: int, tenant_id: bytes) -> int:
    """Flows of a tenant on this node, as any process with the shared rows can see them; 0 where it has none. `tenant_id`: 16 bytes."""
    start = zlib.crc32(tenant_id) % ROWS
    with mmap.mmap(fd, SIZE, access=mmap.ACCESS_READ) as rows:
        for step in range(ROWS):
            at = (start + step) % ROWS * _ROW
            found = rows[at : at + _ID]
            if found == tenant_id:
                return sum(memoryview(rows[at + _ID : at + _ROW]).cast("I"))
            if not any(found):
                break
    return 0
