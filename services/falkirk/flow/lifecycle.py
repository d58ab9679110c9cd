"""What all flows share, whatever their protocol: limits, records, the live table, idle timers.

    refusal ─► begin ─► state … state ─► finish
                 │                         │
            "started" record          "ended" record

A kind of flow (`falkirk.flow.table.Owner`) decides when its flows begin and why they end; here it is made sure that each one is
counted for its device and its tenant, lies in the wheel and in the live table, and has one `started` and one `ended` record,
the first in the spool before anything is asked of the upgrader. Flows that are refused are recorded here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from falkirk.flow import quota, records
from falkirk.flow.counters import DENIED, ENDED, STARTED
from falkirk.flow.decision import Decision, Outcome
from falkirk.flow.keys import signature
from falkirk.flow.live import kind_of
from falkirk.flow.table import Flow, Leg, State, Tunnel
from falkirk.wire.context import Framing

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

REPEAT: Final = 10
"""Seconds over which repeats of one refusal are counted instead of recorded."""
RECORDS: Final = 100
"""Refusals of a tunnel that are recorded a second; a port scan is told as its number, not address by address."""
MAX_REFUSALS: Final = 4096
"""Different refusals a tunnel that are remembered; beyond, each one is recorded."""


class Lifecycle:
    """Begins and ends of one worker's flows. `random` gives bytes; time is the worker's (`second`, `now`, `wall`)."""

    def __init__(self, worker: Worker, random: Callable[[int], bytes]) -> None:
        self._worker = worker
        self._random = random
        self._sampled_below = int(worker.start.sample_ratio * (1 << 32))

    # begun

    def refusal(self, tunnel: Tunnel, *, lifted: bool = True) -> str | None:
        """Why this tunnel may not have another flow now; None where it may. One that isn't `lifted` needs no upgrader."""
        worker = self._worker
        load = quota.Load(
            (worker.pair.ready or not lifted) and not worker.draining,
            not worker.spool.stuck,
            tunnel.device.flows,
            tunnel.device.held,
            worker.tenants.total(tunnel.row),
            worker.live.full,
        )
        return quota.refusal(load, tunnel.context, worker.settings)

    def refuse(self, tunnel: Tunnel, key: bytes, decision: Decision, reason: str) -> None:
        """An allowed flow's first packet is dropped, as a limit is reached."""
        self._worker.drop(reason)
        self.refused(tunnel, key, decision, reason, f"{reason}: see falkirk flow stats")

    def begin(
        self, flow: Flow, decision: Decision, timing: tuple[int, int], idle_s: int, state: State = State.HELD
    ) -> None:
        """Enter a flow that nothing refuses into all tables and record its start. It times out after `idle_s` seconds."""
        worker = self._worker
        tunnel = flow.tunnel
        index = worker.live.claim()
        assert index is not None  # `refusal` has said that there is room.
        flow.index = index
        flow.state = state
        flow_id = self._random(16)
        flow.decision = decision
        flow.tick = worker.second
        if int.from_bytes(flow_id[8:12], "big") < self._sampled_below:
            flow.span_id = self._random(8)
        tunnel.begin(flow.key, flow)
        tunnel.device.flows += 1
        if state is State.HELD:
            tunnel.device.held += 1
        worker.tenants.add(tunnel.row, 1)
        worker.flow_count += 1
        worker.counts[STARTED] += 1
        worker.wheel.place(flow, worker.second + idle_s)
        wall = worker.wall
        sequence = worker.write_record(
            "started",
            flow_id,
            tunnel.audit + records.of_key(flow.key) + decision.audit + records.of_trace(flow.span_id, *timing),
        )
        worker.live.begin(
            index,
            state,
            kind_of(tunnel.framing is Framing.RAW, decision.outcome is Outcome.FORWARD),
            tunnel.id,
            flow.slot,
            flow.key,
            flow_id,
            sequence,
            wall,
            decision.route_bytes,
            decision.rule_bytes,
            worker.now,
        )
        if flow.span_id:
            worker.tunnels.trace(flow, flow_id, wall)

    # meanwhile

    def identity(self, flow: Flow) -> bytes:
        """The id of a flow that has begun, also in the turn in which it ends; a leg's is its flow's. It lies in the live table only, as it is rarely asked for."""
        whose = flow.flow if isinstance(flow, Leg) else flow
        return self._worker.live.identity(whose.index) if whose is not None and whose.index >= 0 else b""

    def state(self, flow: Flow, state: State) -> None:
        """A flow is somewhere else in its life. Leaving HELD is the caller's to count for the device."""
        flow.state = state
        self._worker.live.state(flow.index, state)

    def expire(self) -> None:
        """The flows whose turn has come, by the wheel."""
        for flow in self._worker.wheel.due(self._worker.second):
            flow.owner.expire(flow)

    def checkpoint(self) -> None:
        """Write the counts of flows that had packets since the last one."""
        worker = self._worker
        for flow in worker.dirty:
            if flow.bucket and flow.index >= 0:
                worker.live.counts(
                    flow.index, worker.wall, flow.bytes_up, flow.bytes_down, flow.packets_up, flow.packets_down
                )
        worker.dirty.clear()

    # ended

    def finish(self, flow: Flow, reason: str) -> None:
        """Take a flow out of everything and record its end. Doing it twice is doing it once."""
        worker = self._worker
        tunnel = flow.tunnel
        if tunnel.flows.get(flow.key) is not flow:
            return
        del tunnel.flows[flow.key]
        tunnel.device.flows -= 1
        worker.tenants.add(tunnel.row, -1)
        worker.flow_count -= 1
        worker.counts[ENDED] += 1
        flow.owner.release(flow, reason)
        worker.wheel.remove(flow)
        decision = flow.decision
        worker.write_record(
            "ended",
            worker.live.identity(flow.index),
            tunnel.audit
            + records.of_key(flow.key)
            + (decision.audit if decision is not None else "")
            + records.of_reason(reason)
            + records.of_counts(
                flow.bytes_up,
                flow.bytes_down,
                flow.packets_up,
                flow.packets_down,
                worker.now - worker.live.born(flow.index),
            )
            + records.of_trace(flow.span_id),
        )
        worker.released.append(flow.index)

    # refused

    def refused(self, tunnel: Tunnel, key: bytes, decision: Decision, reason: str, why: str) -> None:
        """Record a refusal; repeats of one within `REPEAT` seconds are counted and told with the next record."""
        worker = self._worker
        worker.counts[DENIED] += 1
        protocol, _, destination, _, port = signature(key)
        at = (destination, protocol << 16 | port, reason)
        seen = tunnel.refused.get(at)
        if seen is not None and worker.second - seen[0] < REPEAT:
            seen[1] += 1
            return
        repeats = seen[1] if seen is not None else 0
        if len(tunnel.refused) >= MAX_REFUSALS:
            tunnel.refused.clear()
        if tunnel.records_tick != worker.second:
            unrecorded, tunnel.unrecorded = tunnel.unrecorded, 0
            tunnel.records_tick, tunnel.records_left = worker.second, RECORDS
            if unrecorded:
                told = records.of_reason("refusals_unrecorded") + f',"count":{unrecorded}'
                worker.write_record("denied", self._random(16), tunnel.audit + told)
        if not tunnel.records_left:
            tunnel.unrecorded += 1
            return
        tunnel.records_left -= 1
        if worker.spool.stuck:
            # Told with the next record of it: what the disk doesn't take must not fill the memory.
            tunnel.refuse(at, worker.second - REPEAT, repeats + 1)
            return
        tunnel.refuse(at, worker.second, 0)
        flow_id = self._random(16)
        span_id = self._random(8) if int.from_bytes(flow_id[8:12], "big") < self._sampled_below else b""
        told = f',"count":{repeats}' if repeats else ""
        worker.write_record(
            "denied",
            flow_id,
            tunnel.audit
            + records.of_key(key)
            + records.of_decision(decision, why)
            + records.of_reason(reason)
            + told
            + records.of_trace(span_id),
        )
