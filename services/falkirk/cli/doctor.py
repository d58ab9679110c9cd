"""`falkirk doctor`: what stands in the way, with its remedy; and, where a mesh runs, how it is.

The machine: TUN device, namespaces (tried, in a process of its own), descriptor limits, directories, ports that the settings name. The mesh: who may enter
its sockets, each service's health, and every process as its service's Stats tells it (name, pid, generation), with what /proc says of it (alive,
resident bytes). Services are asked by read/, so no privilege is needed beyond entering the run directory.

Exit status: 0 where nothing failed (warnings allowed), 1 otherwise. With --json one object: {"ok", "checks": [{name, state, detail, remedy}], "mesh": null or
{"run_dir", "services": {name: health}, "processes": [{service, name, pid, generation, alive, rss_bytes}]}}.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from falkirk.cli.checks import Check
from falkirk.runtime.settings import SERVICES, SettingsError, Shell

ANSWER_SECONDS: Final = 2.0
RETRY_SECONDS: Final = 0.1


class Process(msgspec.Struct, frozen=True):
    """One process of the mesh."""

    service: str
    name: str
    pid: int
    generation: int
    alive: bool
    rss_bytes: int


class Mesh(msgspec.Struct, frozen=True):
    """A mesh that runs."""

    run_dir: str
    services: dict[str, str]
    """Health, or why there is no answer."""
    processes: list[Process]


class Report(msgspec.Struct, frozen=True):
    """All of it."""

    ok: bool
    checks: list[Check]
    mesh: Mesh | None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("doctor")(doctor)


def doctor(
    config: Annotated[Path | None, typer.Option(help="Settings of the mesh. [$FALKIRK_CONFIG]")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Its sockets. [$FALKIRK_RUN_DIR]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="What survives a restart. [$FALKIRK_DATA_DIR]")] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="First wait until all services are well, so long at most.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check this machine, and the mesh that runs on it."""
    report = examine(config, run_dir, data_dir, wait)
    typer.echo(msgspec.json.encode(report).decode() if as_json else render(report), nl=as_json)
    raise typer.Exit(0 if report.ok else 1)


def examine(config: Path | None, run_dir: Path | None, data_dir: Path | None, wait: float = 0) -> Report:
    """Runs every check. `wait`: seconds that a mesh may take to be well; one that isn't there by then has failed."""
    from falkirk.cli import checks
    from falkirk.runtime import settings

    found: list[Check] = []
    try:
        shell = checks.load(config, run_dir, data_dir)
        found.append(Check("settings", "ok", str(settings.config_path(config) or "defaults")))
    except SettingsError as error:
        found.append(Check("settings", "failed", str(error), "correct the file"))
        shell = settings.shell_of({}, None, run_dir=run_dir, data_dir=data_dir)
    mesh = _await(shell, wait)
    found += checks.machine()
    if mesh is None:
        if wait:
            found.append(
                Check(
                    "mesh", "failed", f"none answers in {shell.run_dir} after {wait:g} s", "see the log of falkirk up"
                )
            )
        found += checks.directories(shell)
    else:
        found += checks.permissions(shell)
        found += _troubles(mesh)
    found += checks.ports(shell, running=mesh is not None)
    return Report(all(check.state != "failed" for check in found), found, mesh)


def look(shell: Shell) -> Mesh | None:
    """The mesh of a run directory; None where no service answers."""
    health = {service: _health(shell, service) for service in SERVICES}
    if all(state.startswith("not running") for state in health.values()):
        return None
    processes = [process for service in SERVICES for process in _processes(shell, service)]
    return Mesh(str(shell.run_dir), health, processes)


def _await(shell: Shell, seconds: float) -> Mesh | None:
    """The mesh once all of it is well, or as it is when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        mesh = look(shell)
        well = mesh is not None and set(mesh.services.values()) == {"SERVING"}
        if well or time.monotonic() >= deadline:
            return mesh
        time.sleep(RETRY_SECONDS)


def _troubles(mesh: Mesh) -> Iterator[Check]:
    for service, state in mesh.services.items():
        if state == "SERVING":
            yield Check(service, "ok", state)
        else:
            yield Check(service, "failed", state, f'see the log of falkirk up for "service":"{service}"')
    for process in mesh.processes:
        if not process.alive:
            yield Check(
                process.name, "failed", f"pid {process.pid} is gone", "it should be back within 3 s; look again"
            )


def _health(shell: Shell, service: str) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from falkirk.runtime.client import OPTIONS, obstacle

    path = shell.socket("read", service)
    error = obstacle(path)
    if error is not None:
        return f"not running ({error})"
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
        except grpc.RpcError as failed:
            return f"no answer ({_code(failed)})"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _processes(shell: Shell, service: str) -> Iterator[Process]:
    """As Stats tells; the service's own process by its lock where Stats leaves it out or doesn't answer."""
    told: list[Any] = []
    with contextlib.suppress(_failures()):
        told = list(_stats(shell, service).processes)
    if all(process.name != service for process in told):
        with contextlib.suppress(OSError, ValueError):
            pid = int((shell.run_dir / f".{service}.lock").read_text())
            yield _process(service, service, pid, 0)
    for process in told:
        yield _process(service, process.name, process.pid, process.generation)


def _stats(shell: Shell, service: str) -> Any:
    """The service's Stats, called by name: its request and stub follow from the service's."""
    import grpc

    from falkirk.runtime.client import OPTIONS

    package = f"falkirk.api.{service}.v1.{service}_service"
    messages, stubs = importlib.import_module(f"{package}_pb2"), importlib.import_module(f"{package}_pb2_grpc")
    with grpc.insecure_channel(f"unix:{shell.socket('read', service)}", options=OPTIONS) as channel:
        stub = getattr(stubs, f"{service.capitalize()}ServiceStub")(channel)
        return stub.Stats(messages.StatsRequest(), timeout=ANSWER_SECONDS)


def _failures() -> type[Exception]:
    import grpc

    return grpc.RpcError


def _code(error: Any) -> str:
    return str(error.code().name)


def _process(service: str, name: str, pid: int, generation: int) -> Process:
    """What /proc says; a zombie isn't alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        alive, pages = fields[0] not in "ZX", int(fields[21])
    except (OSError, IndexError):
        alive, pages = False, 0
    return Process(service, name, pid, generation, alive, pages * os.sysconf("SC_PAGE_SIZE"))


def render(report: Report) -> str:
    """For people."""
    marks = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}
    lines = []
    for check in report.checks:
        lines.append(f"{marks[check.state]}  {check.name:<14} {check.detail}")
        if check.remedy and check.state != "ok":
            lines.append(f"{'':9}{'':<14} remedy: {check.remedy}")
    if report.mesh is None:
        lines.append("\nno mesh runs here; start one with `falkirk up`")
    else:
        lines.append(f"\n{'process':<24}{'pid':>8}{'starts':>8}{'MiB':>8}")
        for process in report.mesh.processes:
            starts = str(process.generation or "")
            size = f"{process.rss_bytes / 2**20:.1f}" if process.alive else "gone"
            lines.append(f"{process.name:<24}{process.pid:>8}{starts:>8}{size:>8}")
    return "\n".join(lines) + "\n"
