"""An orderly end: what a flow worker does between SIGTERM and its exit.

Every live flow is ended as `falkirk flow kill` ends one (both sides get a RST, its record says `drained`), new ones are refused, and the worker
goes once the last RST has passed and the last record is on disk, or after `DRAIN`. Tunnels stay open: the on-ramp holds copies of them, and the
next worker reads on.

Limit: a client that still fetches what its server had ended gets a probe instead of the rest (see `falkirk.flow.orphans`), and is reset by the next
worker.
"""

from __future__ import annotations

import select
import signal
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

DRAIN: Final = 1_500_000_000
"""Nanoseconds that resets may take to pass; below the grace of `falkirk.runtime.workers`."""
TURN: Final = 0.05
"""Seconds that a turn may wait meanwhile."""


class Drain:
    """Begins with SIGTERM in the process that made it (`on_sigterm`), or with `begin`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._deadline = 0

    def on_sigterm(self) -> None:
        """Begin when SIGTERM comes. SIGINT is the supervisor's to judge."""
        self._woken, self._wake = socket.socketpair()
        for sock in (self._woken, self._wake):
            sock.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        def woken(_: int) -> None:
            self._woken.recv(64)
            self.begin()

        self._worker.watch(self._woken.fileno(), select.EPOLLIN, woken)

    def begin(self) -> None:
        """End every flow. Doing it twice is doing it once."""
        worker = self._worker
        if worker.draining:
            return
        worker.draining = True
        self._deadline = worker.now + DRAIN
        for tunnel in worker.tunnels.values():
            for flow in list(tunnel.flows.values()):
                if not flow.reason:
                    flow.owner.end(flow, "drained")

    def turns(self) -> None:
        """Turn until everything has passed or the time is over, then end what is left."""
        worker = self._worker
        while worker.flow_count and worker.now < self._deadline:
            worker.turn(TURN)
        for tunnel in worker.tunnels.values():
            for flow in list(tunnel.flows.values()):
                flow.owner.bereave(flow, flow.reason or "drained")
        worker.orphans.probe(worker)
        worker.turn(0)
