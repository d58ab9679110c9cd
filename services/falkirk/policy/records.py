"""Audit records as values: what is accepted, which are new, which a filter takes. PURE.

A record comes as (node, worker, epoch, sequence) and a JSON object that says the same (its fields are documented in
`falkirk.runtime.spool`). It is stored as that object in compact form, so that bytes can be searched. Something else under a
valid id is never refused, which would block its sender for ever: it is stored as event "invalid" with its text in `raw`.

High-water marks: a mark is the last sequence stored of a (node, worker, epoch). A record at or below its mark is a
duplicate. Sequences that were jumped over are counted as missing (their sender lost them) and the mark moves on.

Limits: 65,536 characters a record; marks of the newest 256 epochs of each (node, worker) are kept.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final

import msgspec

MAX_RECORD: Final = 64 * 1024
"""Characters of a record's JSON."""
KEPT_EPOCHS: Final = 256

Key = tuple[str, int, int]
"""node, worker, epoch"""
Marks = Mapping[Key, int]

_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(dict[str, Any])


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record that was accepted; `json` is compact and one line."""

    node: str
    worker: int
    epoch: int
    sequence: int
    event: str
    json: bytes

    @property
    def key(self) -> Key:
        """Whose sequence it counts in."""
        return (self.node, self.worker, self.epoch)


def accept(node: str, worker: int, epoch: int, sequence: int, text: str) -> Record:
    """A record as it will be stored."""
    ids = {"node": node, "worker": worker, "epoch": epoch, "sequence": sequence}
    try:
        if len(text) > MAX_RECORD:
            raise ValueError(f"longer than {MAX_RECORD} characters")
        fields = _decoder.decode(text)
        event = fields.get("event")
        if not isinstance(event, str) or not event:
            raise ValueError("event is missing")
        for name, value in ids.items():
            if fields.setdefault(name, value) != value:
                raise ValueError(f"{name} is {fields[name]!r}, it came as {value!r}")
        fields.pop("stored_at", None)
        return Record(node, worker, epoch, sequence, event, _encoder.encode(fields))
    except (ValueError, OverflowError, RecursionError) as error:  # msgspec's errors are ValueErrors
        invalid = {"event": "invalid", **ids, "problem": str(error)[:500], "raw": text[: MAX_RECORD // 8]}
        return Record(node, worker, epoch, sequence, "invalid", _encoder.encode(invalid))


class Admission(msgspec.Struct):
    """What became of a batch against the marks."""

    fresh: list[Record]
    marks: dict[Key, int]
    """Marks of every key in the batch, once it is stored."""
    duplicates: int = 0
    missing: int = 0


def admit(records: Iterable[Record], *marks: Marks) -> Admission:
    """The records that aren't stored yet. `marks` are looked up first to last."""
    result = Admission([], {})
    for record in records:
        key = record.key
        known = result.marks.get(key)
        if known is None:
            known = next((some[key] for some in marks if key in some), 0)
            result.marks[key] = known
        if record.sequence <= known:
            result.duplicates += 1
            continue
        result.missing += record.sequence - known - 1
        result.marks[key] = record.sequence
        result.fresh.append(record)
    return result


def forget(marks: MutableMapping[Key, int]) -> None:
    """Drops the marks of all but the newest epochs of each (node, worker)."""
    epochs: dict[tuple[str, int], list[int]] = {}
    for node, worker, epoch in marks:
        epochs.setdefault((node, worker), []).append(epoch)
    for (node, worker), some in epochs.items():
        for epoch in sorted(some)[:-KEPT_EPOCHS]:
            del marks[(node, worker, epoch)]


class Filter(msgspec.Struct, frozen=True):
    """Which records; what is set must all hold. Times are wall-clock nanoseconds, start included and end excluded."""

    tenant: str = ""
    device: str = ""
    event: str = ""
    flow_id: str = ""
    destination: str = ""
    start: int = 0
    end: int = 0

    def needles(self) -> list[bytes]:
        """Bytes that each matching record has in it: a cheap test before `matches`."""
        wanted = {name: getattr(self, name) for name in ("flow_id", "tenant", "device", "destination", "event")}
        return [_encoder.encode(name) + b":" + _encoder.encode(value) for name, value in wanted.items() if value]

    def matches(self, json: bytes) -> bool:
        """True for a record (its JSON, with or without `stored_at`) that it takes."""
        fields = _decoder.decode(json)
        for name in ("flow_id", "tenant", "device", "destination", "event"):
            wanted = getattr(self, name)
            if wanted and fields.get(name) != wanted:
                return False
        if not self.start and not self.end:
            return True
        try:
            when = parse_time(str(fields.get("time")))
        except ValueError:
            return False
        return when >= self.start and (not self.end or when < self.end)


def parse_time(text: str) -> int:
    """Nanoseconds of an RFC 3339 time in UTC ("Z"). Raises ValueError."""
    if not text.endswith("Z"):
        raise ValueError(f"not a time in UTC: {text!r}")
    whole, _, fraction = text[:-1].partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        raise ValueError(f"not a time: {text!r}")
    return int(moment.timestamp()) * 1_000_000_000 + int(fraction[:9].ljust(9, "0") or 0)


def format_time(nanoseconds: int) -> str:
    """RFC 3339 in UTC with nanoseconds, always 30 characters."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
