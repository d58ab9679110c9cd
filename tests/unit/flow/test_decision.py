"""Route, then rule: what becomes of a new flow, as a table."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from falkirk.decide import routes, rules
from falkirk.decide.destination import DestinationDevice
from falkirk.decide.routes import RouteEntry, RouteSource, RouteTable
from falkirk.decide.rules import PolicySource, RuleSource, RuleTable, Verdict
from falkirk.flow.decision import Decision, Outcome, authorise, decide, resolve, superseded
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
            RouteSource(NETWORK, RouteEntry("", "resolver", "100.96.0.53/32", "resolver")),
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


OUT = RouteEntry(ROUTE_ID, "out", "203.0.113.0/24", "internet", b"\x0a\x00\x00\x01", b"\xfd" + bytes(15))
ALLOWED = Verdict(True, "main/web", "allowed by main/web")
BEFORE = Decision(Outcome.LIFT, "allowed", ALLOWED.why, OUT, ALLOWED)
AT_NAS = RouteEntry("", "device/nas", "100.96.0.9/32", "device", device=NAS)
TO_NAS = Decision(Outcome.FORWARD, "allowed", "", AT_NAS, ALLOWED)


def _on(route: RouteEntry, verdict: Verdict = ALLOWED, outcome: Outcome = Outcome.LIFT) -> Decision:
    return Decision(outcome, "allowed", verdict.why, route, verdict)


@pytest.mark.parametrize(
    ("before", "now", "family", "reason"),
    [
        (BEFORE, BEFORE, 4, ""),
        # Another rule allows it, another route leads it the same way.
        (BEFORE, _on(OUT, Verdict(True, "main/all", "")), 4, ""),
        (BEFORE, _on(OUT, Verdict(True, "main/all", "", "l4")), 4, ""),
        (BEFORE, _on(msgspec.structs.replace(OUT, route_id="other", name="finer", prefix="203.0.113.5/32")), 4, ""),
        (BEFORE, _on(msgspec.structs.replace(OUT, connect_timeout_ms=1)), 4, ""),
        # An egress address matters to its own family only.
        (BEFORE, _on(msgspec.structs.replace(OUT, name="moved", egress4=b"\x0a\x00\x00\x02")), 4, "route_changed: moved"),
        (BEFORE, _on(msgspec.structs.replace(OUT, name="moved", egress4=b"\x0a\x00\x00\x02")), 6, ""),
        (BEFORE, _on(msgspec.structs.replace(OUT, name="moved", egress6=b"")), 6, "route_changed: moved"),
        (BEFORE, TO_NAS, 4, "route_changed: device/nas"),
        (TO_NAS, BEFORE, 4, "route_changed: out"),
        (TO_NAS, _on(msgspec.structs.replace(AT_NAS, device=SELF), ALLOWED, Outcome.FORWARD), 4, "route_changed: device/nas"),
        (
            TO_NAS,
            _on(msgspec.structs.replace(AT_NAS, device=DestinationDevice("nas-id", "box", "eve")), ALLOWED, Outcome.FORWARD),
            4,
            "",
        ),
        (BEFORE, Decision(Outcome.UNREACHABLE, "no_route", "", None), 4, "route_changed: no_route"),
        (BEFORE, Decision(Outcome.UNREACHABLE, "blackhole", "", OUT, ALLOWED), 4, "route_changed: blackhole"),
        (BEFORE, Decision(Outcome.DENY, "denied", "", OUT, Verdict(False, "main/no", "")), 4, "policy_changed: main/no"),
        (BEFORE, Decision(Outcome.DENY, "denied", "", OUT, Verdict(False, "", "")), 4, "policy_changed: default deny"),
        (BEFORE, Decision(Outcome.PROHIBITED, "denied", "", OUT, Verdict(False, "", "")), 4, "policy_changed: default deny"),
        (BEFORE, Decision(Outcome.DENY, "treatment_not_built", "", OUT, Verdict(True, "main/ssh", "")), 4, "policy_changed: main/ssh"),
        # Both forwarded and lifted are allowed, but a flow is one of them.
        (TO_NAS, _on(AT_NAS, Verdict(True, "main/l4", "", "l4")), 4, "policy_changed: main/l4"),
    ],
)  # fmt: skip
def test_what_ends_a_flow_that_goes_on(before: Decision, now: Decision, family: int, reason: str) -> None:
    assert superseded(before, now, family) == reason


def test_a_device_that_changed_is_named_as_the_cause() -> None:
    denied = Decision(Outcome.DENY, "denied", "", OUT, Verdict(False, "main/no", ""))
    assert superseded(BEFORE, denied, 4, device_changed=True) == "device_changed: main/no"
    assert superseded(BEFORE, TO_NAS, 4, device_changed=True) == "route_changed: device/nas"


@pytest.mark.parametrize(
    ("when", "action", "protocol", "port", "outcome", "reason", "rule"),
    [
        # Nobody has to allow DNS, anybody may deny it; who asks for a name is none of a flow's business.
        ("false", "allow", 17, 53, Outcome.LIFT, "allowed", ""),
        ("true", "allow", 6, 53, Outcome.LIFT, "allowed", "p/r"),
        ("net.port == 53", "deny", 17, 53, Outcome.PROHIBITED, "denied", "p/r"),
        ("net.port == 53", "deny", 6, 53, Outcome.DENY, "denied", "p/r"),
        ('app.dns_name == "secret"', "deny", 17, 53, Outcome.LIFT, "allowed", ""),
        ('app.dns_name != ""', "deny", 17, 53, Outcome.LIFT, "allowed", ""),
        ("true", "allow", 17, 5353, Outcome.UNREACHABLE, "not_dns", ""),
        ("true", "allow", 6, 853, Outcome.DENY, "not_dns", ""),
        ("true", "allow", 1, 0, Outcome.UNREACHABLE, "not_dns", ""),
    ],
)
def test_the_resolver_may_be_asked_unless_a_rule_denies_it(
    when: str, action: str, protocol: int, port: int, outcome: Outcome, reason: str, rule: str
) -> None:
    source = RuleSource("r", when, action)  # type: ignore[arg-type]
    loading = RuleTable.load(rules.compile([PolicySource(TENANT, "p", 0, [source])]))
    for _ in loading:
        pass
    assert loading.table is not None
    address = ipaddress.ip_address("100.96.0.53").packed
    found = decide(ROUTES, loading.table, context(), address, port, protocol)
    assert (found.outcome, found.reason, found.rule) == (outcome, reason, rule)
