"""A short run of the bench, whole: what it prints as JSON has its fields, and every packet that it counts reached the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.netns, pytest.mark.slow]


def bench(*arguments: str) -> dict[str, object]:
    """Its object; progress stays on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_main", *arguments, "--json", "--rounds", "1", "--seconds", "0.3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'services'}:{ROOT}", "GRPC_ENABLE_FORK_SUPPORT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_pps() -> None:
    result = bench("pps")
    assert isinstance(result["kpps_per_worker"], float)
    assert set(result) == {
        "kpps_per_worker",
        "headline",
        "udp_bursts",
        "udp_mixed",
        "ack",
        "baseline",
        "configuration",
    }
    for kind in ("udp_bursts", "udp_mixed", "ack"):
        of = result[kind]
        assert isinstance(of, dict)
        assert set(of) == {"kpps_per_worker", "kpps_per_cpu_second", "kernel", "unpacked", "of_unpacked"}
        assert of["kpps_per_worker"] > 0
    baseline = result["baseline"]
    assert isinstance(baseline, dict)
    assert {"mtu", "offloads", "congestion_control", "kernel", "cpus", "cpu_model", "python"} <= set(baseline)
