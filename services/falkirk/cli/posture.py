"""Facts about this machine that rules may ask for (`device.posture`): what a device reports when it enrols, and again when they change.

They are the device's own word. What can't be read without privilege is left out rather than guessed.
"""

from __future__ import annotations

import platform
import socket
from pathlib import Path
from typing import Final

from falkirk import __version__

_RELEASE: Final = Path("etc/os-release")
_SERIAL: Final = Path("sys/class/dmi/id/product_serial")
_MOUNTS: Final = Path("proc/self/mounts")
_BLOCKS: Final = Path("sys/class/block")


def collect(root: Path = Path("/")) -> dict[str, str]:
    """The facts: os, os_version, kernel, arch, hostname, client, and where they can be known serial and disk_encryption."""
    release = _release(root / _RELEASE)
    facts = {
        "os": release.get("ID", platform.system().lower()),
        "os_version": release.get("VERSION_ID", ""),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "hostname": socket.gethostname(),
        "client": __version__,
        "serial": _text(root / _SERIAL),
        "disk_encryption": _encrypted(root),
    }
    return {name: value for name, value in facts.items() if value}


def _release(path: Path) -> dict[str, str]:
    """os-release(5)."""
    pairs = (line.partition("=") for line in _text(path).splitlines() if "=" in line)
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _encrypted(root: Path) -> str:
    """Whether / lies on a dm-crypt device, itself or below others: "yes", "no", or empty where that can't be told."""
    source = ""
    for line in _text(root / _MOUNTS).splitlines():
        fields = line.split(" ")
        if len(fields) > 1 and fields[1] == "/":
            source = fields[0]
    if not source.startswith("/dev/"):
        return ""
    blocks = root / _BLOCKS
    resolved = root / source.lstrip("/")
    name = resolved.resolve().name if resolved.exists() else Path(source).name
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        block = waiting.pop()
        if block in seen:
            continue
        seen.add(block)
        if _text(blocks / block / "dm" / "uuid").startswith("CRYPT-"):
            return "yes"
        below = blocks / block / "slaves"
        if below.is_dir():
            waiting += [each.name for each in below.iterdir()]
    return "no" if (blocks / name).exists() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
