"""What a rule needs at least: conditions by which an index may pass it over without evaluating it. PURE.

A guard says: unless this variable has one of these values, the expression is false. CEL's && and || absorb errors
(`false && error` is false), so a rule whose guard isn't met is false and not an error, and may be passed over even
where an error would deny. Guards come from comparisons with literals, joined by && and ||:

    net.port == 443        net.protocol in ["tcp", "udp"]        "eng" in identity.groups        net.dst.inCidr("10.0.0.0/8")
    net.port >= 8000       device.posture["os"] == "linux"       app.attributes.team in ["a", "b"]

Everything else has no guard and is evaluated. An expression that is nothing but such comparisons is `exact`: guards met
means true, and it is never evaluated at all. A map's key that isn't there is an error, not false: a guard on one is also met where it is missing, and
such an expression is never exact.

Limit: 256 values a guard; with more the guard is left out (the rule is then evaluated).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

import msgspec

from falkirk.decide.cel import Compiled, Diagnostic, InvalidExpression, position
from falkirk.decide.checked import Checked, Node, walk

MAX_VALUES: Final = 256
DESTINATION: Final = "net.dst"
GROUPS: Final = "identity.groups"
DESTINATION_GROUPS: Final = "net.dst_groups"
GROUP_LISTS: Final = (GROUPS, DESTINATION_GROUPS)
"""Variables with several values, asked with `in`."""
SCALARS: Final = (
    "net.port",
    "net.protocol",
    "net.protocol_number",
    "net.family",
    "device.name",
    "identity.user",
    "vnet.name",
    "identity.tenant",
    "net.dst_device",
    "net.dst_user",
    "app.dns_name",
    "app.dns_type",
)
"""Variables with one value, compared with ==."""

PORTS: Final = "net.port range"
"""Ranges of `net.port`; values are "first-last", both included."""
MAPS: Final = ("device.posture", "app.attributes")
"""Variables with keys. A guard on one is on `MAP[key]`."""
MISSING: Final = -1
"""Of a map's key that isn't there; its values are text."""

_ALIASES: Final = {"device.groups": GROUPS}
_LAST_PORT: Final = 65535
_ORDERS: Final = {"_<_": "_>_", "_<=_": "_>=_", "_>_": "_<_", "_>=_": "_<=_"}
"""Comparisons, and what they are with their sides exchanged."""

Value = int | str
"""Of a scalar its value; of a group its name; of a destination a prefix in text ("10.0.0.0/8")."""


class Guards(msgspec.Struct, frozen=True):
    """Variable -> values of which one must be met; all variables must be met. `exact`: and nothing else need hold."""

    values: dict[str, frozenset[Value]]
    exact: bool


NOTHING: Final = Guards({}, exact=False)


def guards(source: str, compiled: Compiled) -> Guards:
    """The guards of an expression. Raises InvalidExpression for literals that can never match: malformed prefixes, prefixes with
    host bits, addresses not in RFC 5952 form."""
    problems = _literals(source, compiled.checked)
    if problems:
        raise InvalidExpression(problems)
    found = _extract(compiled.checked.root)
    kept = {variable: values for variable, values in found.values.items() if len(values) <= MAX_VALUES}
    return Guards(kept, found.exact and len(kept) == len(found.values))


def _extract(node: Node) -> Guards:
    if node.kind == "const" and node.value is True:
        return Guards({}, exact=True)
    if node.kind != "call":
        return NOTHING
    if node.name == "_&&_":
        return _both(_extract(node.children[0]), _extract(node.children[1]))
    if node.name == "_||_":
        return _either(_extract(node.children[0]), _extract(node.children[1]))
    return _comparison(node)


def _both(left: Guards, right: Guards) -> Guards:
    merged = dict(left.values)
    exact = left.exact and right.exact
    for variable, values in right.values.items():
        if variable not in merged:
            merged[variable] = values
        elif variable in SCALARS or variable.endswith("]"):
            merged[variable] &= values
        elif variable == PORTS:
            merged[variable] = frozenset(_common(merged[variable], values))
        else:  # a set of groups or nested prefixes: one of the two still is a guard, but not all that must hold
            merged[variable] = min(merged[variable], values, key=len)
            exact = False
    return Guards(merged, exact)


def _either(left: Guards, right: Guards) -> Guards:
    for side in (left, right):
        if side.exact and not side.values:  # true || anything
            return side
    union = {
        variable: left.values[variable] | right.values[variable]
        for variable in left.values.keys() & right.values.keys()
    }
    same = left.values.keys() == right.values.keys() and len(union) == 1
    return Guards(union, left.exact and right.exact and same)


def _comparison(node: Node) -> Guards:
    """A call that compares a variable with literals, or nothing."""
    if node.name == "inCidr" and len(node.children) == 2:
        subject, literals = node.children[0], [node.children[1]]
        if subject.name != DESTINATION:
            return NOTHING
    elif node.name in _ORDERS:
        return _range(node)
    elif node.name == "_==_":
        subject, literal = node.children
        if subject.kind == "const":
            subject, literal = literal, subject
        literals = [literal]
        if subject.name not in SCALARS and subject.name != DESTINATION:
            return _of_map(subject, literals)
    elif node.name == "@in":
        subject, container = node.children
        literals = list(container.children) if container.kind == "list" else []
        if container.kind == "ident" and _ALIASES.get(container.name, container.name) in GROUP_LISTS:
            subject, literals = container, [subject]
        elif subject.name not in SCALARS and subject.name != DESTINATION:
            return _of_map(subject, literals)
    else:
        return NOTHING
    if subject.kind != "ident" or not literals:
        return NOTHING
    values: set[Value] = set()
    for literal in literals:
        if literal.kind != "const" or not isinstance(literal.value, int | str) or isinstance(literal.value, bool):
            return NOTHING
        if subject.name == DESTINATION:
            values.add(str(ipaddress.ip_network(literal.value)))
        else:
            values.add(literal.value)
    return Guards({_ALIASES.get(subject.name, subject.name): frozenset(values)}, exact=True)


def _of_map(subject: Node, literals: list[Node]) -> Guards:
    """A map's value, compared with texts."""
    if subject.kind == "select" and len(subject.children) == 1:
        container, key = subject.children[0], subject.name
    elif subject.name == "_[_]" and isinstance(subject.children[1].value, str):
        container, key = subject.children[0], subject.children[1].value
    else:
        return NOTHING
    values = [literal.value for literal in literals if literal.kind == "const" and isinstance(literal.value, str)]
    if container.kind != "ident" or container.name not in MAPS or len(values) != len(literals) or not values:
        return NOTHING
    return Guards({f"{container.name}[{key}]": frozenset({*values, MISSING})}, exact=False)


def _range(node: Node) -> Guards:
    """A port above or below a number. Ports are never anything but numbers, so it says all."""
    subject, literal = node.children
    name = node.name
    if subject.kind == "const":
        subject, literal, name = literal, subject, _ORDERS[name]
    bound = literal.value
    if subject.kind != "ident" or subject.name != "net.port" or literal.kind != "const" or type(bound) is not int:
        return NOTHING
    first = {"_>_": bound + 1, "_>=_": bound}.get(name, 0)
    last = {"_<_": bound - 1, "_<=_": bound}.get(name, _LAST_PORT)
    first, last = max(first, 0), min(last, _LAST_PORT)
    return Guards({PORTS: frozenset({f"{first}-{last}"} if first <= last else ())}, exact=True)


def ports(text: Value) -> tuple[int, int]:
    """First and last of a range."""
    first, _, last = str(text).partition("-")
    return int(first), int(last)


def _common(one: frozenset[Value], other: frozenset[Value]) -> Iterator[str]:
    """What ranges have in common."""
    for low, high in map(ports, one):
        for first, last in map(ports, other):
            if max(low, first) <= min(high, last):
                yield f"{max(low, first)}-{min(high, last)}"


def _literals(source: str, checked: Checked) -> list[Diagnostic]:
    """Literals that make a comparison false for ever, or an error."""
    problems = []
    for node in walk(checked.root):
        if node.kind != "call":
            continue
        constants: list[Node] = []
        check = _address_problem
        if node.name == "inCidr" and len(node.children) == 2:
            constants, check = [node.children[1]], _prefix_problem
        elif node.name in ("_==_", "_!=_") and any(_is_destination(child) for child in node.children):
            constants = list(node.children)
        elif node.name == "@in" and _is_destination(node.children[0]):
            constants = list(node.children[1].children)
        for constant in constants:
            if constant.kind == "const" and isinstance(constant.value, str):
                problem = check(constant.value)
                if problem:
                    problems.append(position(source, checked, constant.id, problem))
    return problems


def _is_destination(node: Node) -> bool:
    return node.kind == "ident" and node.name == DESTINATION


def _prefix_problem(text: str) -> str | None:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        return str(error)
    return None


def _address_problem(text: str) -> str | None:
    try:
        canonical = str(ipaddress.ip_address(text))
    except ValueError as error:
        return str(error)
    return None if canonical == text else f"net.dst is never {text!r}: write it as {canonical!r}"
