"""Traces as trees."""

from __future__ import annotations

from falkirk.cli.trace import Span, render

MS = 1_000_000


def span(identity: str, parent: str, service: str, name: str, start: int, end: int, **rest: object) -> Span:
    return Span("ab" * 16, identity, parent, service, name, start * MS, end * MS, **rest)  # type: ignore[arg-type]


def test_a_tree() -> None:
    spans = [
        span("d", "b", "falkirk-upgrader", "dial", 4, 9, attributes={"port": 80}),
        span("a", "", "falkirk-flow", "flow", 0, 100),
        span("e", "a", "falkirk-upgrader", "relay", 10, 100, error="upstream_reset"),
        span("b", "a", "falkirk-flow", "prepare", 3, 10),
        span("x", "lost", "falkirk-policy", "audit", 50, 51),
    ]
    assert render(spans).splitlines() == [
        f"trace {'ab' * 16}  5 spans, 3 services",
        "falkirk-flow flow  +0.000 ms  100.000 ms",
        "├─ falkirk-flow prepare  +3.000 ms  7.000 ms",
        "│  └─ falkirk-upgrader dial  +4.000 ms  5.000 ms port=80",
        "└─ falkirk-upgrader relay  +10.000 ms  90.000 ms ERROR upstream_reset",
        "falkirk-policy audit  +50.000 ms  1.000 ms (parent not received)",
    ]
