"""What becomes of a new flow: route, then rule. PURE.

The same function answers packets in the workers and `Explain` in the parent. A decision depends on the tunnel's context,
the destination, its port and the protocol only, so it is memoised a tunnel until the rules or the routes change.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from falkirk.decide import resolver
from falkirk.decide.destination import NO_DEVICE
from falkirk.decide.routes import RouteEntry, RouteTable, martian
from falkirk.decide.rules import RuleTable, Verdict
from falkirk.flow import records
from falkirk.wire.context import TunnelContext
from falkirk.wire.protocol import TCP, UDP

RETOLD: Final = "device_changed: the resolver is told anew"
"""Why a flow to the resolver ends where its device's context has changed."""


class Outcome(StrEnum):
    """What is done with the first packet."""

    LIFT = "lift"
    """Held, dialled, lifted to a stream or a session; where its route leads to a device it is lowered again there."""
    FORWARD = "forward"
    """Sent as packets into the tunnel of the device that its route leads to: as they are, or UDP under treatment l4 built anew around its payload.
    Between two devices l4 means nothing for a protocol that has no layer 4 here: it is forwarded."""
    DENY = "answer_rst"
    """TCP: answered with a reset, so that it looks like a closed port."""
    PROHIBITED = "answer_prohibited"
    """Anything else: answered with an ICMP error, administratively prohibited."""
    UNREACHABLE = "answer_unreachable"
    """Answered with an ICMP error: there is no way there."""


@dataclass(frozen=True)
class Decision:
    """A decision and why. `reason` is what audit and counters name; `protocol` the IP protocol's number."""

    outcome: Outcome
    reason: str
    why: str
    route: RouteEntry | None = None
    verdict: Verdict | None = None
    protocol: int = TCP

    @property
    def rule(self) -> str:
        """The rule that decided, empty where none was asked or the default deny did."""
        return self.verdict.rule if self.verdict else ""

    @property
    def route_id(self) -> str:
        """The route that was found."""
        return self.route.route_id if self.route else ""

    @property
    def rebuilt(self) -> bool:
        """Whether packets that are forwarded are lifted to their payload and lowered again."""
        treatment = self.verdict.treatment if self.verdict is not None else ""
        return self.outcome is Outcome.FORWARD and treatment == "l4" and self.protocol == UDP

    @cached_property
    def audit(self) -> str:
        """Its part of an audit record."""
        return records.of_decision(self)

    @cached_property
    def route_bytes(self) -> bytes:
        """The route's id, 16 bytes; zeros where there is none."""
        return bytes.fromhex(self.route_id.replace("-", "")) or bytes(16)

    @cached_property
    def rule_bytes(self) -> bytes:
        """The rule, as the live table keeps it."""
        return self.rule.encode()


def resolve(
    routes: RouteTable, context: TunnelContext, destination: bytes, protocol: int = TCP
) -> RouteEntry | Decision:
    """The route that a destination takes, or the decision that there is none."""
    special = martian(destination)
    if special is not None:
        return Decision(Outcome.UNREACHABLE, "martian_destination", special, protocol=protocol)
    route = routes.lookup(context.virtual_network_id, destination)
    if route is None:
        why = f"no route in virtual network {context.virtual_network}"
        return Decision(Outcome.UNREACHABLE, "no_route", why, protocol=protocol)
    return route


def authorise(
    rules: RuleTable, route: RouteEntry, context: TunnelContext, destination: bytes, port: int, protocol: int
) -> Decision:
    """The decision on a flow that has a route."""
    if route.target == "resolver":
        return _resolver(rules, route, context, destination, port, protocol)
    device = route.device
    verdict = rules.decide(context, destination, port, protocol, device or NO_DEVICE)
    deny = Outcome.DENY if protocol == TCP else Outcome.PROHIBITED
    if not verdict.allowed:
        return Decision(deny, "denied", verdict.why, route, verdict, protocol)
    if route.target == "blackhole":
        why = f"route {route.name} leads nowhere"
        return Decision(Outcome.UNREACHABLE, "blackhole", why, route, verdict, protocol)
    if device is not None and device.device_id == context.device_id:
        why = f"route {route.name} leads back to device {device.device}"
        return Decision(Outcome.UNREACHABLE, "leads_back", why, route, verdict, protocol)
    if verdict.treatment not in (("", "l4") if device is None else ("", "l3", "l4")):
        why = f"rule {verdict.rule} asks for treatment {verdict.treatment}, which this version doesn't build"
        if device is not None:
            why += " towards devices"
        return Decision(deny, "treatment_not_built", why, route, verdict, protocol)
    lowered = protocol == TCP and verdict.treatment == "l4"
    outcome = Outcome.LIFT if device is None or lowered else Outcome.FORWARD
    return Decision(outcome, "allowed", verdict.why, route, verdict, protocol)


def _resolver(
    rules: RuleTable, route: RouteEntry, context: TunnelContext, destination: bytes, port: int, protocol: int
) -> Decision:
    """The decision on a flow to the tenant's resolver: DNS is allowed unless a rule denies it, and nothing else is there."""
    if protocol not in (TCP, UDP) or port != resolver.PORT:
        outcome = Outcome.DENY if protocol == TCP else Outcome.UNREACHABLE
        why = f"the resolver answers DNS on port {resolver.PORT} only"
        return Decision(outcome, "not_dns", why, route, protocol=protocol)
    verdict = rules.decide(context, destination, port, protocol)
    if verdict.allowed or not verdict.rule:
        why = verdict.why if verdict.allowed else "every device may ask its tenant's resolver unless a rule denies it"
        return Decision(Outcome.LIFT, "allowed", why, route, Verdict(True, verdict.rule, why), protocol)
    deny = Outcome.DENY if protocol == TCP else Outcome.PROHIBITED
    return Decision(deny, "denied", verdict.why, route, verdict, protocol)


def decide(
    routes: RouteTable, rules: RuleTable, context: TunnelContext, destination: bytes, port: int, protocol: int
) -> Decision:
    """Route, then rule. `destination` is packed, `protocol` the IP protocol number."""
    route = resolve(routes, context, destination, protocol)
    if isinstance(route, Decision):
        return route
    return authorise(rules, route, context, destination, port, protocol)


def superseded(before: Decision, now: Decision, family: int, *, device_changed: bool = False) -> str:
    """Why a flow that goes on by `before` must end where `now` holds; empty where it may go on as it is.

    `family` is the flow's, 4 or 6. A flow may go on by another rule or another route as long as both lead it the same way.
    """
    if now.outcome not in (Outcome.LIFT, Outcome.FORWARD):
        if now.reason in ("denied", "treatment_not_built"):
            return f"{'device' if device_changed else 'policy'}_changed: {now.rule or 'default deny'}"
        return f"route_changed: {now.reason}"
    assert before.route is not None
    assert now.route is not None
    if device_changed and before.route.target == "resolver":
        # The resolver has been told who asks; it is told anew with the next flow.
        return RETOLD
    if _way(before.route, family) != _way(now.route, family):
        return f"route_changed: {now.route.name}"
    if _treatment(before) != _treatment(now):
        return f"policy_changed: {now.rule}"
    return ""


def _way(route: RouteEntry, family: int) -> tuple[str, bytes, str]:
    """Where a route leads: its target, the address that it leaves from, the device."""
    return route.target, route.egress4 if family == 4 else route.egress6, route.device.device_id if route.device else ""


def _treatment(decision: Decision) -> tuple[Outcome, str]:
    """What is done with a flow's packets; an empty treatment is the outcome's own."""
    said = decision.verdict.treatment if decision.verdict else ""
    return decision.outcome, said or ("l4" if decision.outcome is Outcome.LIFT else "l3")
