"""Route, then rule: what becomes of a new flow, as a table."""

from __future__ import annotations

import ipaddress

import pytest

from falkirk.decide import routes, rules
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteSource, RouteTable
from falkirk.decide.rules import PolicySource, RuleSource, RuleTable
from falkirk.flow.decision import Outcome, authorise, decide, resolve
from tests.flow_rig import NETWORK, OTHER_TENANT, TENANT, context

ROUTE_ID = "00000000-0000-4000-8000-0000000000f4"
NAS = DestinationDevice("nas-id", "nas", "bob", ("storage",))
SELF = DestinationDevice(context().device_id, "laptop")
ROUTES = RouteTable.loaded(
    routes.compile(
        [
            RouteSource(NETWORK, RouteEntry(ROUTE_ID, "out", "203.0.113.0/24", "internet")),
            RouteSource(NETWORK, RouteEntry("h", "hole", "203.0.113.64/26", "blackhole")),
            RouteSource(NETWORK, RouteEntry("", "device/nas", "100.96.0.9/32", "device", device=NAS)),
            RouteSource(NETWORK, RouteEntry("g", "lab", "10.9.0.0/16", "device", device=NAS)),
            RouteSource(NETWORK, RouteEntry("", "device/laptop", "100.96.0.2/32", "device", device=SELF)),
        ]
    )
)


def _rules() -> RuleTable:
    loading = RuleTable.load(
        rules.compile(
            [
                PolicySource(
                    TENANT,
                    "main",
                    0,
                    [
                        RuleSource("web", "net.port == 80", "allow"),
                        RuleSource("ssh", "net.port == 22", "allow", "ssh"),
                        RuleSource("telnet", "net.port == 23", "deny"),
                        RuleSource("l3", "net.port == 3", "allow", "l3"),
                        RuleSource("l4", "net.port == 4", "allow", "l4"),
                        RuleSource("nas", 'net.dst_device == "nas" && net.port == 2049', "allow"),
                        RuleSource("bob", 'net.dst_user == "bob" && net.port == 445', "allow"),
                        RuleSource("storage", '"storage" in net.dst_groups && net.port == 873', "allow"),
                    ],
                )
            ]
        )
    )
    for _ in loading:
        pass
    assert loading.table is not None
    return loading.table


RULES = _rules()


@pytest.mark.parametrize(
    ("destination", "port", "outcome", "reason", "rule"),
    [
        ("203.0.113.5", 80, Outcome.LIFT, "allowed", "main/web"),
        ("203.0.113.5", 23, Outcome.DENY, "denied", "main/telnet"),
        ("203.0.113.5", 443, Outcome.DENY, "denied", ""),
        ("203.0.113.5", 22, Outcome.DENY, "treatment_not_built", "main/ssh"),
        ("203.0.113.5", 3, Outcome.DENY, "treatment_not_built", "main/l3"),
        ("203.0.113.5", 4, Outcome.LIFT, "allowed", "main/l4"),
        ("203.0.113.5", 2049, Outcome.DENY, "denied", ""),
        ("100.96.0.9", 80, Outcome.FORWARD, "allowed", "main/web"),
        ("100.96.0.9", 3, Outcome.FORWARD, "allowed", "main/l3"),
        ("100.96.0.9", 4, Outcome.LIFT, "allowed", "main/l4"),
        ("100.96.0.9", 23, Outcome.DENY, "denied", "main/telnet"),
        ("100.96.0.9", 2049, Outcome.FORWARD, "allowed", "main/nas"),
        ("100.96.0.9", 445, Outcome.FORWARD, "allowed", "main/bob"),
        ("100.96.0.9", 873, Outcome.FORWARD, "allowed", "main/storage"),
        ("100.96.0.9", 443, Outcome.DENY, "denied", ""),
        ("10.9.1.1", 2049, Outcome.FORWARD, "allowed", "main/nas"),
        ("100.96.0.2", 80, Outcome.UNREACHABLE, "leads_back", "main/web"),
        ("100.96.0.2", 443, Outcome.DENY, "denied", ""),
        ("203.0.113.70", 80, Outcome.UNREACHABLE, "blackhole", "main/web"),
        ("203.0.113.70", 23, Outcome.DENY, "denied", "main/telnet"),
        ("198.51.100.1", 80, Outcome.UNREACHABLE, "no_route", ""),
        ("2001:db8::5", 80, Outcome.UNREACHABLE, "no_route", ""),
        ("127.0.0.1", 80, Outcome.UNREACHABLE, "martian_destination", ""),
        ("ff02::1", 80, Outcome.UNREACHABLE, "martian_destination", ""),
    ],
)
def test_decisions(destination: str, port: int, outcome: Outcome, reason: str, rule: str) -> None:
    packed = ipaddress.ip_address(destination).packed
    decision = decide(ROUTES, RULES, context(), packed, port, 6)
    assert (decision.outcome, decision.reason, decision.rule) == (outcome, reason, rule)
    assert decision.why
    # Explain's road and the packet's are one.
    route = resolve(ROUTES, context(), packed)
    again = route if not isinstance(route, RouteEntry) else authorise(RULES, route, context(), packed, port, 6)
    assert again == decision


def test_another_tenant_has_other_rules() -> None:
    packed = ipaddress.ip_address("203.0.113.5").packed
    assert decide(ROUTES, RULES, context(tenant=OTHER_TENANT), packed, 80, 6).outcome is Outcome.DENY


def test_before_any_snapshot_nothing_is_let_through() -> None:
    packed = ipaddress.ip_address("203.0.113.5").packed
    assert decide(RouteTable(), RULES, context(), packed, 80, 6).outcome is Outcome.UNREACHABLE
    assert decide(ROUTES, RuleTable.empty(), context(), packed, 80, 6).outcome is Outcome.DENY


def test_what_a_decision_gives_to_records_and_tables() -> None:
    lifted = decide(ROUTES, RULES, context(), bytes([203, 0, 113, 5]), 80, 6)
    assert (lifted.route_id, lifted.route_bytes.hex()) == (ROUTE_ID, ROUTE_ID.replace("-", ""))
    assert lifted.rule_bytes == b"main/web"
    assert '"rule":"main/web"' in lifted.audit
    lost = decide(ROUTES, RULES, context(), bytes([127, 0, 0, 1]), 80, 6)
    assert (lost.route_id, lost.route_bytes, lost.rule_bytes) == ("", bytes(16), b"")
