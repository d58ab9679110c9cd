"""What a command's --json may look like, and what `falkirk apply` gets."""

from __future__ import annotations

import pytest

from tools.bench_lift import ROUTES, RULES
from tools.bench_stage import resources
from tools.mesh import records, resource


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("[]", []),
        ('[{"a": 1}]', [{"a": 1}]),
        ('{"flows": [{"a": 1}]}', [{"a": 1}]),
        ('{"flows": []}', []),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}', [{"a": 1}]),
    ],
)
def test_records_reads_lists_objects_and_lines(text: str, expected: list[dict[str, int]]) -> None:
    assert records(text, "flows") == expected


def test_a_resource_without_a_tenant_has_none_in_its_metadata() -> None:
    assert resource("Tenant", "acme")["metadata"] == {"name": "acme"}
    assert resource("Device", "d", "acme", user="u")["spec"] == {"user": "u"}


def test_the_bench_has_as_many_rules_and_routes_as_it_says_and_no_prefix_twice() -> None:
    documents = list(resources(RULES, ROUTES))
    routes = [document["spec"]["prefix"] for document in documents if document["kind"] == "Route"]
    assert len(routes) == len(set(routes)) == ROUTES
    rules = [rule for document in documents if document["kind"] == "Policy" for rule in document["spec"]["rules"]]
    assert len(rules) == RULES
    assert rules[-1]["action"] == "allow"
