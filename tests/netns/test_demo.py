"""`./tools/demo`, with nothing in PATH but what it says that it needs: what it shows, it shows on a new machine.

Limit: Debian's package data base says which commands a package has; elsewhere there is nothing to ask, and the machine's own PATH is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.netns, pytest.mark.timeout(170)]


def packages() -> list[str]:
    """Those that the script names, as far as they are installed, and those that no Debian is without."""
    named = re.findall(
        r"[\w-]+=([\w-]+)", "\n".join(re.findall(r"^falkirk_(?:commands|wish) .*$", demo(), re.MULTILINE))
    )
    assert "iproute2" in named
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Essential} ${Priority}\\n"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    installed = {line.split()[1]: line.split()[2:] for line in lines if line.startswith("installed ")}
    always = [package for package, kind in installed.items() if {"yes", "required"} & set(kind)]
    return [*(package for package in named if package in installed), *always]


def demo() -> str:
    return (ROOT / "tools" / "demo").read_text()


def commands() -> Iterator[Path]:
    """The programs of those packages."""
    found = subprocess.run(["dpkg", "-L", *packages()], capture_output=True, text=True, timeout=30, check=True).stdout
    for line in found.splitlines():
        if re.fullmatch(r"(/usr)?/s?bin/[^/]+", line):
            yield Path(line)
    # Which of them is called `nc` or `awk` is an alternative's to say; the interpreter is that of .venv.
    yield Path(sys.executable)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH of just these."""
    if shutil.which("dpkg-query") is None:
        return os.environ["PATH"]
    place = tmp_path / "bin"
    place.mkdir()
    for program in commands():
        link = place / program.name
        if program.exists() and not link.exists():
            link.symlink_to(program)
    (place / "python").unlink(missing_ok=True)
    (place / "python").symlink_to(sys.executable)
    return str(place)


def test_it_shows_all_of_it_with_what_it_installs(path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo_walk", "--json"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)),
            "GRPC_ENABLE_FORK_SUPPORT": "0",
        },
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["download"]["sha256_ok"] is True
    assert shown["denied"]["rule"] == "access/no-vault"
    assert set(shown["services"].values()) == {"SERVING"}
    devices = shown["devices"]
    assert devices, done.stderr
    assert all(devices[step] is True for step in ("wireguard_go_ping", "by_name_http", "ssh", "denied"))
    assert devices["revoked_ms"] is not None
