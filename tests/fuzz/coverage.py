"""Runs a fuzz target under atheris, which follows the branches that an input takes (libFuzzer), from the committed corpus on.

    PYTHONPATH=services:. python tests/fuzz/fuzz_packets.py [options of libFuzzer]        e.g. -max_total_time=600

A target is a function `one(data)` that raises where something is wrong. New inputs go to a temporary directory, or to the first
directory that is named; `minimise.py` takes over what is worth keeping. A crash leaves `crash-…` in the current directory.

Limit: atheris has wheels for some Pythons only; where it is missing, the corpus is replayed by pytest and nothing is sought.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGETS = ("packets", "context", "wire")


def corpus(target: str) -> Path:
    """The committed inputs of a target."""
    return HERE / "corpus" / target


def environment(scratch: str) -> dict[str, str]:
    """For a child that imports this tree and leaves nothing behind."""
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'services'}{os.pathsep}{ROOT}", "TMPDIR": scratch}


def script(target: str, arguments: list[str]) -> int:
    """Run a target in a process of its own, so that it is imported by atheris; returns libFuzzer's exit code."""
    with tempfile.TemporaryDirectory(prefix="falkirk-fuzz-") as scratch:
        command = [sys.executable, "-m", "tests.fuzz.coverage", target, *arguments]
        if not any(not argument.startswith("-") for argument in arguments):
            command += [scratch, str(corpus(target))]
        return subprocess.run(command, env=environment(scratch), check=False).returncode


def main(target: str, arguments: list[str]) -> None:
    """In the process that fuzzes; doesn't return."""
    import atheris

    with atheris.instrument_imports(include=["falkirk"]):
        module = importlib.import_module(f"tests.fuzz.fuzz_{target}")
    atheris.Setup([target, *arguments], module.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
