"""FlowService.Explain: the stages of a packet's way, from the tables that packets are decided by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.net.v1 import net_pb2
from falkirk.decide.routes import RouteEntry
from falkirk.flow import counters
from falkirk.flow.decision import Decision, Outcome, authorise, resolve
from falkirk.flow.text import address_text
from falkirk.wire.context import TunnelContext
from falkirk.wire.protocol import ICMP, ICMPV6, TCP

if TYPE_CHECKING:
    from falkirk.flow.fleet import Fleet

RESERVED = 255
"""IANA: reserved; rules see it as "other"."""
NUMBERS = {net_pb2.PROTOCOL_UNSPECIFIED: 6, net_pb2.PROTOCOL_TCP: 6, net_pb2.PROTOCOL_UDP: 17, net_pb2.PROTOCOL_ICMP: 1}


def explain(
    fleet: Fleet, context: TunnelContext, destination: bytes, port: int, protocol: net_pb2.Protocol
) -> pb.ExplainResponse:
    """Every stage's answer up to the one where the flow would stop."""
    response = pb.ExplainResponse()
    sources = [address for address in context.addresses if len(address) == len(destination)]
    texts = ", ".join(map(address_text, sources))
    detail = f"may speak from {texts}" if sources else "the device has no address of the destination's family"
    own = fleet.roster.find(context.tenant_id, context.device_id, context.virtual_network_id)
    if own is not None and sources:
        detail += f", by tunnel {own.tunnel} ({own.framing}, MTU {own.mtu})"
    _stage(response, "source", bool(sources), detail, "" if sources else "spoofed_source")
    if not sources:
        response.outcome = "drop"
        return response
    number = NUMBERS.get(protocol, RESERVED)
    if number == ICMP and len(destination) == 16:
        number = ICMPV6
    route = resolve(fleet.routes, context, destination, number)
    if isinstance(route, Decision):
        _stage(response, "route", False, route.why, route.reason)
        response.outcome = route.outcome
        return response
    _stage(response, "route", True, f"{route.prefix} ({route.name}) leads to {route.target}", route.route_id)
    decision = authorise(fleet.rules, route, context, destination, port, number)
    stage = "off_ramp" if decision.reason in ("blackhole", "leads_back") else "policy"
    passed = decision.outcome in (Outcome.LIFT, Outcome.FORWARD)
    _stage(response, stage, passed, decision.why, decision.rule or decision.reason)
    response.outcome = decision.outcome
    if decision.outcome is Outcome.FORWARD:
        _tunnel(response, fleet, context, route)
    if decision.outcome is not Outcome.LIFT:
        return response
    if number != TCP:
        _stage(response, "protocol", False, "only TCP is lifted in this version", "protocol_not_built")
        response.outcome = Outcome.UNREACHABLE
        return response
    free = sum(
        c.view[counters.SLOTS_TOTAL] - c.view[counters.SLOTS_ACTIVE] - c.view[counters.SLOTS_RESTING]
        for c in fleet.counters
    )
    _stage(response, "slot", free > 0, f"{free} NAT slots are free on this node", "" if free else "slots_exhausted")
    if not free:
        response.outcome = "drop"
        return response
    egress = route.egress4 if len(destination) == 4 else route.egress6
    source = address_text(egress) if egress else "an address that the kernel chooses"
    timeout = route.connect_timeout_ms or fleet.settings.connect_timeout_ms
    _stage(response, "off_ramp", True, f"dialled from {source}, at most {timeout} ms", route.target)
    return response


def _tunnel(response: pb.ExplainResponse, fleet: Fleet, context: TunnelContext, route: RouteEntry) -> None:
    """The tunnel that a flow to a device would be forwarded to."""
    assert route.device is not None  # Nothing else is forwarded to.
    network = context.virtual_network_id if route.own_address else ""
    found = fleet.roster.find(context.tenant_id, route.device.device_id, network)
    if found is None:
        _stage(response, "tunnel", False, f"device {route.device.device} has no open tunnel", "device_offline")
        response.outcome = Outcome.UNREACHABLE
        return
    where = f"tunnel {found.tunnel} ({found.framing}, MTU {found.mtu}) of worker {found.worker}"
    _stage(response, "tunnel", True, f"forwarded to device {route.device.device} by {where}", "")


def _stage(response: pb.ExplainResponse, name: str, passed: bool, detail: str, reference: str) -> None:
    response.stages.append(pb.Stage(name=name, passed=passed, detail=detail, reference=reference))
