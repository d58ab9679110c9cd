"""Which guards an expression yields, and when they say all."""

from __future__ import annotations

import pytest

from falkirk.decide.cel import compile_expression
from falkirk.decide.guards import MAX_VALUES, MISSING, PORTS, Guards, guards


def found(when: str) -> Guards:
    return guards(when, compile_expression(when))


@pytest.mark.parametrize(
    ("when", "values", "exact"),
    [
        ("true", {}, True),
        ("false", {}, False),
        ("net.port == 443", {"net.port": {443}}, True),
        ("net.port != 443", {}, False),
        ("net.port == -1", {"net.port": {-1}}, True),
        (
            'net.dst.inCidr("10.1.0.0/16") && net.port == 443 && "eng" in identity.groups',
            {"net.dst": {"10.1.0.0/16"}, "net.port": {443}, "identity.groups": {"eng"}},
            True,
        ),
        ('net.dst == "10.1.2.3"', {"net.dst": {"10.1.2.3/32"}}, True),
        (
            'net.port == 443 && device.posture.os == "x"',
            {"net.port": {443}, "device.posture[os]": {"x", MISSING}},
            False,
        ),
        ("net.port > 443", {PORTS: {"444-65535"}}, True),
        ("net.port < 443", {PORTS: {"0-442"}}, True),
        ("1024 <= net.port", {PORTS: {"1024-65535"}}, True),
        ("net.port >= 8000 && net.port <= 8999", {PORTS: {"8000-8999"}}, True),
        ("net.port > 80 && net.port < 20", {PORTS: set()}, True),
        ("net.port > 70000", {PORTS: set()}, True),
        ("net.port <= -1", {PORTS: set()}, True),
        ("net.port < 10 || net.port > 60000", {PORTS: {"0-9", "60001-65535"}}, True),
        ("net.port == 443 || net.port > 60000", {}, False),
        ("net.port > net.family", {}, False),
        ("net.protocol_number > 5", {}, False),
        (
            'device.posture["os"] in ["a", "b"] && "a" == device.posture.os',
            {"device.posture[os]": {"a", MISSING}},
            False,
        ),
        (
            'device.posture["os"] == "a" || device.posture["os"] == "b"',
            {"device.posture[os]": {"a", "b", MISSING}},
            False,
        ),
        ('device.posture["os"] == device.posture["want"]', {}, False),
        ('device.posture[identity.user] == "a"', {}, False),
        ('device.posture["os"] != "a"', {}, False),
        ("net.port == 443 || net.port in [80, 81]", {"net.port": {80, 81, 443}}, True),
        ('net.port == 443 || net.protocol == "udp"', {}, False),
        (
            '(net.port == 443 && net.protocol == "tcp") || (net.port == 53 && net.protocol == "udp")',
            {"net.port": {443, 53}, "net.protocol": {"tcp", "udp"}},
            False,
        ),
        ('net.port == 443 || device.posture.os == "x"', {}, False),
        ("true || net.port == 1", {}, True),
        ("net.port in [1, 2] && net.port in [2, 3]", {"net.port": {2}}, True),
        ('"a" in identity.groups && "b" in device.groups', {"identity.groups": {"a"}}, False),
        ('"a" in identity.groups || "b" in device.groups', {"identity.groups": {"a", "b"}}, True),
        ('device.addresses.exists(a, a.inCidr("10.0.0.0/8"))', {}, False),
        ('identity.groups.exists(g, g == "a" && net.port == 1)', {}, False),
        ('net.dst_device == "nas"', {"net.dst_device": {"nas"}}, True),
        (
            'net.dst_user in ["alice", "bob"] && net.port == 22',
            {"net.dst_user": {"alice", "bob"}, "net.port": {22}},
            True,
        ),
        ('"printers" in net.dst_groups', {"net.dst_groups": {"printers"}}, True),
        ('"a" in net.dst_groups && "b" in identity.groups', {"net.dst_groups": {"a"}, "identity.groups": {"b"}}, True),
        ('"a" in net.dst_groups || "a" in identity.groups', {}, False),
        ("net.port in [int(1), 2]", {}, False),
        ("net.port in []", {}, False),
        (f"net.port in {list(range(MAX_VALUES + 1))}", {}, False),
        ("!(net.port == 443)", {}, False),
        ('net.dst.inCidr(app.attributes["p"])', {}, False),
        ('app.attributes["a"] == "b"', {"app.attributes[a]": {"b", MISSING}}, False),
    ],
)
def test_guards(when: str, values: dict[str, set[int | str]], exact: bool) -> None:
    assert found(when) == Guards({name: frozenset(some) for name, some in values.items()}, exact)
