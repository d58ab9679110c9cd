"""Audit records: acceptance, high-water marks, filters, times."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.policy.records import KEPT_EPOCHS, Filter, Record, accept, admit, forget, format_time, parse_time

SECOND = 1_000_000_000


def record(sequence: int, *, worker: int = 0, epoch: int = 1) -> Record:
    return accept("local", worker, epoch, sequence, '{"event": "started"}')


def sequences(records: list[Record]) -> list[int]:
    return [each.sequence for each in records]


def test_a_record_is_stored_compact_with_its_ids() -> None:
    made = accept("local", 1, 22, 3, '{ "event": "denied",\n "tenant": "acme", "stored_at": "never" }')
    assert made.event == "denied"
    assert made.json == b'{"event":"denied","tenant":"acme","node":"local","worker":1,"epoch":22,"sequence":3}'


@pytest.mark.parametrize(
    "text",
    ["", "no", "[]", "{}", '{"event":7}', '{"event":"x","sequence":4}', "[" * 9000, '{"event":"' + "x" * 70000 + '"}'],
)
def test_what_is_not_a_record_is_kept_as_invalid(text: str) -> None:
    made = accept("local", 1, 22, 3, text)
    fields = json.loads(made.json)
    assert (fields["event"], fields["sequence"]) == ("invalid", 3)
    assert fields["raw"] == text[:8192]
    assert fields["problem"]


def test_what_is_at_or_below_its_mark_is_a_duplicate() -> None:
    batch = admit([record(n) for n in (2, 3, 3, 4, 2)], {("local", 0, 1): 2})
    assert sequences(batch.fresh) == [3, 4]
    assert (batch.duplicates, batch.missing, batch.marks) == (3, 0, {("local", 0, 1): 4})


def test_marks_are_apart_for_workers_and_epochs_and_gaps_are_counted() -> None:
    batch = admit([record(1), record(1, worker=1), record(4, epoch=2), record(2)], {("local", 0, 2): 1})
    assert [(each.key, each.sequence) for each in batch.fresh] == [
        (("local", 0, 1), 1),
        (("local", 1, 1), 1),
        (("local", 0, 2), 4),
        (("local", 0, 1), 2),
    ]
    assert batch.missing == 2


def test_marks_that_have_just_moved_go_before_older_ones() -> None:
    assert not admit([record(5)], {("local", 0, 1): 5}, {("local", 0, 1): 2}).fresh


@given(st.lists(st.integers(1, 30)), st.integers(0, 10))
def test_redelivery_from_the_mark_stores_each_once(cuts: list[int], first: int) -> None:
    marks: dict[Any, int] = {}
    stored: list[int] = []
    for cut in [*cuts, 30]:
        start = max(0, marks.get(("local", 0, 1), 0) - first)
        batch = admit([record(n) for n in range(start + 1, cut + 1)], marks)
        stored += sequences(batch.fresh)
        marks |= batch.marks
    assert stored == list(range(1, 31))


def test_only_the_newest_epochs_keep_their_marks() -> None:
    marks = {("local", worker, epoch): 9 for worker in (0, 1) for epoch in range(KEPT_EPOCHS + 5 * worker)}
    forget(marks)
    assert len(marks) == 2 * KEPT_EPOCHS
    assert ("local", 1, 4) not in marks
    assert ("local", 1, 5) in marks


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (Filter(), True),
        (Filter(tenant="acme", event="denied", device="laptop", destination="10.1.2.3", flow_id="ab"), True),
        (Filter(tenant="other"), False),
        (Filter(event="started"), False),
        (Filter(start=100 * SECOND, end=101 * SECOND), True),
        (Filter(start=100 * SECOND + 6), False),
        (Filter(end=100 * SECOND + 5), False),
        (Filter(tenant="acme", start=1, end=2), False),
    ],
)
def test_filters(wanted: Filter, matches: bool) -> None:
    fields = {
        "event": "denied",
        "flow_id": "ab",
        "time": format_time(100 * SECOND + 5),
        "tenant": "acme",
        "device": "laptop",
        "destination": "10.1.2.3",
    }
    made = accept("local", 0, 1, 1, json.dumps(fields))
    assert wanted.matches(made.json) is matches
    if matches:
        assert all(needle in made.json for needle in wanted.needles())


def test_a_record_without_a_time_is_outside_every_span() -> None:
    assert not Filter(start=1).matches(record(1).json)
    assert not Filter(start=1).matches(b'{"event":"x","time":7}')


@given(st.integers(0, 4_000_000_000 * SECOND))
def test_times_come_back(nanoseconds: int) -> None:
    text = format_time(nanoseconds)
    assert len(text) == 30
    assert parse_time(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1970-01-01T00:00:01Z", SECOND),
        ("1970-01-01T00:00:01.5Z", SECOND * 3 // 2),
        ("1970-01-01T00:00:00.000000007Z", 7),
    ],
)
def test_shorter_times_are_read(text: str, nanoseconds: int) -> None:
    assert parse_time(text) == nanoseconds


@pytest.mark.parametrize("text", ["", "Z", "yesterday", "1970-01-01T00:00:01", "1970-01-01T00:00:01.xZ"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)
