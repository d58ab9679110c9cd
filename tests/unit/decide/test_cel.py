"""The language: types of results, errors as values, limits, addresses."""

from __future__ import annotations

import pytest

from falkirk.decide import cel
from falkirk.wire.context import TunnelContext

CONTEXT = TunnelContext("t", "acme", "d", "laptop", "v", "default", (b"\xfd" + bytes(14) + b"\x02",), groups=("eng",))


def evaluate(when: str, destination: bytes = bytes([10, 1, 2, 3]), protocol: int = 6) -> bool | str:
    expression = cel.Expression(cel.compile_expression(when).serialized)
    return expression.evaluate(cel.activation(CONTEXT, destination, 443, protocol))


@pytest.mark.parametrize(
    ("when", "part"),
    [
        ('device.posture["os"] == "linux"', "os"),
        ("1 / (net.port - 443) == 1", "divide by zero"),
        ('"no".inCidr("10.0.0.0/8")', "does not appear to be"),
        ('net.dst.inCidr(identity.tenant + "/8")', "does not appear to be"),
        ('net.dst.inCidr(net.dst + "/8")', "host bits set"),
        ('net.dst.matches("(")', "regular expression"),
    ],
)
def test_errors_are_values(when: str, part: str) -> None:
    result = evaluate(when)
    assert isinstance(result, str)
    assert part in result


def test_runaway_comprehensions_end_in_an_error() -> None:
    ten = "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"
    when = "a + b + c + d + e >= 0"
    for name in "edcba":
        when = f"{ten}.all({name}, {when})"
    result = evaluate(when)
    assert isinstance(result, str)
    assert "budget" in result


@pytest.mark.parametrize(
    ("destination", "protocol", "when"),
    [
        (bytes(16), 58, 'net.dst == "::" && net.protocol == "icmp" && net.family == 6'),
        (bytes(4), 1, 'net.dst == "0.0.0.0" && net.protocol == "icmp" && net.family == 4'),
        (bytes(4), 17, 'net.protocol == "udp"'),
        (bytes(4), 132, 'net.protocol == "other" && net.protocol_number == 132'),
        (bytes(15) + b"\x01", 6, 'net.dst.inCidr("::/127") && !net.dst.inCidr("0.0.0.0/0")'),
        (bytes(4), 6, 'device.addresses == ["fd00::2"] && identity.user == "" && vnet.name == "default"'),
    ],
)
def test_variables(destination: bytes, protocol: int, when: str) -> None:
    assert evaluate(when, destination, protocol) is True


def test_every_problem_is_told() -> None:
    with pytest.raises(cel.InvalidExpression) as caught:
        cel.compile_expression("net.prt == 1 ||\n  foo")
    assert [(d.line, d.column) for d in caught.value.diagnostics] == [(1, 4), (2, 3)]
    assert "undeclared reference to 'foo'" in str(caught.value)


def test_other_bytes_are_no_expression() -> None:
    with pytest.raises(ValueError):
        cel.Expression(b"rubbish")
