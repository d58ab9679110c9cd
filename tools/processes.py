"""Processes of a mesh, by /proc: cheap enough to be looked at while something is measured.

Limit: what ends meanwhile is left out.
"""

from __future__ import annotations

import contextlib
from pathlib import Path


def children(pid: int) -> list[int]:
    """Of a process, in the order in which they were started."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    own = children(pid)
    return [*own, *(below for child in own for below in descendants(child))]


def module(pid: int) -> str:
    """What a process runs. Raises OSError where it is gone."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return next((part.decode() for part in command if part.startswith(b"falkirk.")), "?")
