"""What `falkirk audit` makes of times and records."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import typer

from falkirk.cli.audit import moment, row

NOW = datetime.datetime(2026, 11, 19, 12, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", "2026-11-19T11:58:30Z"),
        ("1h", "2026-11-19T11:00:00Z"),
        ("2d", "2026-11-17T12:00:00Z"),
        ("2026-11-01T00:00:00Z", "2026-11-01T00:00:00Z"),
        ("2026-11-01T01:00:00+01:00", "2026-11-01T00:00:00Z"),
        ("2026-11-01", "2026-11-01T00:00:00Z"),
    ],
)
def test_times(text: str, expected: str) -> None:
    assert moment(text, NOW).ToJsonString() == expected


@pytest.mark.parametrize("text", ["", "1", "1y", "-1h", "yesterday", "99999999999w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        moment(text, NOW)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {
                "event": "denied",
                "time": "2026-11-19T10:20:33.123456789Z",
                "tenant": "acme",
                "device": "laptop",
                "user": "ann",
                "source": "100.96.0.2",
                "source_port": 40000,
                "destination": "2001:db8::1",
                "destination_port": 22,
                "rule": "p/no-ssh",
                "why": "denied by p/no-ssh",
            },
            ("ann", "100.96.0.2:40000", "[2001:db8::1]:22", "p/no-ssh", "denied by p/no-ssh"),
        ),
        (
            {"event": "ended", "reason": "finished", "bytes_up": 5, "bytes_down": 7, "duration_ns": 1_250_000_000},
            ("", "", "", "", "finished 5 up 7 down 1.2 s"),
        ),
        ({"event": "invalid", "problem": "event is missing"}, ("", "", "", "", "event is missing")),
        (
            {
                "event": "query",
                "user": "ann",
                "source": "100.96.0.2",
                "query": "nas.acme.falkirk",
                "query_type": "A",
                "rcode": "NOERROR",
                "answered_by": "device",
            },
            ("ann", "100.96.0.2", "", "", "nas.acme.falkirk A NOERROR by device"),
        ),
    ],
)
def test_rows(record: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert row(record)[4:] == expected
