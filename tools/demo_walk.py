"""`tools/demo`: one packet's way through a real mesh, shown step by step.

A mesh (`falkirk up` on a temporary directory), a real HTTP server in a namespace of its own as upstream, and curl run
behind `falkirk lower`, so that its TCP connections enter Falkirk as IP packets. Steps: a page; a 1 GiB download checked
by SHA-256; a destination that a rule denies; a closed port; then what Falkirk knows of them: flows, a trace, audit
records, an explanation; then two WireGuard devices (`demo_devices`). Exit code 0 where every step did what it should, else 1.

`--json` prints one object on standard output, and everything for people on standard error. `--keep` leaves mesh and server running and
prints how to use and how to stop them. Limits: needs root, and 3 GiB of
free memory or 1.2 GiB of disk under TMPDIR for the download.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from falkirk.cli.trace import Receiver, Span, render
from tools import demo_devices
from tools.demo_devices import Devices
from tools.load import http_server
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, guard_signals, stop, wait_for

SIZE = 1 << 30
HTTP = 80
CLOSED = 81
PROMPT_MS = 1000.0
"""A refusal that takes longer isn't one that looks like a closed port."""
SPANS = ("admit", "resolve", "decide", "dial", "relay")
"""What a flow's trace holds at least."""

STOP = """#!/bin/sh
# Ends the demo that was kept.
kill {pids}
tries=0
while kill -0 {up} 2>/dev/null && [ $tries -lt 450 ]; do sleep 0.1; tries=$((tries + 1)); done
rm -rf '{directory}'
"""


class Demo:
    """The steps, in order; `result` is what --json prints."""

    def __init__(self, lab: Lab, directory: Path, receiver: Receiver, quiet: bool, keep: bool) -> None:
        self.lab = lab
        self.directory = directory
        self.receiver = receiver
        self.keep = keep
        self.out = sys.stderr if quiet else sys.stdout
        self.mesh = Mesh(lab, directory)
        self.server = f"198.18.{lab.number}.2"
        self.denied = f"198.18.{lab.number}.3"
        self.result: dict[str, Any] = {}
        self.devices: Devices | None = None
        self.pids: list[int] = []

    def head(self, text: str) -> None:
        """A step's title."""
        print(f"\n\033[1m{text}\033[0m" if self.out.isatty() else f"\n== {text}", file=self.out, flush=True)

    def line(self, text: str) -> None:
        """A line below it."""
        print(f"   {text}", file=self.out, flush=True)

    def shown(self, *arguments: str, accept: Sequence[int] = (0,)) -> None:
        """A falkirk command and what it prints."""
        self.line(f"$ falkirk {shlex.join(arguments)}")
        for text in self.mesh.ask(*arguments, accept=accept).rstrip().splitlines():
            self.line(text)

    def curl(
        self, *arguments: str, timeout: float = 60, stdout: IO[bytes] | int = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        """Curl as the device."""
        command = self.mesh.lower("laptop", ["curl", "--silent", "--show-error", "--noproxy", "*", *arguments])
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{shlex.join(command)}: not done within {timeout:g} s") from None

    # The steps.

    def start(self) -> None:
        """Server and mesh."""
        self.head("A server in a namespace of its own")
        namespace = self.lab.namespace("server", dies_with_us=not self.keep)
        net = f"198.18.{self.lab.number}"
        self.lab.cable(None, namespace, [f"{net}.1/24"], [f"{self.server}/24", f"{self.denied}/24"])
        script = str(Path(http_server.__file__).resolve())
        log = self.directory / "server.log"
        with log.open("wb") as output:
            served = self.lab.start(
                namespace.command(sys.executable, script, "--port", str(HTTP)), log=output, dies_with_us=not self.keep
            )
        wait_for("the HTTP server", lambda: log.read_text().startswith("ready"), 15)
        self.line(f"http://{self.server}/  and  http://{self.denied}/")
        if not demo_devices.missing():
            self.devices = Devices(self.lab, self.directory, self.mesh, self.server, self.head, self.line)
        self.head("falkirk up: six services, nothing else")
        begin = time.monotonic()
        settings: dict[str, Any] = {"telemetry": {"otlp_endpoint": self.receiver.endpoint, "sample_ratio": 1.0}}
        if self.devices is not None:
            settings["onramp"] = self.devices.settings()
        up = self.mesh.start(settings, dies_with_us=not self.keep)
        self.pids = [up, served.pid, namespace.pid]
        self.line(f"all SERVING after {time.monotonic() - begin:.1f} s, process {up}, sockets in {self.mesh.run_dir}")
        self.mesh.apply(self.resources())
        self.line("applied: tenant acme, user alice, device laptop, two routes, a policy")

    def resources(self) -> Iterator[dict[str, Any]]:
        """Who exists, where packets go, and who may."""
        yield resource("Tenant", "acme", displayName="Acme")
        yield resource("User", "alice", "acme", groups=["staff"])
        yield resource("Device", "laptop", "acme", user="alice")
        yield resource("Route", "internet4", "acme", prefix="0.0.0.0/0", target={"internet": {}})
        yield resource("Route", "internet6", "acme", prefix="::/0", target={"internet": {}})
        rules = [
            rule("no-vault", f'net.dst == "{self.denied}"', "deny"),
            *(self.devices.rules() if self.devices is not None else ()),
            rule("staff-anywhere", '"staff" in identity.groups', "allow"),
        ]
        yield resource("Policy", "access", "acme", priority=10, rules=rules)
        if self.devices is not None:
            yield from self.devices.resources()

    def page(self) -> None:
        """A page through Falkirk."""
        self.head("A page")
        done = self.curl(f"http://{self.server}/")
        self.result["page_ok"] = done.returncode == 0 and done.stdout.startswith("Hello from the server")
        self.line((done.stdout or done.stderr).strip())

    def download(self) -> None:
        """A large file through Falkirk."""
        self.head(f"A download of {SIZE >> 30} GiB")
        written = "%{stderr}%{size_download} %{time_total} %{time_starttransfer}"
        url = f"http://{self.server}/bytes/{SIZE}"
        with _place(self.directory) as file:
            done = self.curl("--write-out", written, url, timeout=120, stdout=file)
            said = done.stderr.split()
            size, total, first = (float(part) for part in said[-3:]) if done.returncode == 0 else (0.0, 0.0, 0.0)
            file.seek(0)
            matches = hashlib.file_digest(file, "sha256").hexdigest() == http_server.digest(SIZE)
        rate = round(size * 8 / max(total - first, 1e-9) / 1e9, 2) if size else 0.0
        self.result["download"] = {"bytes": int(size), "sha256_ok": matches and size == SIZE, "gbit_s": rate}
        self.line(f"{int(size)} bytes at {rate} Gbit/s, SHA-256 {'right' if matches else 'WRONG'}")
        if done.returncode != 0:
            self.line(done.stderr.strip())

    def refusals(self) -> None:
        """A denied destination and a closed port look the same to the client."""
        self.head("A destination that a rule denies")
        refused, milliseconds, said = self._refusal(f"http://{self.denied}/")
        self.line(f"{said} ({milliseconds} ms)")
        self.result["denied"] = {"refused": refused and milliseconds < PROMPT_MS, "ms": milliseconds, "rule": ""}
        self.head("A port that nobody listens on")
        refused, milliseconds, said = self._refusal(f"http://{self.server}:{CLOSED}/")
        self.line(f"{said} ({milliseconds} ms)")
        self.result["closed_port"] = {"refused": refused}

    def _refusal(self, url: str) -> tuple[bool, float, str]:
        done = self.curl("--verbose", "--write-out", "%{time_total}", "--output", "/dev/null", url)
        lines = [text.lstrip("* ") for text in done.stderr.splitlines() if "refused" in text.lower()]
        milliseconds = round(float(done.stdout or 0) * 1000, 1)
        return done.returncode == 7 and bool(lines), milliseconds, lines[0] if lines else done.stderr.strip()[-300:]

    def flows(self) -> None:
        """What the flow table shows while a connection is open."""
        self.head("The flow table, while a connection is open")
        command = self.mesh.lower("laptop", ["curl", "--silent", "--noproxy", "*", f"http://{self.server}/drip/60"])
        process = self.lab.start(command)
        found: list[dict[str, Any]] = []

        def listed() -> bool:
            found[:] = self.mesh.ask_json("flows", "flow", "list")
            return bool(found)

        wait_for("a flow in the table", listed, 20)
        self.result["flows"] = len(found)
        self.shown("flow", "list")
        stop(process)

    def audit(self) -> None:
        """What was recorded, and which rule denied."""
        self.head("The audit log")
        records: list[dict[str, Any]] = []

        def complete() -> bool:
            records[:] = [_record(item) for item in self.mesh.ask_json("records", "audit", "query")]
            events = {item.get("event") for item in records}
            return {"started", "denied", "ended"} <= events

        wait_for("started, denied and ended records", complete, 20)
        self.result["audit_records"] = len(records)
        denied = [item for item in records if item.get("event") == "denied" and item.get("destination") == self.denied]
        self.result["denied"]["rule"] = denied[0].get("rule", "") if denied else ""
        self.shown("audit", "query")
        self._trace(records)

    def _trace(self, records: list[dict[str, Any]]) -> None:
        self.head("One flow's trace")
        started = [item for item in records if item.get("event") == "started" and item.get("destination_port") == HTTP]
        trace_id = str(started[0]["flow_id"]) if started else ""
        spans = self._spans(trace_id)
        self.result["trace_spans"] = len(spans)
        self.result["trace_services"] = sorted({span.service for span in spans})
        for text in render(spans).splitlines() if spans else []:
            self.line(text)

    def _spans(self, trace_id: str) -> list[Span]:
        """The trace once it has every step's span, or what there is of it after 15 s."""
        deadline = time.monotonic() + 15
        while True:
            spans = self.receiver.traces().get(trace_id, [])
            if {span.name for span in spans} >= set(SPANS) or time.monotonic() > deadline:
                return spans
            self.receiver.wait(1.0)

    def explain(self) -> None:
        """Every stage's answer for the denied destination."""
        self.head("Why was it denied?")
        whom = ("--tenant", "acme", "--device", "laptop")
        # Its exit code is 1 where the flow wouldn't go through.
        self.shown("explain", *whom, "--dst", self.denied, "--port", str(HTTP), accept=(1,))
        self.result["services"] = self.mesh.services()

    def two_devices(self) -> None:
        """WireGuard clients, where they are installed."""
        self.result["devices"] = None
        if self.devices is None:
            self.head("WireGuard devices")
            self.line(f"not shown: {demo_devices.missing()} isn't installed")
        else:
            self.result["devices"] = self.devices.show()

    def good(self) -> bool:
        """True where every step did what it should."""
        result = self.result
        return all(
            (
                result["page_ok"],
                result["download"]["sha256_ok"],
                result["denied"]["refused"],
                result["denied"]["rule"] != "",
                result["closed_port"]["refused"],
                result["flows"] > 0,
                result["audit_records"] > 0,
                result["trace_spans"] >= len(SPANS),
                self.devices is None or self.devices.good(),
                all(state == "SERVING" for state in result["services"].values()),
            )
        )

    def next_steps(self) -> None:
        """What to type now."""
        self.head("Try next" if self.keep else "Try next (with ./tools/demo --keep, which leaves it running)")
        falkirk = Path(sys.executable).parent / "falkirk"
        self.line(f"export FALKIRK_RUN_DIR={self.mesh.run_dir} PATH={falkirk.parent}:$PATH")
        for command in (
            f"falkirk lower --tenant acme --device laptop -- curl http://{self.server}/",
            "falkirk flow watch",
            "falkirk audit tail",
            f"falkirk explain --tenant acme --device laptop --dst {self.server} --port 443",
            "falkirk doctor",
            "grpcurl -plaintext -unix $FALKIRK_RUN_DIR/read/flow.sock list",
        ):
            self.line(command)
        if self.keep:
            script = self.directory / "stop"
            script.write_text(
                STOP.format(up=self.pids[0], pids=" ".join(map(str, self.pids)), directory=self.directory)
            )
            script.chmod(0o755)
            self.line(f"{script}    # ends it")


def _place(directory: Path) -> io.BufferedRandom:
    """Where the download goes: memory where there is plenty, since a disk would be what is measured; else a file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    if int(fields["MemAvailable"].split()[0]) * 1024 > 3 * SIZE:
        return os.fdopen(os.memfd_create("download"), "w+b")
    if shutil.disk_usage(directory).free < SIZE * 6 // 5:
        raise LabError(f"needs 3 GiB of free memory, or 1.2 GiB of free disk in {tempfile.gettempdir()} (see TMPDIR)")
    return tempfile.TemporaryFile(dir=directory)


def _record(item: dict[str, Any]) -> dict[str, Any]:
    """An audit record's own fields, whether or not it comes in its envelope (id beside the record as JSON text)."""
    envelope = item.get("record", item)
    if isinstance(envelope, dict) and isinstance(envelope.get("json"), str):
        inner: dict[str, Any] = json.loads(envelope["json"])
        return inner
    return envelope if isinstance(envelope, dict) else item


def walk(quiet: bool, keep: bool) -> int:
    """All steps; the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="falkirk-demo-"))
    directory.chmod(0o755)
    kept = False
    try:
        with Receiver() as receiver, Lab() as lab:
            demo = Demo(lab, directory, receiver, quiet, keep)
            for step in (
                demo.start,
                demo.page,
                demo.download,
                demo.refusals,
                demo.flows,
                demo.audit,
                demo.explain,
                demo.two_devices,
            ):
                step()
            good = demo.good()
            if keep and good:
                lab.keep()
                kept = True
            demo.next_steps()
            if quiet:
                print(json.dumps(demo.result))
            demo.line("")
            demo.line("everything did what it should" if good else f"NOT as it should be: {json.dumps(demo.result)}")
            return 0 if good else 1
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tools/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", action="store_true", help="leave the mesh and the server running")
    arguments = parser.parse_args()
    guard_signals()
    os.environ.setdefault("COLUMNS", "160")  # tables of falkirk commands, which don't see our terminal
    return walk(arguments.json, arguments.keep)


if __name__ == "__main__":
    sys.exit(main())
