"""What the C library's heap gives back to the kernel.

glibc raises its threshold for what it takes from the kernel directly, up to 32 MiB, each time such a buffer is freed, and lets twice as much lie at the heap's end. A service that
now and then has a large snapshot or message in hand would so keep the room for it: a kilobyte a device in some, of ten thousand devices.

Limit: glibc only; elsewhere it does nothing. Not for packet workers, which have large buffers often: each would be a system call and its pages' faults.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

LARGE: Final = 256 * 1024
"""Bytes of a buffer that comes from the kernel and goes back to it once it is free, and of what is kept free at the heap's end."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def give_back() -> None:
    """Fix both thresholds for this process."""
    # musl's library has no such function.
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, LARGE)
