"""Peers of the bench that come as Go source: built once by `go install` from the module proxy, at pinned versions, into .cache/peers.

Nothing else of them is kept. Where there is no `go`, or it can't be had or built, the bench says why and goes on without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "peers"
BUILD_S = 900.0
"""sing-box takes five minutes of processor time."""


@dataclass(frozen=True)
class GoPeer:
    """A program of a Go module."""

    name: str
    package: str
    version: str
    tags: str = ""


SING_BOX = GoPeer("sing-box", "github.com/sagernet/sing-box/cmd/sing-box", "v1.14.1", "with_gvisor")
TUN2SOCKS = GoPeer("tun2socks", "github.com/xjasonlyu/tun2socks/v2", "v2.6.0")


def program(peer: GoPeer, say: Callable[[str], None]) -> Path | None:
    """Where it is, built if need be; None, and the reason said, where it can't be."""
    directory = CACHE / f"{peer.name}-{peer.version}"
    path = directory / peer.name
    if path.exists():
        return path
    if shutil.which("go") is None:
        say(f"going on without {peer.name}: there is no go to build it with")
        return None
    say(f"building {peer.name} {peer.version} with go install; once, up to some minutes")
    directory.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"GOBIN": str(directory), "CGO_ENABLED": "0"}
    command = ["go", "install", "-trimpath", *(["-tags", peer.tags] if peer.tags else [])]
    try:
        done = subprocess.run(
            [*command, f"{peer.package}@{peer.version}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        say(f"going on without {peer.name}: not built within {BUILD_S:g} s")
        return None
    if done.returncode or not path.exists():
        why = [line for line in done.stderr.strip().splitlines() if not line.startswith("go: downloading")]
        say(f"going on without {peer.name}: {' '.join(why)[-160:] or 'go install made nothing'}")
        return None
    return path
