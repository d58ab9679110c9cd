"""A flow's trace, as an OTLP receiver outside gets it from all services."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from falkirk.cli.trace import Receiver, Span
from tests.netns.fidelity import DEADLINE_S, Way, open_world
from tools.netlab import wait_for

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]
SPANS = {
    "admit": "falkirk-onramp",
    "resolve": "falkirk-flow",
    "decide": "falkirk-flow",
    "dial": "falkirk-upgrader",
    "relay": "falkirk-upgrader",
    "audit": "falkirk-policy",
}


def exchange(way: Way) -> str:
    """A short connection; the id of its flow, once its end is on record."""
    with way.pair() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        port = int(server.getsockname()[1])
    found = way.world.recorded("ended", port)
    return str(found["flow_id"])


def check(trace_id: str, spans: Sequence[Span]) -> None:
    """Every step is there, by its service, and below the flow's own span."""
    by_id = {span.span_id: span for span in spans}
    roots = [span for span in spans if not span.parent_id]
    assert [(root.service, root.name) for root in roots] == [("falkirk-flow", "flow")]
    assert all(span.parent_id in by_id for span in spans if span.parent_id)
    assert all(span.trace_id == trace_id for span in spans)
    for name, service in SPANS.items():
        assert any((span.name, span.service) == (name, service) for span in spans), name
    assert len({span.service for span in spans}) >= 4


def settings(receiver: Receiver, ratio: float) -> dict[str, object]:
    return {"telemetry": {"otlp_endpoint": receiver.endpoint, "sample_ratio": ratio}}


@pytest.mark.parametrize("workers", [1, 3], ids=["1-worker", "3-workers"])
def test_every_flow_has_a_whole_trace_where_all_are_sampled(workers: int) -> None:
    with Receiver() as receiver, open_world(workers, settings(receiver, 1.0)) as world:
        flows = [exchange(way) for way in world.ways()]

        def complete() -> bool:
            traces = receiver.traces()
            return all({*SPANS, "flow"} <= {span.name for span in traces.get(flow, ())} for flow in flows)

        wait_for("whole traces", complete, DEADLINE_S)
        for flow in flows:
            check(flow, receiver.traces()[flow])


def test_no_flow_has_a_trace_where_none_is_sampled() -> None:
    with Receiver() as receiver:
        with open_world(1, settings(receiver, 0.0)) as world:
            for way in world.ways():
                exchange(way)
        # The mesh has ended, and with it sent what it had to send.
        assert receiver.traces() == {}
