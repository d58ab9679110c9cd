"""Types `falkirk` commands at a mesh: short ones in this process, those that go on until interrupted in one of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from typer.testing import CliRunner, Result

from falkirk.cli.main import app
from tools.netlab import wait_for


class Output:
    """What a process has printed so far, line by line."""

    def __init__(self, stream: IO[str]) -> None:
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        self.lines.extend(iter(stream.readline, ""))

    def wait(self, *words: str, after: int = 0, seconds: float = 20) -> str:
        """The first line from place `after` on that holds all of the words."""

        def found() -> list[str]:
            return [line for line in self.lines[after:] if all(word in line for word in words)]

        wait_for(f"a line with {words}", lambda: bool(found()), seconds)
        return found()[0]

    def close(self) -> None:
        """Wait for the stream's end."""
        self._reader.join(10)


class Cli:
    """Commands against the mesh of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def run(self, *words: str, text: str | None = None) -> Result:
        """Run a command line."""
        environment = {"FALKIRK_RUN_DIR": str(self.run_dir), "COLUMNS": "40"}
        return CliRunner().invoke(app, words, env=environment, input=text, catch_exceptions=False)

    def ok(self, *words: str, text: str | None = None) -> str:
        """What a command that succeeds prints."""
        result = self.run(*words, text=text)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, *words: str, text: str | None = None, status: int = 1) -> str:
        """What a command that is refused says; it prints nothing else."""
        result = self.run(*words, text=text)
        assert (result.exit_code, result.stdout) == (status, ""), result.output
        return result.stderr

    def json(self, *words: str) -> Any:
        """What a command prints for programs."""
        return json.loads(self.ok(*words, "--json"))

    def records(self, *words: str) -> list[dict[str, Any]]:
        """What a command prints for programs, one object a line."""
        return [json.loads(line) for line in self.ok(*words, "--json").splitlines()]

    def table(self, *words: str) -> list[dict[str, str]]:
        """What a command prints for people, by column."""
        return parse(self.ok(*words))

    @contextmanager
    def stream(self, *words: str) -> Iterator[Output]:
        """A command that goes on until it is interrupted, and then ends with 0."""
        command = [sys.executable, "-m", "falkirk.cli.main", *words]
        if words[0] != "trace":
            command += ["--run-dir", str(self.run_dir)]
        # A shell in the background has children ignore SIGINT; a terminal hasn't.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_interruptible
        )
        assert process.stdout is not None
        output = Output(process.stdout)
        try:
            yield output
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0, output.lines
        finally:
            process.kill()
            process.wait()
            output.close()
            process.stdout.close()


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def parse(text: str) -> list[dict[str, str]]:
    """A table's rows by heading: cells begin below their heading."""
    head, *rows = text.splitlines()
    starts = [
        place for place in range(len(head)) if head[place] != " " and (place == 0 or head[place - 2 : place] == "  ")
    ]
    ends: Sequence[int | None] = [*starts[1:], None]
    names = [head[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return [
        {name: row[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)} for row in rows
    ]
