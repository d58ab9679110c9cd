"""FlowService.Explain: a simulation (`falkirk.flow.simulate`) with what the workers share.

Limits: whether a worker's audit records can be written isn't known here (`falkirk flow stats` tells of drops as audit_unwritable); a worker that
is being drained is taken for ready.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.net.v1 import net_pb2
from falkirk.decide.routes import RouteEntry
from falkirk.flow import counters, quota
from falkirk.flow.keys import Signature
from falkirk.flow.live import LiveRecord
from falkirk.flow.signatures import reverse
from falkirk.flow.simulate import DROP, Existing, Leading, Simulation
from falkirk.wire.context import TunnelContext
from falkirk.wire.probe import probe
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP

if TYPE_CHECKING:
    from falkirk.flow.fleet import Fleet

RESERVED: Final = 255
"""IANA: reserved; rules see it as "other"."""
NUMBERS: Final = {
    net_pb2.PROTOCOL_UNSPECIFIED: TCP,
    net_pb2.PROTOCOL_TCP: TCP,
    net_pb2.PROTOCOL_UDP: UDP,
    net_pb2.PROTOCOL_ICMP: ICMP,
}
USUAL_MTU: Final = 1500
"""Of a tunnel that isn't open: the on-ramp's default."""
SOURCE_PORT: Final = 49152
"""Of a packet that is made here: RFC 6335 6, the first dynamic one."""


class Node:
    """What the workers share, as a simulation asks for it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.routes, self.rules, self.settings = fleet.routes, fleet.rules, fleet.settings

    def existing(self, context: TunnelContext, said: Signature) -> Existing | None:
        """The live flow that a packet of the device is of, or that it replies to."""
        for one, reply in ((said, False), (reverse(said), True)):
            for worker in range(self._fleet.workers):
                table = self._fleet.live(worker)
                for record in table.between(one) if table is not None else ():
                    found = self._existing(context, worker, record, reply=reply)
                    if found is not None:
                        return found
        return None

    def _existing(self, context: TunnelContext, worker: int, record: LiveRecord, *, reply: bool) -> Existing | None:
        fleet = self._fleet
        initiator = fleet.context(worker, record.tunnel)
        if initiator is None:
            return None
        route = self.routes.lookup(initiator.virtual_network_id, record.destination)
        device = route.device if route is not None else None
        # Only what is forwarded has its replies come from another tunnel.
        if (
            (device is None or device.device_id != context.device_id)
            if reply
            else initiator.device_id != context.device_id
        ):
            return None
        into = None
        if record.slot:
            pass  # Lifted: its packets end here.
        elif reply:
            into = fleet.roster.of(record.tunnel)
        elif device is not None:
            into = fleet.roster.find(initiator.tenant_id, device.device_id)
        state = pb.FlowState.Name(record.state).removeprefix("FLOW_STATE_").lower()
        return Existing(record.flow_id.hex(), state, record.rule, reply, into.mtu if into is not None else 0)

    def load(self, context: TunnelContext, *, lifted: bool) -> quota.Load:
        """What the device's worker has."""
        fleet = self._fleet
        worker = fleet.worker_of(context.device_id)
        table = fleet.live(worker)
        tunnels = {number for at, number in fleet.tunnels_of(context.device_id) if at == worker}
        flows, held = table.count(tunnels) if table is not None else (0, 0)
        full = table is not None and fleet.counters[worker].view[counters.FLOWS] >= table.capacity
        ready = fleet.ready(worker) or not lifted
        return quota.Load(ready, True, flows, held, fleet.tenant_flows(context.tenant_id), full)

    def free_slots(self, context: TunnelContext) -> int:
        """Of the device's worker."""
        counts = self._fleet.counters[self._fleet.worker_of(context.device_id)].view
        return counts[counters.SLOTS_TOTAL] - counts[counters.SLOTS_ACTIVE] - counts[counters.SLOTS_RESTING]

    def leading(self, context: TunnelContext, route: RouteEntry) -> Leading | None:
        """The tunnel that a flow to a device would be forwarded to."""
        assert route.device is not None  # Nothing else is forwarded to.
        network = context.virtual_network_id if route.own_address else ""
        found = self._fleet.roster.find(context.tenant_id, route.device.device_id, network)
        if found is None:
            return None
        where = f"tunnel {found.tunnel} ({found.framing}, MTU {found.mtu}) of worker {found.worker}"
        return Leading(where, found.mtu)


def explain(
    fleet: Fleet, context: TunnelContext, destination: bytes, port: int, protocol: net_pb2.Protocol
) -> pb.ExplainResponse:
    """Every stage's answer for the first packet of a flow."""
    sources = [address for address in context.addresses if len(address) == len(destination)]
    if not sources:
        response = pb.ExplainResponse(outcome=DROP)
        detail = "the device has no address of the destination's family"
        response.stages.add(name="source", passed=False, detail=detail, reference="spoofed_source")
        return response
    number = NUMBERS.get(protocol, RESERVED)
    if number == ICMP and len(destination) == 16:
        number = ICMPV6
    return simulate(fleet, context, probe(number, sources[0], destination, SOURCE_PORT, port))


def simulate(fleet: Fleet, context: TunnelContext, packet: bytes) -> pb.ExplainResponse:
    """Every stage's answer for a packet."""
    attached = fleet.roster.find(context.tenant_id, context.device_id, context.virtual_network_id)
    by = f", by tunnel {attached.tunnel} ({attached.framing}, MTU {attached.mtu})" if attached is not None else ""
    simulation = Simulation(Node(fleet), context, packet, attached.mtu if attached is not None else USUAL_MTU, by)
    stages = [
        pb.Stage(name=stage.name, passed=stage.passed, detail=stage.detail, reference=stage.reference)
        for stage in simulation.stages
    ]
    return pb.ExplainResponse(outcome=simulation.outcome, stages=stages)
