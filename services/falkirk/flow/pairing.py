"""The upgrader beside a worker: reached, given up, and what its end means for flows.

While it is away new flows are refused as `not_ready`. An upgrader that is gone for half a second has lost its streams: their flows end, after what
its kernel still had to say (resets mostly) was read from the devices.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Final

from falkirk.flow import control, counters, peers
from falkirk.linux import tun
from falkirk.wire.context import Framing
from falkirk.wire.handover import AbortAll, Devices

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

SECOND: Final = 1_000_000_000
ADOPTION: Final = SECOND
"""How long a restarted worker waits for its predecessor's tunnels before it resets their streams."""


class UpgraderPair:
    """The connection to the upgrader worker of the same number, and whether flows may start."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.ready = False
        """Paired, with rules and routes loaded: new flows may start."""
        self.link: peers.UpgraderLink | None = None
        """The upgrader that gave its devices."""
        self.dialled: peers.UpgraderLink | None = None
        """The newest connection, whether or not it has given any."""
        self._next_dial = 0
        self._lost_at: int | None = None
        self.adoption_deadline = worker.now + ADOPTION
        """Until when a predecessor's tunnels are waited for, monotonic nanoseconds."""

    @property
    def whole(self) -> bool:
        """Nothing is to mend."""
        return self.ready and self.link is not None and self._lost_at is None

    def paired(self, link: peers.UpgraderLink, message: Devices, fds: list[int]) -> None:
        """The upgrader worker gave its devices."""
        worker = self._worker
        if message.workers != worker.start.workers:
            for fd in fds:
                os.close(fd)
            worker.log.error("workers_differ", flow=worker.start.workers, upgrader=message.workers)
            return
        self._bereave()
        worker.listener_port = message.listener_port.to_bytes(2, "big")
        lanes = [
            lanes[framing] for lanes in (worker.lanes, worker.lowering.lanes) for framing in (Framing.VNET, Framing.RAW)
        ]
        for lane, fd in zip(lanes, fds, strict=True):
            if lane.tun >= 0:
                worker.unwatch(lane.tun)
                os.close(lane.tun)
            os.set_blocking(fd, False)
            lane.tun = fd
        # What this kernel's devices take, those of `vnet` tunnels take too.
        worker.udp.trains = tun.take_uso(worker.lanes[Framing.VNET].tun)
        # Even from an upgrader that has given some before: its streams went with the devices.
        self.ready = False
        self.link = link
        self._lost_at = None
        worker.counts[counters.PAIRED] = 1
        self.mend()

    def unpaired(self, link: peers.UpgraderLink) -> None:
        """The upgrader worker is gone. What its sockets say at their end (RST) still comes out of the devices."""
        worker = self._worker
        if self.link is link:
            self._lost_at = worker.now
            self.link = None
            self.ready = False
            self._next_dial = worker.now
            worker.counts[counters.PAIRED] = 0
            worker.tell(control.Status(paired=False, ready=False))

    def _bereave(self) -> None:
        """End the flows of an upgrader that is gone; first what its kernel still had to say, which are resets mostly."""
        worker = self._worker
        self._drain_devices()
        for tunnel in worker.tunnels.values():
            for flow in list(tunnel.flows.values()):
                flow.owner.bereave(flow, "upgrader_lost")
        worker.orphans.probe(worker)

    def _drain_devices(self) -> None:
        for lane in self._worker.all_lanes():
            while lane.tun >= 0 and lane.from_tun():
                pass

    def mend(self) -> None:
        """Towards being ready: reach the upgrader, clear what is lost, take new flows."""
        worker = self._worker
        if self._lost_at is not None and worker.now - self._lost_at > SECOND // 2:
            self._bereave()
            self._lost_at = None
        if self.link is None:
            if worker.now >= self._next_dial and not self._dialling():
                self._next_dial = worker.now + peers.RETRY
                path = Path(worker.start.run_dir, "mesh", f"upgrader.worker.{worker.start.worker}.sock")
                self.dialled = peers.dial_upgrader(worker, path, worker.hello())
            return
        if self.ready or not worker.snapshots.complete:
            return
        if worker.now < self.adoption_deadline and not all(map(worker.tunnels.carries, worker.orphans.tunnels)):
            return
        # What a predecessor's streams have sent meanwhile fills the devices' queues, and a RST that finds no room is lost.
        self._drain_devices()
        self.link.send([AbortAll()])
        for lane in worker.all_lanes():
            if lane.tun not in worker.handlers:
                worker.watch(lane.tun, select.EPOLLIN, lane.readable)
        self.ready = True
        worker.gauges()
        worker.tell(control.Status(paired=True, ready=True))

    def _dialling(self) -> bool:
        return self.dialled is not None and self.dialled.sock.fileno() >= 0
