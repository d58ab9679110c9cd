"""A flow's life: begun, connected, established, closing, ended; each step recorded before the world sees it.

The kernel of the private namespace is the TCP: it answers for sequence numbers, windows and resets (RFC 9293 3.10.7).
This tracker only follows far enough to know when a flow is over:

    HELD         the SYN waits here until the upgrader has connected the upstream; retransmissions are absorbed
    OPENING      the SYN has gone to the kernel; the first segment without SYN completes the handshake
    ESTABLISHED  RFC 5382 REQ-5 idle timer
    CLOSING      a FIN has passed, or the upgrader has let go; ends when both FINs are acknowledged or a RST has passed

A flow ends once the upgrader has said `Closed` *and* the last segments have passed (or the transitory timer ran out): a
slow client still gets all that was sent to it.

Events in, commands out: messages for the upgrader and records for the spool gather in lists, which the loop writes at
the end of its turn, the spool first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT
from typing import TYPE_CHECKING, Final

from falkirk.flow import records
from falkirk.flow.counters import DENIED, ENDED, STARTED
from falkirk.flow.decision import Decision
from falkirk.flow.table import Flow, State, Tunnel
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, Prepare

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
ACK: Final = 16
LINGER: Final = 5
"""Seconds that a flow whose stream was reset waits for the RST to pass."""
REPEAT: Final = 10
"""Seconds over which repeats of one refusal are counted instead of recorded."""
FINISHED: Final = "finished"
"""The upgrader's word for a stream whose FINs have both passed."""
RECORDS: Final = 100
"""Refusals of a tunnel that are recorded a second; a port scan is told as its number, not address by address."""
MAX_REFUSALS: Final = 4096
"""Different refusals a tunnel that are remembered; beyond, each one is recorded."""
_SEQUENCES: Final = struct.Struct(">II")
ENDED_BY_DIAL: Final = {
    ECONNREFUSED: "upstream_refused",
    ECONNRESET: "upstream_refused",
    EHOSTUNREACH: "upstream_unreachable",
    ENETUNREACH: "upstream_unreachable",
    ETIMEDOUT: "upstream_timeout",
}


class Tracker:
    """Lives of the flows of one worker. `random` gives bytes; time is the worker's (`second`, `now`, `wall`)."""

    def __init__(self, worker: Worker, random: Callable[[int], bytes]) -> None:
        self._worker = worker
        self._random = random
        self.finished: list[tuple[Flow, str]] = []
        """Flows whose last segment passed in this turn, and why they end."""
        self._sampled_below = int(worker.start.sample_ratio * (1 << 32))

    # begun

    def begin(
        self, lane: Lane, tunnel: Tunnel, key: bytes, decision: Decision, packet: bytes, timing: tuple[int, int]
    ) -> None:
        """Hold an allowed flow's SYN and have its upstream dialled; refuse it where a limit is reached."""
        worker = self._worker
        refusal = self._limit(tunnel)
        slot = index = None
        if refusal is None:
            slot = lane.pool.claim(worker.second)
            refusal = "slots_exhausted" if slot is None else None
        if slot is not None:
            index = worker.live.claim()
            if index is None:
                refusal = "table_full"
                lane.pool.release(slot, worker.second)
        if slot is None or index is None:
            worker.drop(refusal or "table_full")
            self.refused(tunnel, key, decision, refusal or "table_full", f"{refusal}: see falkirk flow stats")
            return
        route = decision.route
        assert route is not None
        slot_number = lane.first_slot + slot
        flow = Flow(
            tunnel, key, worker.slot_address(slot_number, len(key)) + worker.listener(lane, key), slot_number, index
        )
        flow.flow_id = self._random(16)
        flow.decision = decision
        flow.held = packet
        flow.start = worker.now
        flow.start_wall = worker.wall
        flow.tick = worker.second
        if int.from_bytes(flow.flow_id[8:12], "big") < self._sampled_below:
            flow.span_id = self._random(8)
        tunnel.flows[key] = flow
        lane.flows[slot] = flow
        tunnel.device.flows += 1
        tunnel.device.held += 1
        worker.tenants.add(tunnel.row, 1)
        worker.flow_count += 1
        worker.counts[STARTED] += 1
        worker.wheel.place(flow, worker.second + worker.settings.transitory_idle_s)
        self._record_start(flow, timing)
        timeout = route.connect_timeout_ms or worker.settings.connect_timeout_ms
        worker.to_upgrader.append(
            Prepare(
                slot=slot_number,
                flow_id=flow.flow_id,
                destination=flow.destination,
                port=flow.destination_port,
                egress=route.egress4 if len(key) == 12 else route.egress6,
                connect_timeout_ms=timeout,
                idle_timeout_s=worker.settings.established_idle_s,
                treatment="l4",
                span_id=flow.span_id,
            )
        )
        if flow.span_id:
            worker.tunnels.trace(flow)

    def _limit(self, tunnel: Tunnel) -> str | None:
        settings = self._worker.settings
        context = tunnel.context
        if not self._worker.pair.ready or self._worker.draining:
            return "not_ready"
        if self._worker.spool.stuck:
            return "audit_unwritable"
        if tunnel.device.flows >= (context.device_max_flows or settings.device_flows):
            return "device_limit"
        if tunnel.device.held >= settings.device_held:
            return "device_held_limit"
        if self._worker.tenants.total(tunnel.row) >= (context.tenant_max_flows or settings.tenant_flows):
            return "tenant_limit"
        return None

    # connected

    def connected(self, message: Connected) -> None:
        """The upstream is there: let the SYN go."""
        flow = self._worker.flow_of(message.slot)
        if flow is None:
            self._worker.to_upgrader.append(Abort(message.slot))
            return
        if flow.held is None:
            return
        packet, flow.held = flow.held, None
        flow.tunnel.device.held -= 1
        self._state(flow, State.OPENING)
        self._worker.inject(flow, packet)

    def dial_failed(self, message: DialFailed) -> None:
        """The upstream isn't there: the client learns it in TCP's or ICMP's own words."""
        worker = self._worker
        flow = worker.flow_of(message.slot)
        if flow is None or flow.held is None:
            return
        packet, flow.held = flow.held, None
        flow.tunnel.device.held -= 1
        worker.answers.dial_failed(flow.tunnel, packet, message.errno)
        self.finish(flow, ENDED_BY_DIAL.get(message.errno, "upstream_error"))

    # segments

    def segment_up(self, flow: Flow, buffer: bytearray, l4: int, end: int) -> bool:
        """A segment from the initiator that opens, closes, or comes while the flow isn't established. True: forward it."""
        flags = buffer[l4 + 13]
        state = flow.state
        if flags & SYN and flags & (FIN | RST):
            self._worker.drop("bad_tcp_flags")
            return False
        if state is State.HELD:
            if flags & RST:
                self._worker.to_upgrader.append(Abort(flow.slot))
                self.finished.append((flow, "client_reset"))
            self._worker.drop("syn_held" if flags & SYN else "held")
            return False
        if state is State.OPENING and not flags & SYN:
            self._state(flow, State.ESTABLISHED)
        if flags & SYN and not flags & ACK and flow.over:
            # RFC 9293 3.6.1: a new connection may take the place of one whose end was seen.
            self.finish(flow, flow.reason)
            tunnel = flow.tunnel
            self._worker.ingress.packet(self._worker.lane(tunnel.framing), tunnel, end)
            return False
        if flags & FIN or flow.state is State.CLOSING:
            sequence, acknowledged = _SEQUENCES.unpack_from(buffer, l4 + 4)
            if flags & FIN:
                flow.fin_up = (sequence + end - l4 - (buffer[l4 + 12] >> 4 << 2) + 1) & 0xFFFFFFFF
                self._closing(flow)
            if flow.fin_down is not None and (acknowledged - flow.fin_down) & 0x80000000 == 0:
                flow.fin_acked_down = True
                self._maybe_over(flow)
        return True

    def segment_down(self, flow: Flow, buffer: bytearray, l4: int, end: int) -> None:
        """A segment to the initiator that closes, or passes while the flow isn't established."""
        flags = buffer[l4 + 13]
        if flags & RST:
            flow.reset = True
            self._closing(flow)
            self._maybe_over(flow)
            return
        if flags & FIN or flow.state is State.CLOSING:
            sequence, acknowledged = _SEQUENCES.unpack_from(buffer, l4 + 4)
            if flags & FIN:
                flow.fin_down = (sequence + end - l4 - (buffer[l4 + 12] >> 4 << 2) + 1) & 0xFFFFFFFF
                self._closing(flow)
            if flow.fin_up is not None and (acknowledged - flow.fin_up) & 0x80000000 == 0:
                flow.fin_acked_up = True
                self._maybe_over(flow)

    def _closing(self, flow: Flow) -> None:
        if flow.state is not State.CLOSING:
            self._state(flow, State.CLOSING)

    # ended

    def closed(self, message: Closed) -> None:
        """The upgrader has let go of the slot."""
        flow = self._worker.flow_of(message.slot)
        if flow is None:
            return
        flow.over = True
        flow.reason = flow.reason or message.reason
        if flow.held is not None:
            # Before it said Connected: for the client there is nothing at the other end.
            self._refuse(flow, flow.held)
            self.finish(flow, flow.reason)
            return
        if message.reason in ("client_reset", "never_opened"):
            self.finish(flow, flow.reason)
            return
        self._closing(flow)
        if not self._maybe_over(flow):
            patience = self._worker.settings.transitory_idle_s if message.reason == FINISHED else LINGER
            self._worker.wheel.place(flow, self._worker.second + patience)

    def _maybe_over(self, flow: Flow) -> bool:
        if flow.over and (flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            self.finished.append((flow, flow.reason))
            return True
        return False

    def abort(self, flow: Flow, reason: str) -> None:
        """End a live flow: both sides get a RST, the initiator's by the kernel where it has a connection."""
        flow.reason = flow.reason or reason
        if flow.held is not None:
            self._refuse(flow, flow.held)
            self._worker.to_upgrader.append(Abort(flow.slot))
            self.finish(flow, reason)
            return
        self._worker.to_upgrader.append(Abort(flow.slot))
        self._worker.wheel.place(flow, self._worker.second + LINGER)

    def _refuse(self, flow: Flow, packet: bytes) -> None:
        """Answer the SYN that is held with a reset."""
        flow.held = None
        flow.tunnel.device.held -= 1
        self._worker.answers.reset(flow.tunnel, packet)

    def expire(self) -> None:
        """End what the wheel says is idle. A flow is placed once, at its start; a half-closed one may stay as long as an
        established one."""
        worker = self._worker
        settings = worker.settings
        for flow in worker.wheel.due(worker.second):
            if flow.over and flow.reason == FINISHED and flow.tick + settings.transitory_idle_s > worker.second:
                # A slow client still fetches what the kernel holds for it; nor may the slot rest while the kernel retransmits.
                worker.wheel.place(flow, flow.tick + settings.transitory_idle_s)
                continue
            if flow.over or flow.reason:
                self.finish(flow, flow.reason)
                continue
            settled = flow.state in (State.ESTABLISHED, State.CLOSING)
            limit = settings.established_idle_s if settled else settings.transitory_idle_s
            if flow.tick + limit > worker.second:
                worker.wheel.place(flow, flow.tick + limit)
            else:
                self.abort(flow, "idle")

    def end_of_turn(self) -> None:
        """End the flows whose last segment passed in this turn."""
        finished, self.finished = self.finished, []
        for flow, reason in finished:
            self.finish(flow, reason)

    def finish(self, flow: Flow, reason: str) -> None:
        """Take a flow out of everything and record its end. Doing it twice is doing it once."""
        worker = self._worker
        tunnel = flow.tunnel
        if tunnel.flows.get(flow.key) is not flow:
            return
        del tunnel.flows[flow.key]
        if flow.held is not None:
            flow.held = None
            tunnel.device.held -= 1
            worker.drop("tunnel_closed" if reason == "tunnel_closed" else "held")
        tunnel.device.flows -= 1
        worker.tenants.add(tunnel.row, -1)
        worker.flow_count -= 1
        worker.counts[ENDED] += 1
        lane = worker.lane(tunnel.framing)
        slot = flow.slot - lane.first_slot
        lane.flows[slot] = None
        lane.pool.release(slot, worker.second, long=flow.long_rest)
        worker.wheel.remove(flow)
        worker.write_record(
            "ended",
            flow.flow_id,
            tunnel.audit
            + records.of_key(flow.key)
            + self._decided(flow)
            + records.of_reason(reason)
            + records.of_counts(
                flow.bytes_up, flow.bytes_down, flow.packets_up, flow.packets_down, worker.now - flow.start
            )
            + records.of_trace(flow.span_id),
        )
        worker.released.append(flow.index)

    def checkpoint(self) -> None:
        """Write the counts of flows that had packets since the last one."""
        worker = self._worker
        for flow in worker.dirty:
            if flow.bucket:
                worker.live.counts(
                    flow.index, worker.wall, flow.bytes_up, flow.bytes_down, flow.packets_up, flow.packets_down
                )
        worker.dirty.clear()

    # records

    def refused(self, tunnel: Tunnel, key: bytes, decision: Decision, reason: str, why: str) -> None:
        """Record a refusal; repeats of one within `REPEAT` seconds are counted and told with the next record."""
        worker = self._worker
        worker.counts[DENIED] += 1
        destination, port = (key[4:8], key[10:12]) if len(key) == 12 else (key[16:32], key[34:36])
        at = (destination, int.from_bytes(port, "big"), reason)
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
            tunnel.refused[at] = [worker.second - REPEAT, repeats + 1]
            return
        tunnel.refused[at] = [worker.second, 0]
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

    def _record_start(self, flow: Flow, timing: tuple[int, int]) -> None:
        worker = self._worker
        tunnel = flow.tunnel
        flow.sequence = worker.write_record(
            "started",
            flow.flow_id,
            tunnel.audit + records.of_key(flow.key) + self._decided(flow) + records.of_trace(flow.span_id, *timing),
        )
        decision = flow.decision
        assert decision is not None
        worker.live.begin(
            flow.index,
            State.HELD,
            worker.lane(tunnel.framing).raw,
            tunnel.id,
            flow.slot,
            flow.key,
            flow.flow_id,
            flow.sequence,
            flow.start_wall,
            decision.route_bytes,
            decision.rule_bytes,
        )

    @staticmethod
    def _decided(flow: Flow) -> str:
        return flow.decision.audit if flow.decision is not None else ""

    def _state(self, flow: Flow, state: State) -> None:
        flow.state = state
        self._worker.live.state(flow.index, state)
