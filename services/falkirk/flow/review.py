"""Live flows against what decides now: rules, routes or a device's context have changed.

Every flow of the tunnels concerned is decided again, a slice of at most `SLICE` a turn, so that no packet waits for a hundred thousand of
them; decisions are remembered a tunnel, so flows to one destination cost one. A flow that may go on goes on, under the name of the rule that
allows it now; one that may not, or whose way leads elsewhere, is ended in the words of its protocol, with the reason in its record
(`falkirk.flow.decision.superseded`).

Tunnels are looked at in turn: a change that comes while another's review is under way puts those that are through at the end and
leaves the others where they are, so changes that come faster than reviews end starve no tunnel.

Limit: one decision isn't cut in slices; 10,000 rules without any guard take 20 ms.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from falkirk.flow.decision import superseded
from falkirk.flow.keys import signature

if TYPE_CHECKING:
    from falkirk.flow.table import Tunnel
    from falkirk.flow.worker import Worker

SLICE: Final = 2_000_000
"""Nanoseconds a turn."""


class Review:
    """What is still to be looked at, of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: dict[int, bool] = {}
        """Tunnels by number, in their order; True where their device has changed."""
        self._steps: Iterator[None] = iter(())
        self._current = 0
        """The tunnel under way; 0 for none."""

    @property
    def pending(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._current)

    def everything(self) -> None:
        """Rules or routes have changed."""
        for tunnel in self._worker.tunnels.values():
            tunnel.memo.clear()
            if tunnel.flows:
                self._waiting.setdefault(tunnel.id, False)

    def tunnel(self, tunnel: Tunnel) -> None:
        """A tunnel's context has changed."""
        tunnel.memo.clear()
        if tunnel.flows:
            self._waiting[tunnel.id] = True

    def step(self) -> None:
        """One slice."""
        until = time.monotonic_ns() + SLICE
        while True:
            for _ in self._steps:
                if time.monotonic_ns() > until:
                    return
            if not self._waiting:
                self._current = 0
                return
            self._current = next(iter(self._waiting))
            self._steps = self._flows(self._current, changed=self._waiting.pop(self._current))

    def _flows(self, number: int, *, changed: bool) -> Iterator[None]:
        worker = self._worker
        tunnel = worker.tunnels.get(number)
        # Those that begin meanwhile are decided by what holds now.
        for flow in list(tunnel.flows.values()) if tunnel is not None else ():
            tunnel = flow.tunnel
            before = flow.decision
            # One that ends already goes on ending; one that has ended is nobody's; a leg is its flow's, and an administrator's flow no rule's.
            if before is None or before.route is None or flow.reason or tunnel.flows.get(flow.key) is not flow:
                continue
            protocol, _, destination, _, port = signature(flow.key)
            now = tunnel.memo.get((destination, port, protocol))
            if now is None:
                now, _ = worker.ingress.decide(tunnel, destination, port, protocol)
            reason = superseded(before, now, flow.family, device_changed=changed)
            if reason:
                flow.owner.end(flow, reason)
            else:
                flow.decision = now
                if now.rule != before.rule or now.route_id != before.route_id:
                    worker.live.decided(flow.index, now.route_bytes, now.rule_bytes)
            yield
