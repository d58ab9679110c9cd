"""A mesh with one device whose connection stays open: what tests of a running mesh start from.

Limit: one server on 198.18.N.2 in a namespace of its own; needs root.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.load import http_server
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, wait_for


@dataclass(frozen=True)
class RunningMesh:
    """The mesh, its laboratory, the server's address, the process id of `falkirk up`, and our end of the server's cable."""

    mesh: Mesh
    lab: Lab
    server: str
    pid: int
    cable: str

    def curl(self, url: str) -> subprocess.CompletedProcess[bytes]:
        """Curl as the device `laptop`, at most 30 s."""
        command = self.mesh.lower("laptop", ["curl", "--silent", "--show-error", "--noproxy", "*", url])
        return subprocess.run(command, capture_output=True, timeout=30, check=False)

    def hold(self, count: int) -> None:
        """So many connections that stay open for a minute, each by a tunnel of its own, once the flow table shows them."""
        command = ["curl", "--silent", "--no-buffer", "--noproxy", "*", f"http://{self.server}/drip/60"]
        for _ in range(count):
            self.lab.start(self.mesh.lower("laptop", command))
        wait_for("flows in the table", lambda: len(self.mesh.ask_json("flows", "flow", "list")) >= count, 20)

    def serve(self, port: int) -> None:
        """A web server on the device, by a tunnel of its own, once it listens there."""
        log = self.mesh.run_dir.parent / "laptop.log"
        command = [sys.executable, "-u", "-m", "http.server", str(port)]
        with log.open("wb") as output:
            self.lab.start(self.mesh.lower("laptop", command), log=output)
        wait_for("the device's web server", lambda: "Serving HTTP" in log.read_text(), 20)


def descendants(pid: int) -> dict[int, str]:
    """Processes below `pid`, by id, with their command lines."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
    below, edge = set[int](), {pid}
    while edge:
        edge = {child for child, parent in parents.items() if parent in edge}
        below |= edge
    return {child: found[child] for child in below}


def resources() -> list[dict[str, Any]]:
    """Tenant acme as the README makes it."""
    rules = [rule("no-mail", "net.port == 25", "deny"), rule("staff", '"staff" in identity.groups', "allow")]
    return [
        resource("Tenant", "acme"),
        resource("User", "alice", "acme", groups=["staff"]),
        resource("Device", "laptop", "acme", user="alice"),
        resource("Route", "internet", "acme", prefix="0.0.0.0/0", target={"internet": {}}),
        resource("Policy", "access", "acme", priority=10, rules=rules),
    ]


@contextmanager
def running_mesh(directory: Path, settings: Mapping[str, Any] | None = None) -> Iterator[RunningMesh]:
    """Server, mesh and resources; all gone afterwards."""
    with Lab() as lab:
        namespace = lab.namespace("server")
        net = f"198.18.{lab.number}"
        cable, _ = lab.cable(None, namespace, [f"{net}.1/24"], [f"{net}.2/24"])
        log = directory / "server.log"
        with log.open("wb") as output:
            namespace.start(sys.executable, str(Path(http_server.__file__).resolve()), log=output)
        wait_for("the HTTP server", lambda: log.read_text().startswith("ready"), 15)
        mesh = Mesh(lab, directory)
        pid = mesh.start(settings or {})
        mesh.apply(resources())
        yield RunningMesh(mesh, lab, f"{net}.2", pid, cable)
