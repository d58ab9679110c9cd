"""Numbers of tunnels over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.onramp.tunnel_ids import STEP, TunnelIds


@pytest.mark.parametrize("workers", [1, 3])
def test_no_number_is_used_twice(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "data" / "ids"
    used = 0
    for _ in range(5):
        ids = TunnelIds(path, workers)
        for _ in range(2):
            first = ids.first()
            assert first > used
            # A worker that reports what it gives out, and dies with a few that it hasn't reported.
            for number in range(first, first + 3 * STEP):
                ids.seen(number)
            ids.save()
            # Each worker may give out so many that nobody hears of.
            used = first + 3 * STEP + 1000 * workers


def test_a_broken_file_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    for content in ("", "x", "-5"):
        path.write_text(content)
        assert TunnelIds(path).first() == 1


def test_numbers_start_over_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    path.write_text(str(2**32 - 5))
    assert TunnelIds(path).first() == 1
