"""A lifted TCP flow's life: begun, connected, established, closing, ended; each step recorded before the world sees it.

The kernel of the private namespace is the TCP: it answers for sequence numbers, windows and resets (RFC 9293 3.10.7).
This tracker only follows far enough to know when a flow is over:

    HELD         the SYN waits here until the upgrader has connected the upstream; retransmissions are absorbed
    OPENING      the SYN has gone to the kernel; the first segment without SYN completes the handshake
    ESTABLISHED  RFC 5382 REQ-5 idle timer
    CLOSING      a FIN has passed, or the upgrader has let go; ends when both FINs are acknowledged or a RST has passed

No segment may be larger than the tunnel takes, and only its two ends can see to that: the maximum segment size that either
offers the other in its SYN is lowered to the tunnel's MTU.

A flow ends once the upgrader has said `Closed` *and* the last segments have passed (or the transitory timer ran out): a
slow client still gets all that was sent to it.

Events in, commands out: messages for the upgrader and records for the spool gather in lists, which the loop writes at
the end of its turn, the spool first. What flows of every protocol share (limits, records, timers) is `falkirk.flow.lifecycle`.
"""

from __future__ import annotations

import struct
from errno import ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT
from typing import TYPE_CHECKING, Final

from falkirk.flow.decision import Decision
from falkirk.flow.table import Owner, State, TcpLift, Tunnel
from falkirk.wire.context import Framing
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, Prepare
from falkirk.wire.tcp import clamp_segment_size

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane
    from falkirk.flow.worker import Worker

HEADER: Final = 10
"""Bytes of the virtio-net header in front of a packet that is held."""
FIN: Final = 1
SYN: Final = 2
RST: Final = 4
ACK: Final = 16
LINGER: Final = 5
"""Seconds that a flow whose stream was reset waits for the RST to pass."""
FINISHED: Final = "finished"
"""The upgrader's word for a stream whose FINs have both passed."""
_SEQUENCES: Final = struct.Struct(">II")
ENDED_BY_DIAL: Final = {
    ECONNREFUSED: "upstream_refused",
    ECONNRESET: "upstream_refused",
    EHOSTUNREACH: "upstream_unreachable",
    ENETUNREACH: "upstream_unreachable",
    ETIMEDOUT: "upstream_timeout",
}


class Tracker(Owner[TcpLift]):
    """Lives of the lifted TCP flows of one worker. Time is the worker's (`second`)."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.finished: list[tuple[TcpLift, str]] = []
        """Flows whose last segment passed in this turn, and why they end."""

    # begun

    def begin(
        self, lane: Lane, tunnel: Tunnel, key: bytes, decision: Decision, packet: bytes, timing: tuple[int, int]
    ) -> None:
        """Hold an allowed flow's SYN and have its upstream dialled; refuse it where a limit is reached."""
        worker = self._worker
        refusal = worker.lifecycle.refusal(tunnel)
        slot = lane.pool.claim(worker.second) if refusal is None else None
        if slot is None:
            worker.lifecycle.refuse(tunnel, key, decision, refusal or "slots_exhausted")
            return
        route = decision.route
        assert route is not None
        slot_number = lane.first_slot + slot
        forward = worker.slot_address(slot_number, len(key)) + worker.listener(lane, key)
        flow = TcpLift(self, tunnel, key, forward, slot_number)
        flow.held = packet
        lane.flows[slot] = flow
        worker.lifecycle.begin(flow, decision, timing, worker.settings.transitory_idle_s)
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
        self._worker.lifecycle.state(flow, State.OPENING)
        at = HEADER + (20 if flow.family == 4 else 40) + 4
        flow.opens = (int.from_bytes(packet[at : at + 4], "big") + 1) & 0xFFFFFFFF
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
        worker.lifecycle.finish(flow, ENDED_BY_DIAL.get(message.errno, "upstream_error"))

    # segments

    def segment_up(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> bool:
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
            if flags & RST:
                if _SEQUENCES.unpack_from(buffer, l4 + 4)[0] == flow.opens:
                    # RFC 5961 3.2: the kernel forgets the handshake, of which the upgrader has heard nothing yet.
                    self._worker.to_upgrader.append(Abort(flow.slot))
                    self.finished.append((flow, "client_reset"))
                return True
            self._worker.lifecycle.state(flow, State.ESTABLISHED)
            flow.opens = 0
        if flags & SYN and not flags & ACK and (flow.over or flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            # RFC 9293 3.6.1: a new connection may take the place of one whose end was seen, whether or not the upgrader has
            # said so by now. It gets a slot of its own: the kernel's TIME-WAIT, and what is left of the stream, stay in the old one.
            self._worker.lifecycle.finish(flow, flow.reason or ("upstream_reset" if flow.reset else FINISHED))
            tunnel = flow.tunnel
            self._worker.ingress.packet(self._worker.lane(tunnel.framing), tunnel, end)
            return False
        if flags & SYN:
            _clamp(flow, buffer, l4, end)
        if flags & FIN or flow.state is State.CLOSING:
            sequence, acknowledged = _SEQUENCES.unpack_from(buffer, l4 + 4)
            if flags & FIN:
                flow.fin_up = (sequence + end - l4 - (buffer[l4 + 12] >> 4 << 2) + 1) & 0xFFFFFFFF
                self._closing(flow)
            if flow.fin_down is not None and (acknowledged - flow.fin_down) & 0x80000000 == 0:
                flow.fin_acked_down = True
                self._maybe_over(flow)
        return True

    def segment_down(self, flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
        """A segment to the initiator that opens, closes, or passes while the flow isn't established. It has been rewritten."""
        flags = buffer[l4 + 13]
        if flags & SYN:
            _clamp(flow, buffer, l4, end)
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

    def _closing(self, flow: TcpLift) -> None:
        if flow.state is not State.CLOSING:
            self._worker.lifecycle.state(flow, State.CLOSING)

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
            self._worker.lifecycle.finish(flow, flow.reason)
            return
        if message.reason in ("client_reset", "never_opened"):
            self._worker.lifecycle.finish(flow, flow.reason)
            return
        self._closing(flow)
        if not self._maybe_over(flow):
            patience = self._worker.settings.transitory_idle_s if message.reason == FINISHED else LINGER
            self._worker.wheel.place(flow, self._worker.second + patience)

    def _maybe_over(self, flow: TcpLift) -> bool:
        if flow.over and (flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            self.finished.append((flow, flow.reason))
            return True
        return False

    def end(self, flow: TcpLift, reason: str) -> None:
        """End a live flow: both sides get a RST, the initiator's by the kernel where it has a connection."""
        flow.reason = flow.reason or reason
        if flow.held is not None:
            self._refuse(flow, flow.held)
            self._worker.to_upgrader.append(Abort(flow.slot))
            self._worker.lifecycle.finish(flow, reason)
            return
        self._worker.to_upgrader.append(Abort(flow.slot))
        self._worker.wheel.place(flow, self._worker.second + LINGER)

    def cut(self, flow: TcpLift, reason: str) -> None:
        """End it at once: its tunnel is gone."""
        self._worker.to_upgrader.append(Abort(flow.slot))
        self._worker.lifecycle.finish(flow, reason)

    def bereave(self, flow: TcpLift, reason: str) -> None:
        """Its stream is gone with the upgrader: the client is told where the kernel's RST hasn't told it."""
        self._worker.orphans.reset(self._worker, flow)
        self._worker.lifecycle.finish(flow, reason)

    def _refuse(self, flow: TcpLift, packet: bytes) -> None:
        """Answer the SYN that is held with a reset."""
        flow.held = None
        flow.tunnel.device.held -= 1
        self._worker.answers.reset(flow.tunnel, packet)

    def expire(self, flow: TcpLift) -> None:
        """End what the wheel says is idle. A flow is placed once, at its start; a half-closed one may stay as long as an
        established one."""
        worker = self._worker
        settings = worker.settings
        if flow.over and flow.reason == FINISHED and flow.tick + settings.transitory_idle_s > worker.second:
            # A slow client still fetches what the kernel holds for it; nor may the slot rest while the kernel retransmits.
            worker.wheel.place(flow, flow.tick + settings.transitory_idle_s)
            return
        if flow.over or flow.reason:
            worker.lifecycle.finish(flow, flow.reason)
            return
        settled = flow.state in (State.ESTABLISHED, State.CLOSING)
        limit = settings.established_idle_s if settled else settings.transitory_idle_s
        if flow.tick + limit > worker.second:
            worker.wheel.place(flow, flow.tick + limit)
        else:
            self.end(flow, "idle")

    def end_of_turn(self) -> None:
        """End the flows whose last segment passed in this turn."""
        finished, self.finished = self.finished, []
        for flow, reason in finished:
            self._worker.lifecycle.finish(flow, reason)

    def release(self, flow: TcpLift, reason: str) -> None:
        """Give back its slot, and the packet that is held."""
        worker = self._worker
        if flow.held is not None:
            flow.held = None
            flow.tunnel.device.held -= 1
            worker.drop("tunnel_closed" if reason == "tunnel_closed" else "held")
        lane = worker.lane(flow.tunnel.framing)
        slot = flow.slot - lane.first_slot
        lane.flows[slot] = None
        lane.pool.release(slot, worker.second, long=flow.long_rest)


def _clamp(flow: TcpLift, buffer: bytearray, l4: int, end: int) -> None:
    """Offer no larger segments than the tunnel takes."""
    headers = 40 if flow.family == 4 else 60
    # A raw packet has no header in front of it, wherever it lies.
    partial = flow.tunnel.framing is Framing.VNET and bool(buffer[0] & 1)
    clamp_segment_size(buffer, l4, end, flow.tunnel.mtu - headers, partial=partial)
