"""What commands print: tables for people, JSON for programs.

A table has no lines and no colours and is never cut to the terminal's width, so that `grep` and `awk` work on it. JSON
is protobuf's JSON mapping with the proto's own lowerCamelCase names; 64-bit numbers are strings there, as the mapping
demands. One command prints one object; watches print one object a line.
"""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_GAP = "  "
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under upper-case headings, cells as wide as they must be; True shows as yes, False and None as nothing."""
    cells = [[_cell(value) for value in row] for row in rows]
    table = [[column.upper() for column in columns], *cells]
    widths = [max(_width(row[position]) for row in table) for position in range(len(columns))]
    for row in table:
        padded = (cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        print(_GAP.join(padded).rstrip())


def print_json(message: Message, *, line: bool = False) -> None:
    """Print a message as JSON; on one line where `line` is set, and out at once."""
    value = MessageToDict(message, always_print_fields_with_no_presence=True)
    print(json.dumps(value, ensure_ascii=False, indent=None if line else 2))
    if line:
        sys.stdout.flush()


def timestamp(value: Timestamp) -> str:
    """A time in UTC, to the second; empty where it isn't set."""
    return value.ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ") if value.seconds else ""


def instant(text: str) -> Timestamp:
    """A time as people give it: RFC 3339, or how long from now (90s, 15m, 12h, 30d). Raises ValueError."""
    found = Timestamp()
    try:
        found.FromNanoseconds(time.time_ns() + seconds(text) * 1_000_000_000)
        return found
    except ValueError:
        pass
    try:
        found.FromJsonString(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a time such as 2027-01-31T12:00:00Z nor a span such as 12h or 30d"
        ) from None
    return found


def seconds(text: str) -> int:
    """A span as people give it (90s, 15m, 12h, 30d), in seconds. Raises ValueError."""
    span = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if span is None:
        raise ValueError(f"{text!r} isn't a span such as 90s, 12h or 30d")
    return int(span[1]) * _UNITS[span[2]]


def joined(values: Iterable[str]) -> str:
    """A list in a cell."""
    return ",".join(values)


def _cell(value: object) -> str:
    if value is None or value is False:
        return ""
    text = "yes" if value is True else str(value)
    # A name can't hold any, a comment or an error may: nothing that is printed moves the cursor.
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
