"""Pages of a list, ordered by tenant, then name.

A page token is where the last page ended, so a page costs the same however far into the list it is, and a resource
that is there all the time is seen exactly once, whatever comes and goes between two pages.
"""

from __future__ import annotations

import base64
import binascii
import json
import sqlite3
from dataclasses import dataclass

from falkirk.registry.kinds import Kind
from falkirk.registry.refusal import Reason, Refused

DEFAULT_SIZE = 100
LARGEST_SIZE = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Bodies, the token of the next page ("" after the last), and the revision that was read."""

    bodies: list[bytes]
    next_token: str
    revision: int


def read(connection: sqlite3.Connection, kind: Kind, tenant: str, size: int, token: str) -> Page:
    """A page of one kind, of one tenant where `tenant` (its name) is given. Raises `Refused` for a bad size or token."""
    if size > LARGEST_SIZE:
        raise Refused(Reason.INVALID_FIELD, f"page_size: {size} is more than {LARGEST_SIZE}", field="page_size")
    limit = size or DEFAULT_SIZE
    after = _decode(token, kind, tenant) if token else (tenant, "")
    # A row comparison walks the index (kind, tenant, name) from where the last page ended.
    query = "SELECT tenant, name, body FROM resource WHERE kind = ? AND (tenant, name) > (?, ?)"
    values: list[object] = [kind.number, *after]
    if tenant:
        query, values = f"{query} AND tenant = ?", [*values, tenant]
    rows = connection.execute(f"{query} ORDER BY tenant, name LIMIT ?", [*values, limit + 1]).fetchall()
    (revision,) = connection.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()
    following = _encode(kind, tenant, rows[limit - 1][0], rows[limit - 1][1]) if len(rows) > limit else ""
    return Page([row[2] for row in rows[:limit]], following, int(revision))


def _encode(kind: Kind, filtered: str, tenant: str, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([kind.name, filtered, tenant, name]).encode()).decode()


def _decode(token: str, kind: Kind, filtered: str) -> tuple[str, str]:
    try:
        match json.loads(base64.urlsafe_b64decode(token)):
            case [kind.name, str(found), str(tenant), str(name)] if found == filtered:
                return tenant, name
    except (binascii.Error, ValueError):
        pass
    raise Refused(Reason.INVALID_FIELD, "page_token: isn't one of a previous page of this list", field="page_token")
