"""The bitmap index against a plain reading of guards, with few and many rules a value."""

from __future__ import annotations

import ipaddress
import random

import pytest

from falkirk.decide.guards import DESTINATION, DESTINATION_GROUPS, GROUPS, MISSING, PORTS, SCALARS, Value, ports
from falkirk.decide.index import MAP_KEYS, Question, RuleIndex

VALUES: dict[str, list[Value]] = {
    "net.port": [22, 80, 443],
    "net.protocol": ["tcp", "udp"],
    "device.name": [f"d{i}" for i in range(400)],
    GROUPS: ["eng", "sre", "ops"],
    DESTINATION_GROUPS: ["eng", "printers"],
    PORTS: ["0-21", "22-443", "23-65535", "443-443", "0-65535"],
    "device.posture[os]": ["linux", "plan9", MISSING],
    "app.attributes[a]": ["x", MISSING],
    DESTINATION: ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "0.0.0.0/0", "2001:db8::/32", "::/0"],
}


def meets(guards: dict[str, list[Value]], question: dict[str, list[Value]], destination: str) -> bool:
    for variable, allowed in guards.items():
        if variable == DESTINATION:
            found = any(ipaddress.ip_address(destination) in ipaddress.ip_network(str(text)) for text in allowed)
        elif variable == PORTS:
            (port,) = question["net.port"]
            found = any(low <= int(port) <= high for low, high in map(ports, allowed))
        else:
            found = bool(set(allowed) & set(question.get(variable, [])))
        if not found:
            return False
    return True


@pytest.mark.parametrize("count", [0, 1, 7, 64, 3000])
def test_candidates_are_the_rules_whose_guards_are_met(count: int) -> None:
    rng = random.Random(count)
    rules = []
    index = RuleIndex()
    for _ in range(count):
        variables = rng.sample(sorted(VALUES), rng.randrange(len(VALUES) + 1))
        guards = {variable: rng.sample(VALUES[variable], rng.randrange(3)) for variable in variables}
        rules.append(guards)
        index.add(guards)
    for _ in index.seal():
        pass
    for _ in range(50):
        destination = rng.choice(["10.1.2.3", "10.1.9.9", "10.200.0.1", "192.0.2.1", "2001:db8::5", "fd00::1"])
        groups = rng.sample(["eng", "sre", "ops", "other"], rng.randrange(4))
        their_groups = rng.sample(["eng", "printers", "other"], rng.randrange(3))
        values: dict[str, list[Value]] = {
            "net.port": [rng.choice([22, 443, 9])],
            "net.protocol": [rng.choice(["tcp", "icmp"])],
            "device.name": [rng.choice(["d1", "d2", "d399", "none"])],
        }
        posture = rng.choice([{}, {"os": "linux"}, {"os": "other", "more": "x"}])
        attributes = rng.choice([{}, {"a": "x"}, {"a": "y"}])
        values |= {
            "device.posture[os]": [posture.get("os", MISSING)],
            "app.attributes[a]": [attributes.get("a", MISSING)],
        }
        scalars = tuple(values.get(variable, [""])[0] for variable in SCALARS)
        (port,) = values["net.port"]
        packed = ipaddress.ip_address(destination).packed
        question = Question(packed, (groups, their_groups), scalars, int(port), (posture, attributes))
        expected = [
            meets(guards, values | {GROUPS: list(groups), DESTINATION_GROUPS: list(their_groups)}, destination)
            for guards in rules
        ]
        bitmap = index.candidates(question)
        assert [bool(bitmap >> number & 1) for number in range(count)] == expected
        assert bitmap >> count == 0


def test_guards_on_more_keys_than_are_looked_at_are_left_out() -> None:
    index = RuleIndex()
    for number in range(MAP_KEYS + 5):
        index.add({f"device.posture[k{number}]": ["x"]})
    for _ in index.seal():
        pass
    question = Question(bytes(4), ((), ()), ("",) * len(SCALARS), 0, ({"k3": "x"}, {}))
    bitmap = index.candidates(question)
    assert [number for number in range(MAP_KEYS + 5) if bitmap >> number & 1] == [3, *range(MAP_KEYS, MAP_KEYS + 5)]
