"""Who hears of stored records: subscribers, and the traces of sampled flows."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from falkirk.policy.audit import TAIL_QUEUE, Announcer, Subscriber
from falkirk.policy.records import Filter, Record, accept
from falkirk.policy.store import Stored
from falkirk.runtime import telemetry


def record(sequence: int, **fields: Any) -> Record:
    return accept("local", 0, 1, sequence, json.dumps({"event": "started"} | fields))


def announce(announcer: Announcer, *records: Record) -> None:
    announcer._announce(Stored(list(records), 100, 200))


@pytest.fixture
def announcer() -> Any:
    loop = asyncio.new_event_loop()
    yield Announcer(loop)
    loop.close()


def test_subscribers_get_what_they_asked_for(announcer: Announcer) -> None:
    everything, acme = Subscriber(Filter()), Subscriber(Filter(tenant="acme"))
    announcer.subscribers |= {everything, acme}
    announce(announcer, record(1, tenant="acme"), record(2, tenant="other", device="acme"))
    assert everything.queue.qsize() == 2
    assert acme.queue.get_nowait().sequence == 1
    assert acme.queue.empty()


def test_a_subscriber_that_cannot_follow_is_marked_and_others_go_on(announcer: Announcer) -> None:
    slow, other = Subscriber(Filter()), Subscriber(Filter(tenant="acme"))
    announcer.subscribers |= {slow, other}
    announce(announcer, *[record(n) for n in range(1, TAIL_QUEUE + 2)])
    announce(announcer, record(TAIL_QUEUE + 2, tenant="acme"))
    assert slow.overrun.is_set()
    assert slow.queue.qsize() == TAIL_QUEUE
    assert other.queue.qsize() == 1


def test_sampled_records_get_a_span_in_their_flows_trace(announcer: Announcer, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[Any, ...]] = []
    monkeypatch.setattr(telemetry, "exporting", lambda: True)
    monkeypatch.setattr(telemetry, "emit_span", lambda *values: spans.append(values))
    flow, span = "ab" * 16, "cd" * 8
    announce(
        announcer,
        record(1, flow_id=flow, span_id=span, sampled=True, tenant="acme", rule="p/r"),
        record(2, flow_id=flow, span_id=span, sampled=False),
        record(3, flow_id=flow, sampled=True),
        record(4, flow_id="no", sampled=True),
        record(5, note='"sampled":true'),
    )
    assert spans == [
        (
            "audit",
            bytes.fromhex(flow),
            bytes.fromhex(span),
            None,
            100,
            200,
            {"event": "started", "tenant": "acme", "rule": "p/r"},
        ),
        ("audit", bytes.fromhex(flow), None, None, 100, 200, {"event": "started", "tenant": ""}),
    ]


def test_nothing_is_announced_to_a_closed_loop() -> None:
    loop = asyncio.new_event_loop()
    announcer = Announcer(loop)
    loop.close()
    announcer.stored(Stored([record(1)], 1, 2))
