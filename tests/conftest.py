"""Nothing of a test run outlives it: processes, namespaces, sockets.

Each session (each xdist worker) marks its environment; whatever it starts inherits the mark, so a process that outlives
its parents is still known as ours. Namespaces without a name live as long as their processes. What is named in
/run/netns, and unix sockets bound under the session's temporary directory, are looked at too.

Limits: a process started with an emptied environment isn't seen; a named namespace is taken for ours by its prefix, so
two runs on one machine at once may blame each other.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog

# Timing is never asserted: an example that a busy machine takes long for is no failure.
hypothesis.settings.register_profile("falkirk", deadline=None)
hypothesis.settings.load_profile("falkirk")

MARK = "FALKIRK_TEST_SESSION"
NAMESPACE_PREFIXES = ("falkirk", "fk")
GRACE_S = 10.0
"""How long stopping processes may take after the last test."""


def _processes() -> set[str]:
    """Every process, zombies apart, that inherited this session's mark, however many parents ended in between."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark in environment.split(b"\0"):
            found.add(f"{entry.name} ({command.strip()[:100]})")
    return found


def _namespaces() -> set[str]:
    folder = Path("/run/netns")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if name.startswith(NAMESPACE_PREFIXES)}


def _unix_sockets(under: Path) -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [line.split()[7] for line in lines if len(line.split()) > 7 and line.split()[7].startswith(f"{under}/")]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that sets up a service's logging in this process doesn't do so for the tests that follow."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session's last test where a process, namespace or socket of ours is left after GRACE_S."""
    # A shell's background jobs ignore SIGINT, and what is started from them does, too; tests interrupt what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    namespaces_before = _namespaces()
    yield
    deadline = time.monotonic() + GRACE_S
    clean = 0
    while True:
        left = {
            "processes": sorted(_processes()),
            "namespaces": sorted(_namespaces() - namespaces_before) if "PYTEST_XDIST_WORKER" not in os.environ else [],
            "sockets": _unix_sockets(tmp_path_factory.getbasetemp()),
        }
        # Twice, since a process in the middle of execve(2) shows no environment.
        clean = clean + 1 if not any(left.values()) else 0
        if clean == 2:
            return
        if not clean and time.monotonic() > deadline:
            pytest.fail(f"left behind by this session: {left}", pytrace=False)
        time.sleep(0.05)  # a poll with a deadline: /proc can't be waited for
