"""The README's first ten minutes, as they stand, with a server at the documentation's address."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.process.cli_shell import Output
from tools.load import http_server
from tools.netlab import Lab, Namespace, wait_for

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> list[str]:
    """The shell blocks of the section."""
    section = (ROOT / "README.md").read_text().split("## The first ten minutes")[1].split("\n## ")[0]
    found = re.findall(r"^   ```sh\n(.*?)^   ```$", section, re.MULTILINE | re.DOTALL)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in found]


@contextmanager
def lab(directory: Path) -> Iterator[Namespace]:
    """A home whose neighbour serves HTTP at 192.0.2.10."""
    with Lab() as laboratory:
        home, server = laboratory.namespace("home"), laboratory.namespace("server")
        laboratory.cable(home, server, ["192.0.2.1/24"], ["192.0.2.10/24"])
        log = directory / "server.log"
        with log.open("wb") as output:
            server.start(sys.executable, str(Path(http_server.__file__).resolve()), log=output)
        wait_for("the HTTP server", lambda: log.read_text().startswith("ready"), 15)
        yield home


def test_the_first_ten_minutes(tmp_path: Path) -> None:
    up, doctor, apply, lower, ask = blocks()
    with tempfile.TemporaryDirectory(prefix="fk-") as place, lab(Path(place)) as home:
        # The user's .venv is the one that runs this test; the mesh goes where nobody else's is.
        shim = Path(place, "falkirk")
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m falkirk.cli.main "$@"\n')
        shim.chmod(0o755)
        setting, falkirk_up = up.replace("/tmp/fk", place).rsplit("falkirk up", 1)[0], "exec falkirk up"
        setting = setting.replace(". .venv/bin/activate", f"export PATH={place}:$PATH")
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)

        def command(script: str) -> list[str]:
            return home.command("bash", "-euc", setting + script)

        def shell(script: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command(script), capture_output=True, text=True, timeout=60, check=False, env=environment
            )

        process = subprocess.Popen(
            command(falkirk_up), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None
        output = Output(process.stdout)
        try:
            output.wait("SERVING", seconds=60)
            done = shell(doctor)
            assert (done.returncode, done.stdout.count("SERVING")) == (0, 6), done.stdout
            done = shell(apply)
            assert (done.returncode, done.stdout.count(" created")) == (0, 5), done.stderr
            page, denied = [line for line in lower.splitlines() if line.startswith("falkirk")]
            done = shell(page)
            assert (done.returncode, "I see you as 192.0.2.1" in done.stdout) == (0, True), done.stderr
            done = shell(denied)
            assert (done.returncode, "Connection refused" in done.stderr) == (7, True), done.stderr
            listing, query, explain = [line.split("#")[0] for line in ask.splitlines() if line.startswith("falkirk")]
            assert shell(listing).stdout.startswith("ID ")
            wait_for("the records", lambda: "ended" in shell(query).stdout, 20)
            records = shell(query).stdout
            assert "access/staff" in records
            assert "access/no-mail" in records
            done = shell(explain)
            assert (done.returncode, "outcome: answer_rst" in done.stdout) == (1, True), done.stderr
        finally:
            process.terminate()
            assert process.wait(45) == 0
            output.close()
            process.stdout.close()
