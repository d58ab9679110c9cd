"""A laboratory's addresses are its own, whoever else runs on the machine."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tools.netlab import LabError, Network

ROOT = Path(__file__).resolve().parents[3]


def test_two_have_two_numbers_and_a_closed_one_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Network()) as first, closing(Network()) as second:
        assert first.number != second.number
        monkeypatch.setattr("tools.netlab.os.getpid", lambda: first.number)
        with closing(Network()) as third:
            assert third.number not in (first.number, second.number)
        first.close()
        with closing(Network()) as again:
            assert again.number == first.number


def test_another_process_has_another_number() -> None:
    with closing(Network()) as held:
        script = (
            f"import os; os.getpid = lambda: {held.number}; from tools.netlab import Network; print(Network().number)"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert int(done.stdout) != held.number


def test_it_says_when_none_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "COUNT", 0)
    with pytest.raises(LabError, match="in use"):
        Network()
