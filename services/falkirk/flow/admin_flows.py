"""Streams that begin here and are lowered to a device: an administrator's, who asks the upgrader for one (`UpgraderService.Lower`).

    upgrader ── LowerWanted ──► which tunnel, limits, leg, record ── Prepare ──► upgrader     or LowerRefused

The device sees a connection from Falkirk's own address, the one that ICMP errors come from, which no device has; so it can't be taken for another
device's, and no rule of the tenant's is asked. The record says who asked, as far as that is known, and lies with the device's other flows. Its `up` is
towards the device, as with every flow that somebody else begins.

The flow is known under a key of 13 or 37 bytes, which no TCP segment from a tunnel has: the device's replies are its leg's.

Limit: the port it comes from is the slot's, so a device that fetches slowly for an hour after its end may refuse another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.flow.decision import Decision, Outcome
from falkirk.flow.keys import key_of, lift_key
from falkirk.flow.segments import LINGER
from falkirk.flow.table import Flow, Leg, Owner, State, Tunnel
from falkirk.flow.tracker import ENDED_BY_DIAL, FINISHED
from falkirk.wire.handover import Abort, Closed, Connected, DialFailed, LowerRefused, LowerWanted, Prepare
from falkirk.wire.protocol import TCP

if TYPE_CHECKING:
    from falkirk.flow.worker import Worker

FIRST_PORT: Final = 32768
PORTS: Final = 28232
"""RFC 6335 6: dynamic ports, as Linux takes them."""


class AdminFlow(Flow):
    """One. Its leg is all there is of it."""

    __slots__ = ("counter", "leg", "lower", "over")

    def __init__(self, owner: Owner[AdminFlow], key: bytes, leg: Leg) -> None:
        super().__init__(owner, leg.tunnel, key)
        self.leg: Leg | None = None
        """While it is there."""
        self.counter = leg
        self.lower = leg.slot
        """What the upgrader knows it by."""
        self.over = False
        """The upgrader has nothing more of it."""

    def count(self) -> bool:
        """Take over what its leg has counted, which sees it from the device. Whether anything has passed."""
        leg, before = self.counter, self.packets_up + self.packets_down
        self.bytes_up, self.packets_up = leg.bytes_down, leg.packets_down
        self.bytes_down, self.packets_down = leg.bytes_up, leg.packets_up
        self.tick = max(self.tick, leg.tick)
        return self.packets_up + self.packets_down > before


class AdminFlows(Owner[AdminFlow]):
    """Those of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._flows: dict[AdminFlow, None] = {}

    # begun

    def wanted(self, message: LowerWanted) -> None:
        """Somebody asks for a way to a device."""
        refusal = self._begin(message)
        if refusal is not None:
            self._worker.to_upgrader.append(LowerRefused(message.request, *refusal))

    def _begin(self, message: LowerWanted) -> tuple[str, str] | None:
        worker = self._worker
        tunnel = self._tunnel(message)
        if tunnel is None:
            return "no_tunnel", f"device {message.device} of tenant {message.tenant} has no open tunnel on this node"
        size = {4: 4, 6: 16}.get(message.version, 0)
        address = next((one for one in tunnel.context.addresses if not size or len(one) == size), None)
        if address is None:
            return "no_address", f"device {message.device} has no address of that family"
        refusal = worker.lifecycle.refusal(tunnel)
        if refusal is not None:
            return refusal, f"{refusal}: see falkirk flow stats"
        lane = worker.lowering.lanes[tunnel.framing]
        source = worker.answers.source4 if len(address) == 4 else worker.answers.source6
        source_port = FIRST_PORT + lane.pool.cursor % PORTS
        leg, refusal = worker.lowering.lead(tunnel, lift_key(address, source, message.port, source_port), "")
        if leg is None:
            return str(refusal), f"{refusal}: see falkirk flow stats"
        flow = AdminFlow(self, key_of(TCP, source, address, source_port, message.port), leg)
        why = f"an administrator's connection: {message.actor}"
        decision = Decision(Outcome.LIFT, "administrator", why)
        worker.lifecycle.begin(flow, decision, (0, 0), worker.settings.transitory_idle_s, State.OPENING)
        worker.lowering.join(flow, leg)
        self._flows[flow] = None
        worker.to_upgrader.append(
            Prepare(
                slot=leg.slot,
                flow_id=worker.lifecycle.identity(flow),
                destination=address,
                port=message.port,
                egress=b"",
                connect_timeout_ms=worker.settings.connect_timeout_ms,
                idle_timeout_s=worker.settings.established_idle_s,
                treatment="l4",
                span_id=flow.span_id,
                lower=leg.slot,
                source_port=source_port,
                request=message.request,
            )
        )
        return None

    def _tunnel(self, message: LowerWanted) -> Tunnel | None:
        """The device's newest tunnel here."""
        wanted = message.tenant, message.device
        found = [
            tunnel
            for tunnel in self._worker.tunnels.values()
            if (tunnel.context.tenant, tunnel.context.device) == wanted
        ]
        return max(found, key=lambda tunnel: tunnel.id, default=None)

    def _of(self, slot: int) -> AdminFlow | None:
        """The flow of a leg's slot."""
        leg = self._worker.flow_of(slot)
        flow = leg.flow if isinstance(leg, Leg) else None
        return flow if isinstance(flow, AdminFlow) else None

    # meanwhile

    def connected(self, message: Connected) -> None:
        """The device has accepted."""
        flow = self._of(message.slot)
        if flow is None:
            self._worker.to_upgrader.append(Abort(message.slot))
        else:
            self._worker.lifecycle.state(flow, State.ESTABLISHED)

    def dial_failed(self, message: DialFailed) -> None:
        """The device hasn't."""
        flow = self._of(message.slot)
        if flow is not None:
            self._finish(flow, flow.reason or ENDED_BY_DIAL.get(message.errno, "upstream_error"))

    def count(self) -> None:
        """Before a checkpoint: what has passed is the leg's to know."""
        self._worker.dirty += [flow for flow in self._flows if flow.count()]

    # ended

    def closed(self, message: Closed) -> None:
        """The upgrader has let go of the stream."""
        flow = self._of(message.slot)
        if flow is None or flow.leg is None:
            return
        flow.over = True
        flow.reason = flow.reason or message.reason
        self._worker.lifecycle.state(flow, State.CLOSING)
        patience = self._worker.settings.transitory_idle_s if message.reason == FINISHED else LINGER
        self._worker.wheel.place(flow, self._worker.second + patience)
        self._worker.lowering.closed(flow.leg, message.reason)

    def settle(self, flow: AdminFlow) -> bool:
        """Its leg has ended."""
        if flow.over:
            self._finish(flow, flow.reason)
        return flow.over

    def _finish(self, flow: AdminFlow, reason: str) -> None:
        flow.count()
        self._worker.lifecycle.finish(flow, reason)

    def end(self, flow: AdminFlow, reason: str) -> None:
        """End it: both sides get a RST."""
        flow.reason = flow.reason or reason
        self._worker.to_upgrader.append(Abort(flow.lower))
        self._worker.wheel.place(flow, self._worker.second + LINGER)

    def cut(self, flow: AdminFlow, reason: str) -> None:
        """The device's tunnel is gone."""
        self._worker.to_upgrader.append(Abort(flow.lower))
        self._finish(flow, flow.reason or reason)

    def bereave(self, flow: AdminFlow, reason: str) -> None:
        """The upgrader is gone: the device is told where the kernel's RST hasn't told it."""
        if flow.leg is not None:
            self._worker.orphans.reset(self._worker, flow.leg)
            self._worker.lowering.drop(flow.leg)
        self._finish(flow, reason)

    def expire(self, flow: AdminFlow) -> None:
        """As a lifted one (`falkirk.flow.tracker`)."""
        worker, settings = self._worker, self._worker.settings
        flow.count()
        if flow.over and flow.reason == FINISHED and flow.tick + settings.transitory_idle_s > worker.second:
            worker.wheel.place(flow, flow.tick + settings.transitory_idle_s)
            return
        if flow.over or flow.reason:
            self._finish(flow, flow.reason)
            return
        settled = flow.state is State.ESTABLISHED
        limit = settings.established_idle_s if settled else settings.transitory_idle_s
        if flow.tick + limit > worker.second:
            worker.wheel.place(flow, flow.tick + limit)
        else:
            self.end(flow, "idle")

    def release(self, flow: AdminFlow, reason: str) -> None:
        """Its leg stays until the kernel's last word has passed."""
        self._flows.pop(flow, None)
        if flow.leg is not None:
            self._worker.lowering.abandon(flow.leg)
