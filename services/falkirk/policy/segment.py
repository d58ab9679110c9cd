"""The bytes of an audit segment, and what can be read from one that a crash left. PURE.

    {"segment":{"version":1,"number":7,"opened_at":"…","marks":[["local",0,1731…,4711],…]}}
    {"stored_at":"2026-11-19T10:20:33.123456789Z","event":"started","flow_id":"…",…}
    {"stored_at":"2026-11-19T10:20:33.123456789Z","event":"denied",…}

NDJSON: the first line tells the high-water marks as they were when the segment was opened, each further line is one record
behind the time at which it was stored. So the newest segment alone says which records are stored, what is stored and what
is marked are the same bytes, and no crash can set the two at odds.

What a crash leaves is a segment whose end was being written: an unfinished last line, or (power loss) lines of rubbish where
pages hadn't reached the disk. `recover` keeps everything before the first line that isn't whole; what follows was never
acknowledged, or the disk is damaged (so the caller puts it aside instead of throwing it away).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from falkirk.policy.records import Key, Marks, Record, format_time, parse_time

VERSION: Final = 1
_STORED: Final = b'{"stored_at":"'
_HEAD_LENGTH: Final = len(_STORED) + 30 + len('",')
HEADER_START: Final = b'{"segment":'
_NAME: Final = re.compile(r"audit-(\d{8})\.ndjson")


class UnreadableSegment(ValueError):
    """A file without the header of a segment of this version."""


class _Header(msgspec.Struct):
    version: int
    number: int
    opened_at: str
    marks: list[tuple[str, int, int, int]]


class _First(msgspec.Struct):
    segment: _Header


class Ids(msgspec.Struct, frozen=True):
    """Which record a line is."""

    node: str
    worker: int
    epoch: int
    sequence: int


_first: Final = msgspec.json.Decoder(_First)
_ids: Final = msgspec.json.Decoder(Ids)


class Recovered(msgspec.Struct, frozen=True):
    """What a segment holds. `length` is where its whole lines end, in bytes; times in wall-clock nanoseconds."""

    number: int
    opened_at: int
    marks: dict[Key, int]
    records: int
    length: int


def name(number: int) -> str:
    """A segment's file name."""
    return f"audit-{number:08d}.ndjson"


def number(file_name: str) -> int | None:
    """The number in a segment's file name; None for other files."""
    match = _NAME.fullmatch(file_name)
    return int(match[1]) if match else None


def header(number: int, now: int, marks: Marks) -> bytes:
    """The first line of a new segment."""
    rows = [(*key, sequence) for key, sequence in sorted(marks.items())]
    return msgspec.json.encode(_First(_Header(VERSION, number, format_time(now), rows))) + b"\n"


def lines(records: Sequence[Record], now: int) -> bytes:
    """Records as lines."""
    head = _STORED + format_time(now).encode() + b'",'
    return b"".join([head + record.json[1:] + b"\n" for record in records])


def split(line: bytes) -> tuple[bytes, bytes]:
    """The time at which a line was stored, as text, and its record's JSON. Raises ValueError."""
    if not line.startswith(_STORED) or len(line) < _HEAD_LENGTH:
        raise ValueError("not a line of a segment")
    return line[len(_STORED) : _HEAD_LENGTH - 2], b"{" + line[_HEAD_LENGTH:]


def ids(json: bytes) -> Ids:
    """Which record a JSON is. Raises ValueError."""
    return _ids.decode(json)


def opened(first_line: bytes) -> int:
    """When a segment was opened, by its first line. Raises UnreadableSegment."""
    try:
        head = _first.decode(first_line).segment
        if head.version != VERSION:
            raise UnreadableSegment(f"segment of version {head.version}; this program reads version {VERSION}")
        return parse_time(head.opened_at)
    except UnreadableSegment:
        raise
    except ValueError as error:
        raise UnreadableSegment(f"not an audit segment: {error}") from error


def recover(data: bytes) -> Recovered:
    """Reads a segment as far as it is whole. Raises UnreadableSegment where not even its first line is."""
    end = data.find(b"\n") + 1
    if not end:
        raise UnreadableSegment("not an audit segment: no whole line")
    opened_at = opened(data[:end])
    head = _first.decode(data[:end]).segment
    marks = {(node, worker, epoch): sequence for node, worker, epoch, sequence in head.marks}
    records = 0
    while True:
        after = data.find(b"\n", end) + 1
        if not after:
            break
        try:
            found = ids(split(data[end : after - 1])[1])
        except ValueError:
            break
        key = (found.node, found.worker, found.epoch)
        marks[key] = max(marks.get(key, 0), found.sequence)
        records += 1
        end = after
    return Recovered(head.number, opened_at, marks, records, end)
