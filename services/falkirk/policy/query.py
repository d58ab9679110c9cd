"""Reading the audit log: newest first, in blocks from the end, so that recent records cost little however long the log is.

Bytes are searched before JSON is parsed, so lines that can't match cost no decoding. Only durable lines are read; a segment
that retention removes meanwhile is skipped. Blocking: callers run it in a thread, and set `cancelled` when nobody waits
any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from falkirk.policy import segment
from falkirk.policy.records import Filter
from falkirk.policy.store import AuditStore

BLOCK: Final = 1 << 20
CLOCK_SKEW: Final = 3600 * 1_000_000_000
"""Nanoseconds by which a node's clock may be ahead of ours and its records still be found by time."""


def newest(
    store: AuditStore, wanted: Filter, limit: int, cancelled: threading.Event | None = None
) -> list[tuple[bytes, bytes]]:
    """At most `limit` matching records, in the order in which they were stored: (time stored as text, JSON)."""
    found: list[tuple[bytes, bytes]] = []
    needles = wanted.needles()
    for number in reversed(store.segments()):
        path = store.path(number)
        try:
            for line in _backwards(path, store.durable(number)):
                if cancelled is not None and cancelled.is_set():
                    return []
                if line.startswith(segment.HEADER_START) or not all(needle in line for needle in needles):
                    continue
                try:
                    stored_at, json = segment.split(line)
                    matches = wanted.matches(json)
                except ValueError:
                    continue
                if matches:
                    found.append((stored_at, json))
                    if len(found) >= limit:
                        return found[::-1]
            # What older segments hold was made before this one was opened.
            if wanted.start and _opened(path) + CLOCK_SKEW < wanted.start:
                break
        except FileNotFoundError:
            continue
    return found[::-1]


def _opened(path: Path) -> int:
    with open(path, "rb") as file:
        try:
            return segment.opened(file.readline())
        except segment.UnreadableSegment:
            return 1 << 63


def _backwards(path: Path, length: int | None) -> Iterator[bytes]:
    """Whole lines, the last one first; what follows the last newline isn't one."""
    with open(path, "rb") as file:
        at = file.seek(0, 2) if length is None else length
        carried = b""
        unfinished = True
        while at > 0:
            size = min(BLOCK, at)
            at -= size
            file.seek(at)
            lines = (file.read(size) + carried).split(b"\n")
            if unfinished and len(lines) > 1:
                unfinished = False
                del lines[-1]
            carried = lines[0]
            yield from reversed(lines[1:])
        if not unfinished:
            yield carried
