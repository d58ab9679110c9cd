"""Nothing of a test run outlives it: processes, namespaces, sockets.

The pytest process (or each xdist worker) becomes a child subreaper, so that whatever the tests started stays its
descendant even when the parent in between was killed; at the end of the session there must be no descendant left. What
is named in /run/netns, and unix sockets bound under the session's temporary directory, are looked at too.

Limit: a named namespace is taken for ours by its prefix, so two runs on one machine at once may blame each other.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PR_SET_CHILD_SUBREAPER = 36
NAMESPACE_PREFIXES = ("falkirk", "fk")
GRACE_S = 10.0
"""How long stopping processes may take after the last test."""


def _parents() -> dict[int, tuple[int, str, str]]:
    """Process id -> (parent, state, command) of everything that /proc shows."""
    table = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        command, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        table[int(entry.name)] = (int(rest[1]), rest[0], command)
    return table


def _reap() -> None:
    """Collect orphans that ended: as their subreaper that is our job, and nobody else waits for them."""
    table = _parents()
    for pid, (parent, state, _) in table.items():
        if parent == os.getpid() and state == "Z":
            os.waitpid(pid, os.WNOHANG)


def _descendants() -> list[str]:
    table = _parents()
    found = []
    for pid, (_, state, command) in table.items():
        ancestor = pid
        while ancestor in table and ancestor != os.getpid():
            ancestor = table[ancestor][0]
        if ancestor == os.getpid() and pid != os.getpid() and state != "Z":
            found.append(f"{pid} ({command})")
    return found


def _namespaces() -> set[str]:
    folder = Path("/run/netns")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if name.startswith(NAMESPACE_PREFIXES)}


def _unix_sockets(under: Path) -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [line.split()[7] for line in lines if len(line.split()) > 7 and line.split()[7].startswith(f"{under}/")]


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session's last test where a process, namespace or socket of ours is left after GRACE_S."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    processes_before = set(_descendants())
    namespaces_before = _namespaces()
    yield
    deadline = time.monotonic() + GRACE_S
    while True:
        _reap()
        left = {
            "processes": sorted(set(_descendants()) - processes_before),
            "namespaces": sorted(_namespaces() - namespaces_before) if "PYTEST_XDIST_WORKER" not in os.environ else [],
            "sockets": _unix_sockets(tmp_path_factory.getbasetemp()),
        }
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind by this session: {left}", pytrace=False)
        time.sleep(0.05)  # a poll with a deadline: /proc can't be waited for
