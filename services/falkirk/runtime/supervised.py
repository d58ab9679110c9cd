"""A service that `falkirk up` started: it dies with its supervisor, and knows how often it was started.

`falkirk up` can't ask the kernel on the child's behalf without running code between fork and exec (not safe beside threads), so it says who it is in the
environment, and the child binds itself: PR_SET_PDEATHSIG with SIGKILL, then a look whether the supervisor died before that. The service's own
workers end with their pair.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

SUPERVISOR: Final = "FALKIRK_SUPERVISOR_PID"
GENERATION: Final = "FALKIRK_GENERATION"
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36


def bind() -> None:
    """Dies with the supervisor from now on; does nothing in a process that was started by hand."""
    supervisor = os.environ.pop(SUPERVISOR, "")
    if not supervisor:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(supervisor):
        os.kill(os.getpid(), signal.SIGKILL)


def generation() -> int:
    """Starts of this service since its supervisor started, this one included; 1 without a supervisor."""
    return int(os.environ.get(GENERATION, "1"))


def adopt_orphans() -> None:
    """Descendants whose parent died become children of this process, which then waits for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
