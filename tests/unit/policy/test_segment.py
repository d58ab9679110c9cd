"""Segments: what a crash leaves at any byte is recovered, and delivering again stores each record exactly once."""

from __future__ import annotations

import json

import pytest

from falkirk.policy import segment
from falkirk.policy.records import Key, Record, accept, admit

KEY: Key = ("local", 0, 5)
NOW = 1_731_000_000_123_456_789


def records(first: int, last: int) -> list[Record]:
    return [accept(*KEY, n, f'{{"event":"started","note":"é\\n{n}"}}') for n in range(first, last + 1)]


def stored(data: bytes) -> list[int]:
    return [json.loads(segment.split(line)[1])["sequence"] for line in data.splitlines()[1:]]


def test_a_segment_alone_tells_the_marks() -> None:
    data = segment.header(7, NOW, {KEY: 3, ("other", 2, 1): 9}) + segment.lines(records(4, 6), NOW)
    found = segment.recover(data)
    assert (found.number, found.opened_at, found.records, found.length) == (7, NOW, 3, len(data))
    assert found.marks == {KEY: 6, ("other", 2, 1): 9}
    assert json.loads(data.splitlines()[1]) == json.loads(segment.split(data.splitlines()[1])[1]) | {
        "stored_at": "2024-11-07T17:20:00.123456789Z"
    }


def test_cut_at_any_byte_nothing_is_lost_or_doubled() -> None:
    head = segment.header(1, NOW, {KEY: 3})
    whole = head + segment.lines(records(4, 9), NOW)
    for cut in range(len(head), len(whole) + 1):
        found = segment.recover(whole[:cut])
        again = admit(records(1, 9), found.marks)
        assert stored(whole[: found.length] + segment.lines(again.fresh, NOW)) == [4, 5, 6, 7, 8, 9]


def test_rubbish_in_the_middle_ends_what_is_kept() -> None:
    parts = [segment.lines([record], NOW) for record in records(1, 5)]
    head = segment.header(1, NOW, {})
    for damage in (b"\0" * 40 + b"\n", b"{}\n", parts[2][:-20] + b"\n", b"\n"):
        found = segment.recover(head + parts[0] + parts[1] + damage + parts[3] + parts[4])
        assert found.length == len(head + parts[0] + parts[1])
        assert found.marks == {KEY: 2}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"{}\n",
        segment.header(1, NOW, {})[:-1],
        b'{"segment":{"version":2,"number":1,"opened_at":"","marks":[]}}\n',
    ],
)
def test_a_file_without_a_whole_header_is_refused(data: bytes) -> None:
    with pytest.raises(segment.UnreadableSegment):
        segment.recover(data)


def test_names() -> None:
    assert segment.number(segment.name(42)) == 42
    assert [segment.number(name) for name in ("lock", "audit-00000001.new", "audit-1.ndjson")] == [None] * 3
