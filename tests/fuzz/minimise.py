"""Takes inputs into a committed corpus that reach something which smaller ones don't.

    PYTHONPATH=services:. python tests/fuzz/minimise.py packets DIRECTORY...

Every input of the corpus and of the directories is run, smallest first; it stays if it takes a step from one line of ours to
another that none before it took. (libFuzzer's own -merge starts itself anew, which doesn't work from Python.)
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.coverage import ROOT, corpus

OURS = str(ROOT / "services" / "falkirk")
Step = tuple[str, int, int]


def steps(one: Callable[[bytes], None], data: bytes) -> set[Step]:
    """Which steps an input takes."""
    taken: set[Step] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(OURS):
            return None
        if event == "return":
            last.pop(frame, None)
        else:
            taken.add((name, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        one(data)
    finally:
        sys.settrace(None)
    return taken


def main(target: str, directories: list[str]) -> None:
    """Rewrite the target's corpus."""
    module = importlib.import_module(f"tests.fuzz.fuzz_{target}")
    kept = corpus(target)
    kept.mkdir(parents=True, exist_ok=True)
    inputs = {
        path.read_bytes() for folder in (kept, *map(Path, directories)) for path in folder.iterdir() if path.is_file()
    }
    module.one(b"")  # What happens once only isn't an input's merit.
    seen: set[Step] = set()
    chosen = []
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        taken = steps(module.one, data)
        if not taken <= seen:
            seen |= taken
            chosen.append(data)
    for path in kept.iterdir():
        path.unlink()
    for data in chosen:
        (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{target}: {len(chosen)} of {len(inputs)} inputs, {sum(map(len, chosen))} bytes, {len(seen)} steps")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
