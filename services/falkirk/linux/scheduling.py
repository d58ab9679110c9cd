"""How the kernel schedules a packet process.

SCHED_BATCH (sched(7)) says that a process that is woken doesn't push another off its CPU. Packet processes wake each other
with every datagram; without it two of them on one CPU alternate packet by packet, with it the producer runs on and the
consumer finds a batch. What that gains depends on how busy the CPUs are; `./tools/bench lift` shows the sum.
"""

from __future__ import annotations

import os


def batch() -> None:
    """Make this process one that doesn't preempt when it is woken. Needs no privilege; inherited by children."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
