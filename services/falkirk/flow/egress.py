"""The slow path back: packets out of the private namespace that no live flow of this worker expects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from falkirk.flow.counters import FORWARDED

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

RST = 4


class Egress:
    """Slow path of one worker, towards tunnels."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def other(self, lane: Lane, end: int) -> None:
        """Not a plain TCP segment: the kernel's own chatter (multicast listener reports), or an ICMP error about a segment
        that the kernel refused. Neither concerns a client: its TCP hears of trouble by a RST."""
        self._worker.drop("not_tcp")

    def unknown(self, lane: Lane, end: int, index: int, l4: int) -> None:
        """A segment for a slot without a flow: the RST of a predecessor's stream finds its way; all else is late."""
        worker = self._worker
        orphan = worker.orphans.take(lane, index, worker.listener_port) if lane.buffer[l4 + 13] & RST else None
        tunnel = worker.tunnels.reach(orphan.tunnel) if orphan is not None else None
        if orphan is None or tunnel is None or tunnel.framing is not lane.framing:
            worker.drop("no_flow")
            return
        lane.rewrite_back(orphan, l4)
        if worker.deliver(tunnel, lane.view[10:end] if lane.raw else lane.view[:end]):
            worker.counts[FORWARDED] += 1
        else:
            worker.orphans.untold(orphan)
