"""Processor time of a mesh's processes, by what they are: /proc/PID/stat before and after.

A rate depends on what else the machine does; processor time for a piece of work hardly does. Limits: ticks of ten milliseconds, so measure
for a second at least; a process that began and ended in between isn't counted.
"""

from __future__ import annotations

import os
from pathlib import Path

from tools.processes import descendants

TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


def name(pid: int) -> str:
    """What a process runs: "flow.worker", "flow", "up"; empty where it isn't Falkirk's, or is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    for at, word in enumerate(words[:-1]):
        if word == "-m" and words[at + 1].startswith("falkirk."):
            module = words[at + 1].removeprefix("falkirk.")
            return "cli." + words[at + 2] if module == "cli.main" and at + 2 < len(words) else module
    return ""


def used_us(pid: int) -> tuple[int, int] | None:
    """Microseconds of processor time, in all and the kernel's part of it; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) * TICK_US, int(fields[12]) * TICK_US


class Meter:
    """What each kind of process used since it was made."""

    def __init__(self, root: int) -> None:
        self._before = {
            pid: (kind, used)
            for pid in (root, *descendants(root))
            if (kind := name(pid)) and (used := used_us(pid)) is not None
        }

    def used_us(self) -> dict[str, tuple[int, int]]:
        """Microseconds by kind: in all, and the kernel's part."""
        found: dict[str, tuple[int, int]] = {}
        for pid, (kind, before) in self._before.items():
            now = used_us(pid)
            if now is not None:
                every, kernel = found.get(kind, (0, 0))
                found[kind] = every + now[0] - before[0], kernel + now[1] - before[1]
        return found

    def apiece(self, count: int) -> dict[str, float]:
        """The same for one of `count` pieces of work: `cpu:KIND` in all, `kernel:KIND` the kernel's part."""
        used = self.used_us()
        pieces = max(1, count)
        return {f"cpu:{kind}": every / pieces for kind, (every, _) in used.items()} | {
            f"kernel:{kind}": kernel / pieces for kind, (_, kernel) in used.items()
        }


def memory(root: int, kind: str) -> int:
    """Bytes of anonymous memory that processes of a kind have resident."""
    total = 0
    for pid in (root, *descendants(root)):
        if name(pid) == kind:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total
