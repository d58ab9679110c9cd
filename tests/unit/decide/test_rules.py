"""Rules: order, default deny, tenants apart, errors fail closed, and the index never changes an answer."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.decide import cel
from falkirk.decide.rules import Compiler, PolicySource, RuleError, RuleSource, RuleTable, Verdict, check, compile
from falkirk.wire.context import TunnelContext

TCP, UDP, ICMP6 = 6, 17, 58


def context(**changes: Any) -> TunnelContext:
    values: dict[str, Any] = {
        "tenant_id": "t-acme",
        "tenant": "acme",
        "device_id": "d-1",
        "device": "laptop",
        "virtual_network_id": "v-1",
        "virtual_network": "default",
        "addresses": (b"\x64\x60\x00\x02",),
        "user": "joe",
        "groups": ("eng", "oncall"),
        "posture": {"os": "linux"},
        "attributes": {"site": "home"},
    }
    return TunnelContext(**(values | changes))


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def load(data: bytes) -> RuleTable:
    loading = RuleTable.load(data)
    for _ in loading:
        pass
    assert loading.table is not None
    return loading.table


def table(*rules: RuleSource, tenant_id: str = "t-acme") -> RuleTable:
    return load(compile([PolicySource(tenant_id, "p", 10, rules)]))


def decide(
    rules: RuleTable, destination: str = "10.1.2.3", port: int = 443, protocol: int = TCP, **who: Any
) -> Verdict:
    return rules.decide(context(**who), address(destination), port, protocol)


@pytest.mark.parametrize(
    ("when", "matches"),
    [
        ("true", True),
        ("false", False),
        ('net.dst.inCidr("10.1.0.0/16")', True),
        ('net.dst.inCidr("10.2.0.0/16")', False),
        ('net.dst.inCidr("2001:db8::/32")', False),
        ('inCidr(net.dst, "0.0.0.0/0")', True),
        ('net.dst == "10.1.2.3"', True),
        ('net.dst in ["10.1.2.3", "10.1.2.4"]', True),
        ("net.port == 443", True),
        ("443 == net.port", True),
        ("net.port in [80, 443]", True),
        ("net.port >= 400 && net.port < 500", True),
        ('net.protocol == "tcp" && net.protocol_number == 6 && net.family == 4', True),
        ('net.protocol == "udp" || net.port == 443', True),
        ('"eng" in identity.groups', True),
        ('"eng" in identity.groups && "oncall" in identity.groups', True),
        ('"eng" in identity.groups && "sre" in identity.groups', False),
        ('"sre" in device.groups || "eng" in identity.groups', True),
        ('identity.groups.exists(g, g.startsWith("on"))', True),
        (
            'identity.user == "joe" && identity.tenant == "acme" && device.name == "laptop" && vnet.name == "default"',
            True,
        ),
        ('device.posture.os == "linux"', True),
        ("has(device.posture.disk)", False),
        ('"site" in app.attributes && app.attributes["site"] == "home"', True),
        ('"100.96.0.2" in device.addresses', True),
        ('device.addresses.exists(a, a.inCidr("100.96.0.0/12"))', True),
        ("!(net.port == 443)", False),
        ("net.port == 443 ? true : false", True),
        ("net.port == 443 && net.port == 80", False),
        ('net.dst.inCidr("10.0.0.0/8") && net.dst.inCidr("10.1.2.0/24")', True),
    ],
)
def test_what_an_expression_comes_to(when: str, matches: bool) -> None:
    verdict = decide(table(RuleSource("r", when, "allow", "l4")))
    assert verdict.allowed is matches
    assert verdict.rule == ("p/r" if matches else "")
    assert verdict.treatment == ("l4" if matches else "")


def test_default_deny_says_so() -> None:
    expected = Verdict(False, "", "no rule of tenant acme matched (default deny)")
    assert decide(table(RuleSource("r", "net.port == 1"))) == expected
    assert decide(RuleTable.empty()) == expected


def test_first_match_in_priority_then_name_then_order() -> None:
    def policy(name: str, priority: int, *names: str) -> PolicySource:
        return PolicySource("t-acme", name, priority, [RuleSource(rule, "net.port == 443", "deny") for rule in names])

    everything = [policy("late", 20, "a"), policy("b", 10, "z", "a"), policy("a", 10, "q")]
    assert decide(load(compile(everything))).rule == "a/q"
    assert decide(load(compile(everything[:2]))).rule == "b/z"
    assert decide(load(compile(everything[:1]))).rule == "late/a"


def test_a_tenant_neither_sees_nor_affects_another() -> None:
    rules = load(
        compile(
            [
                PolicySource("t-other", "open", 0, [RuleSource("all", "true")]),
                PolicySource("t-acme", "shut", 0, [RuleSource("none", "true", "deny")]),
            ]
        )
    )
    assert decide(rules).rule == "shut/none"
    assert decide(rules, tenant_id="t-other").rule == "open/all"
    assert decide(rules, tenant_id="t-third", tenant="third").why == "no rule of tenant third matched (default deny)"
    assert (rules.count("t-other"), rules.count("t-third")) == (1, 0)


def test_an_allow_rule_that_errs_is_passed_over_and_counted() -> None:
    rules = table(RuleSource("a", 'device.posture["disk"].endsWith("ok")'), RuleSource("b", "net.port == 443"))
    assert decide(rules).rule == "p/b"
    assert rules.errors == {"p/a": 1}


def test_an_allow_rule_whose_key_is_missing_is_passed_over_unseen() -> None:
    """It would only err; `explain` says that it does."""
    rules = table(RuleSource("a", 'device.posture["disk"] == "ok"'), RuleSource("b", "net.port == 443"))
    assert decide(rules).rule == "p/b"
    assert rules.errors == {}
    _, traces = rules.explain(context(), address("10.1.2.3"), 443, TCP)
    assert [trace.outcome for trace in traces] == ["error", "matched"]
    assert "disk" in traces[0].error


def test_a_deny_rule_that_errs_denies() -> None:
    rules = table(RuleSource("a", 'device.posture["disk"] == "bad"', "deny"), RuleSource("b", "true"))
    verdict = decide(rules)
    assert (verdict.allowed, verdict.rule) == (False, "p/a")
    assert "fail closed" in verdict.why
    assert "disk" in verdict.why


def test_an_error_beside_an_unmet_guard_is_false_and_not_an_error() -> None:
    rules = table(
        RuleSource("a", 'device.posture["disk"] == "bad" && net.port == 22', "deny"), RuleSource("b", "net.port == 443")
    )
    assert decide(rules).rule == "p/b"
    assert rules.errors == {}


def test_a_rule_that_does_not_compile_fails_closed() -> None:
    compiler = Compiler()
    data = compiler.compile(
        [PolicySource("t-acme", "p", 0, [RuleSource("a", "net.prot == 1"), RuleSource("b", "true")])]
    )
    assert [error.rule for error in compiler.errors] == ["p/a"]
    assert decide(load(data)).rule == "p/b"
    data = compiler.compile([PolicySource("t-acme", "p", 0, [RuleSource("a", "net.prot == 1", "deny")])])
    assert decide(load(data)).rule == "p/a"


@pytest.mark.parametrize(
    ("when", "line", "column", "part"),
    [
        ('net.port == "x"', 1, 10, "no matching overload"),
        ("net.port ==\n  == 1", 2, 3, "Syntax error"),
        ('"é" == "e" &&\n  net.prot == 1', 2, 6, "undeclared reference to 'net.prot'"),
        ("net.port", 1, 1, "a rule must be bool, this is int"),
        ("dyn(true)", 1, 1, "a rule must be bool, this is dyn"),
        ("", 1, 1, "Syntax error"),
        ('net.port == 1 ||\n net.dst.inCidr("10.1.0.0/99")', 2, 17, "'10.1.0.0/99' does not appear to be"),
        ('net.dst.inCidr("10.1.2.3/16")', 1, 16, "host bits set"),
        ('net.dst == "2001:DB8::1"', 1, 12, "write it as '2001:db8::1'"),
        ('net.dst in ["10.0.0.1", "web"]', 1, 25, "'web' does not appear to be"),
        ("true && has(net.dst)", 1, 6, "no matching overload"),
        ("true && " * 600 + "true", 1, 1, "the most is 4096"),
    ],
)
def test_errors_name_rule_line_and_column(when: str, line: int, column: int, part: str) -> None:
    (error, *_) = check([RuleSource("good", "true"), RuleSource("bad", when)])
    assert (error.rule, error.line, error.column) == ("bad", line, column)
    assert part in error.message


def test_check_accepts_good_rules_and_refuses_a_name_given_twice() -> None:
    rules = [RuleSource("a", "true"), RuleSource("a", "net.port == 1")]
    assert check(rules) == [RuleError("a", 1, 1, "another rule of this policy has this name")]
    assert check(rules[:1]) == []


def test_explain_says_what_became_of_each_rule() -> None:
    rules = table(
        RuleSource("skipped", "net.port == 80"),
        RuleSource("errs", 'device.posture["disk"] == "ok"'),
        RuleSource("no", 'device.posture["os"].startsWith("plan")'),
        RuleSource("yes", 'net.dst.inCidr("10.0.0.0/8")', "deny"),
        RuleSource("after", "true"),
    )
    verdict, traces = rules.explain(context(), address("10.1.2.3"), 443, TCP)
    assert verdict == decide(rules)
    assert [trace.outcome for trace in traces] == ["skipped_by_index", "error", "no_match", "matched", "not_reached"]
    assert traces[1].error
    assert traces[3].when == 'net.dst.inCidr("10.0.0.0/8")'
    assert len(rules.explain(context(), address("10.1.2.3"), 443, TCP, limit=2)[1]) == 2


def test_loading_goes_in_steps_and_is_the_same_for_any_size() -> None:
    rules = [RuleSource(f"r{i}", f'net.port == {i} && device.posture["os"] == "linux"') for i in range(1000)]
    loading = RuleTable.load(compile([PolicySource("t-acme", "p", 0, rules)]))
    steps = sum(1 for _ in loading)
    assert steps > 1000 // 16
    assert loading.table is not None
    assert decide(loading.table, port=777).rule == "p/r777"


# The oracle: every rule evaluated by CEL in order, no index, no guards.

_atoms = st.sampled_from(
    [
        "true",
        "false",
        "net.port == 22",
        "net.port in [22, 443]",
        "443 == net.port",
        "net.port > 100",
        "net.port >= 22 && net.port < 443",
        "65535 < net.port",
        'device.posture["os"] == "linux"',
        'device.posture.os in ["linux", "plan9"]',
        'device.posture["missing"] == "x"',
        'app.attributes.missing in ["x", "y"]',
        'net.protocol == "tcp"',
        'net.protocol in ["udp", "icmp"]',
        "net.protocol_number == 58",
        "net.family == 6",
        'net.dst.inCidr("10.0.0.0/8")',
        'inCidr(net.dst, "10.1.0.0/16")',
        'net.dst.inCidr("2001:db8::/32")',
        'net.dst.inCidr("::/0")',
        'net.dst == "10.1.2.3"',
        'net.dst in ["10.1.2.3", "2001:db8::1"]',
        '"eng" in identity.groups',
        '"sre" in device.groups',
        'identity.user == "joe"',
        'device.name in ["laptop", "phone"]',
        'vnet.name != "default"',
        'device.posture["os"] == "linux"',
        'device.posture["disk"] == "ok"',
        'app.attributes.site == "home"',
        "1 / (net.port - 22) >= 0",
    ]
)
_expressions = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||"]), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})"),
        inner.map(lambda e: f"!({e})"),
    ),
    max_leaves=6,
)
_rules = st.lists(st.tuples(_expressions, st.sampled_from(["allow", "deny"])), max_size=12)
_contexts = st.builds(
    context,
    groups=st.lists(st.sampled_from(["eng", "sre", "ops"]), unique=True).map(tuple),
    user=st.sampled_from(["", "joe", "ann"]),
    device=st.sampled_from(["laptop", "phone", "tv"]),
    posture=st.sampled_from([{}, {"os": "linux"}, {"os": "mac", "disk": "ok"}]),
    attributes=st.sampled_from([{}, {"site": "home"}]),
    virtual_network=st.sampled_from(["default", "lab"]),
)


@given(
    rules=_rules,
    who=_contexts,
    destination=st.sampled_from(["10.1.2.3", "10.9.9.9", "192.0.2.1", "2001:db8::1", "fd00::1"]),
    port=st.sampled_from([0, 22, 80, 443]),
    protocol=st.sampled_from([1, TCP, UDP, ICMP6, 132]),
)
@settings(max_examples=1500, deadline=None)
def test_the_index_never_changes_an_answer(
    rules: list[tuple[str, Any]], who: TunnelContext, destination: str, port: int, protocol: int
) -> None:
    sources = [RuleSource(str(number), when, action) for number, (when, action) in enumerate(rules)]
    packed = address(destination)
    activation = cel.activation(who, packed, port, protocol)
    expected = (False, "")
    for source in sources:
        outcome = cel.Expression(cel.compile_expression(source.when).serialized).evaluate(activation)
        if outcome is True or (outcome is not False and source.action == "deny"):
            expected = (source.action == "allow" and outcome is True, f"p/{source.name}")
            break
    built = table(*sources)
    verdict = built.decide(who, packed, port, protocol)
    assert (verdict.allowed, verdict.rule) == expected
    assert built.explain(who, packed, port, protocol)[0] == verdict
