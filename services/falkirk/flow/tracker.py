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
slow client still gets all that was sent to it. One whose route leads to a device has another side, its leg (`falkirk.flow.lowering`), which is followed in
the same way, and the flow ends when both have.

Events in, commands out: messages for the upgrader and records for the spool gather in lists, which the loop writes at
the end of its turn, the spool first. What flows of every protocol share (limits, records, timers) is `falkirk.flow.lifecycle`.
"""

from __future__ import annotations

from errno import ECONNREFUSED, ECONNRESET, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT
from typing import TYPE_CHECKING, Final

from falkirk.flow.decision import Decision
from falkirk.flow.resolving import preface
from falkirk.flow.segments import ACK, FIN, LINGER, RST, SEQUENCES, SYN, Segments
from falkirk.flow.table import Leg, State, TcpLift, Tunnel
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, Prepare
from falkirk.wire.icmp import Unreachable

if TYPE_CHECKING:
    from falkirk.flow.lane import Lane

HEADER: Final = 10
"""Bytes of the virtio-net header in front of a packet that is held."""
FINISHED: Final = "finished"
"""The upgrader's word for a stream whose FINs have both passed."""
OFFLINE: Final = "device_offline"
ENDED_BY_DIAL: Final = {
    ECONNREFUSED: "upstream_refused",
    ECONNRESET: "upstream_refused",
    EHOSTUNREACH: "upstream_unreachable",
    ENETUNREACH: "upstream_unreachable",
    ETIMEDOUT: "upstream_timeout",
}


class Tracker(Segments):
    """Lives of the lifted TCP flows of one worker. Time is the worker's (`second`)."""

    # begun

    def begin(
        self, lane: Lane, tunnel: Tunnel, key: bytes, decision: Decision, packet: bytes, timing: tuple[int, int]
    ) -> None:
        """Hold an allowed flow's SYN and have its upstream dialled; refuse it where a limit is reached."""
        worker = self._worker
        refusal = worker.lifecycle.refusal(tunnel)
        route = decision.route
        assert route is not None
        leg: Leg | None = None
        if refusal is None and route.device is not None:
            leg, refusal = worker.lowering.reserve(tunnel, key, route)
            if refusal == OFFLINE:
                worker.answers.unreachable(tunnel, packet, Unreachable.HOST)
                why = f"device {route.device.device} has no open tunnel"
                worker.lifecycle.refused(tunnel, key, decision, OFFLINE, why)
                return
        slot = lane.pool.claim(worker.second) if refusal is None else None
        if slot is None:
            if leg is not None:
                worker.lowering.drop(leg)
            worker.lifecycle.refuse(tunnel, key, decision, refusal or "slots_exhausted")
            return
        slot_number = lane.first_slot + slot
        forward = worker.slot_address(slot_number, len(key)) + worker.listener(lane, key)
        flow = TcpLift(self, tunnel, key, forward, slot_number, lane)
        flow.held = packet
        lane.flows[slot] = flow
        worker.lifecycle.begin(flow, decision, timing, worker.settings.transitory_idle_s)
        if leg is not None:
            worker.lowering.join(flow, leg)
        timeout = route.connect_timeout_ms or worker.settings.connect_timeout_ms
        worker.to_upgrader.append(
            Prepare(
                slot=slot_number,
                flow_id=worker.lifecycle.identity(flow),
                destination=flow.destination,
                port=flow.destination_port,
                egress=route.egress4 if len(key) == 12 else route.egress6,
                connect_timeout_ms=timeout,
                idle_timeout_s=worker.settings.established_idle_s,
                treatment="l4",
                span_id=flow.span_id,
                lower=leg.slot if leg is not None else 0,
                source_port=flow.source_port,
                preface=preface(flow, worker.lifecycle.identity(flow)) if route.target == "resolver" else b"",
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
                self._forget(flow)
            self._worker.drop("syn_held" if flags & SYN else "held")
            return False
        if state is State.OPENING and not flags & SYN:
            if flags & RST:
                if SEQUENCES.unpack_from(buffer, l4 + 4)[0] == flow.opens:
                    # RFC 5961 3.2: the kernel forgets the handshake, of which the upgrader has heard nothing yet.
                    self._forget(flow)
                return True
            self.advance(flow, State.ESTABLISHED)
            flow.opens = 0
        if flags & SYN and not flags & ACK and (flow.over or flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            # RFC 9293 3.6.1: a new connection may take the place of one whose end was seen, whether or not the upgrader has
            # said so by now. It gets a slot of its own: the kernel's TIME-WAIT, and what is left of the stream, stay in the old one.
            self._worker.lifecycle.finish(flow, flow.reason or ("upstream_reset" if flow.reset else FINISHED))
            tunnel = flow.tunnel
            self._worker.ingress.packet(self._worker.lane(tunnel.framing), tunnel, end)
            return False
        if flags & SYN:
            self.clamp(flow, buffer, l4, end)
        self.fins_up(flow, buffer, l4, end)
        return True

    def _forget(self, flow: TcpLift) -> None:
        """The client has reset what the upgrader doesn't know of as a stream yet."""
        self._worker.to_upgrader.append(Abort(flow.slot))
        self.finished.append((flow, "client_reset"))

    def advance(self, flow: TcpLift, state: State) -> None:
        """It is somewhere else in its life, for everybody to see."""
        self._worker.lifecycle.state(flow, state)

    # ended

    def closed(self, message: Closed) -> None:
        """The upgrader has let go of the slot."""
        flow = self._worker.flow_of(message.slot)
        if flow is None:
            return
        flow.over = True
        flow.reason = flow.reason or message.reason
        if flow.leg is not None:
            self._worker.lowering.closed(flow.leg, message.reason)
        if flow.held is not None:
            # Before it said Connected: for the client there is nothing at the other end.
            self._refuse(flow, flow.held)
            self._worker.lifecycle.finish(flow, flow.reason)
            return
        if message.reason in ("client_reset", "never_opened"):
            self._worker.lifecycle.finish(flow, flow.reason)
            return
        self.closing(flow)
        if not self.settle(flow):
            patience = self._worker.settings.transitory_idle_s if message.reason == FINISHED else LINGER
            self._worker.wheel.place(flow, self._worker.second + patience)

    def settle(self, flow: TcpLift) -> bool:
        """Whether both sides have ended, for the upgrader and on the wire."""
        if flow.over and flow.leg is None and (flow.reset or (flow.fin_acked_up and flow.fin_acked_down)):
            self.finished.append((flow, flow.reason))
            return True
        return False

    def end(self, flow: TcpLift, reason: str) -> None:
        """End a live flow: both sides get a RST, the initiator's by the kernel where it has a connection."""
        flow.reason = flow.reason or reason
        if flow.held is not None:
            self._refuse(flow, flow.held)
            self._worker.to_upgrader.append(Abort(flow.slot))
            self._worker.lifecycle.finish(flow, flow.reason)
            return
        self._worker.to_upgrader.append(Abort(flow.slot))
        self._worker.wheel.place(flow, self._worker.second + LINGER)

    def cut(self, flow: TcpLift, reason: str) -> None:
        """End it at once: its tunnel is gone. A stream whose FINs have both passed is left to the upgrader, which may still have the
        initiator's last bytes to deliver."""
        if flow.fin_acked_up and flow.fin_acked_down:
            if flow.leg is not None:
                self._worker.lowering.abandon(flow.leg, slow=True)
            self._worker.lifecycle.finish(flow, flow.reason or FINISHED)
            return
        self._worker.to_upgrader.append(Abort(flow.slot))
        self._worker.lifecycle.finish(flow, reason)

    def bereave(self, flow: TcpLift, reason: str) -> None:
        """Its stream is gone with the upgrader: the client is told where the kernel's RST hasn't told it."""
        self._worker.orphans.reset(self._worker, flow)
        if flow.leg is not None:
            self._worker.orphans.reset(self._worker, flow.leg)
            self._worker.lowering.drop(flow.leg)
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
        last = flow.tick if flow.leg is None else max(flow.tick, flow.leg.tick)
        if flow.over and flow.reason == FINISHED and last + settings.transitory_idle_s > worker.second:
            # A slow client (or device) still fetches what the kernel holds for it; nor may the slot rest while the kernel retransmits.
            worker.wheel.place(flow, last + settings.transitory_idle_s)
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
        if flow.leg is not None:
            worker.lowering.abandon(flow.leg)
        flow.lane.free(flow)
