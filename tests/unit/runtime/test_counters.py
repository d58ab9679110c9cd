"""Counters in shared memory, and the waits between restarts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from falkirk.runtime.backoff import Backoff
from falkirk.runtime.counters import Counters


def test_one_counts_and_the_other_reads() -> None:
    counters = Counters.create(("received", "drop.too_short"))
    other = Counters.attach(os.dup(counters.fd), counters.names)
    other.view[other.index["drop.too_short"]] += 3
    other.add("received")
    assert counters.values() == {"received": 1, "drop.too_short": 3}
    other.close()
    assert counters.read("drop.too_short") == 3
    counters.close()


def test_other_names_are_noticed() -> None:
    counters = Counters.create(("a", "b"))
    with pytest.raises(ValueError, match="bytes"):
        Counters.attach(counters.fd, ("a",))
    with pytest.raises(ValueError, match="twice"):
        Counters.create(("a", "a"))
    counters.close()


def test_a_worker_imports_nothing_heavy() -> None:
    heavy = {"grpc", "google.protobuf", "prometheus_client", "opentelemetry", "structlog", "asyncio", "yaml"}
    program = (
        "import sys, falkirk.runtime.counters, falkirk.runtime.log, falkirk.runtime.sampling, falkirk.runtime.blob;"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"


def test_waits() -> None:
    backoff = Backoff()
    assert [backoff.ended(0.1) for _ in range(9)] == [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert [backoff.ended(5.0), backoff.ended(0.1)] == [0, 0.05]
