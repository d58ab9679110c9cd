"""`falkirk up`: the six services on one machine.

Before anything is started it checks settings (every section), TUN device and namespaces, then directories, and that no other mesh uses the run
directory; what fails is printed with its remedy, and the exit status is 2. Then the services run as children (`falkirk.cli.supervisor`); once all say SERVING it
prints where things are and what to try, and at the first start with `listen_tcp.registry` a token by which the first administrator logs in from afar. Logs of all go to standard error, what is for people to standard output.

Exit status: 0 after SIGTERM or SIGINT and a clean drain; 1 where a service had to be killed; 2 where it couldn't start. A second signal
kills at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shlex
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from falkirk.runtime.settings import SERVICES, SettingsError, Shell

if TYPE_CHECKING:
    from falkirk.cli.checks import Check

PATIENCE_SECONDS: Final = 15.0
"""After this long without all SERVING, the missing ones are named."""
RETRY_SECONDS: Final = 0.1
FIRST: Final = "administrator"
"""The first administrator's name."""
FIRST_SECONDS: Final = 86_400


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("up")(up)


def up(
    config: Annotated[Path | None, typer.Option(help="Settings of the whole mesh. [$FALKIRK_CONFIG]")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Sockets. [$FALKIRK_RUN_DIR]")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="What survives a restart. [$FALKIRK_DATA_DIR]")] = None,
) -> None:
    """Run all six services on this machine until interrupted."""
    from falkirk.cli import checks
    from falkirk.runtime import roads

    try:
        shell = checks.load(config, run_dir, data_dir)
        arguments = ["--run-dir", str(shell.run_dir), "--data-dir", str(shell.data_dir)]
        if config is not None:
            arguments += ["--config", str(config.absolute())]
        # The machine first: where nothing can run nothing is made.
        _judge(checks.machine())
        roads.prepare(shell)
        with roads.sole(shell.run_dir, "up"):
            _judge((checks.data_directory(shell), *checks.ports(shell, running=False)))
            status = asyncio.run(_run(shell, arguments))
    except SettingsError as error:
        _refuse(str(error))
    except roads.AlreadyRunning as error:
        _refuse(f"{error}; end it first, or choose another --run-dir")
    raise typer.Exit(status)


def _judge(found: Iterable[Check]) -> None:
    """Prints what isn't well; ends the process where nothing could run."""
    problems = [check for check in found if check.state != "ok"]
    for check in problems:
        typer.echo(f"falkirk up: {check.state}: {check.detail}\n    remedy: {check.remedy}", err=True)
    if any(check.state == "failed" for check in problems):
        raise typer.Exit(2)


def _refuse(message: str) -> Any:
    typer.echo(f"falkirk up: {message}", err=True)
    raise typer.Exit(2)


async def _run(shell: Shell, arguments: list[str]) -> int:
    from falkirk.cli.nursery import Stillborn
    from falkirk.cli.supervisor import Refused, Supervisor
    from falkirk.runtime.log import Log

    # Services raise their soft limit as they need; children inherit what we may have.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log = Log("up", shell.log.level, shell.log.format)
    supervisor = Supervisor(SERVICES, arguments, log)
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if supervisor.stop.is_set():
            supervisor.hurry()
        supervisor.stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    announcer = asyncio.create_task(_announce(shell, supervisor.stop))
    try:
        await supervisor.run()
    except Refused as refused:
        typer.echo(f"falkirk up: {refused}", err=True)
        return 2
    except Stillborn as failed:
        typer.echo(f"falkirk up: {failed}", err=True)
        return 1
    finally:
        announcer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcer
    typer.echo("falkirk is down")
    return 1 if supervisor.killed else 0


async def _announce(shell: Shell, stop: asyncio.Event) -> None:
    """Waits until all are SERVING, then says so once."""
    started = time.monotonic()
    missing = set(SERVICES)
    warned = False
    async with contextlib.AsyncExitStack() as stack:
        stubs = {service: await _health(stack, shell, service) for service in SERVICES}
        while missing:
            await asyncio.sleep(RETRY_SECONDS)
            for service in list(missing):
                if await _serving(stubs[service]):
                    missing.discard(service)
            if not warned and missing and time.monotonic() - started > PATIENCE_SECONDS:
                warned = True
                typer.echo(f"still waiting for {', '.join(sorted(missing))}; their log is on standard error", err=True)
    if not stop.is_set():
        typer.echo(_greeting(shell, time.monotonic() - started))
        if "registry" in shell.listen_tcp:
            typer.echo(await _first(shell))


async def _health(stack: contextlib.AsyncExitStack, shell: Shell, service: str) -> Any:
    from grpc_health.v1 import health_pb2_grpc

    from falkirk.runtime.client import channel

    return health_pb2_grpc.HealthStub(await stack.enter_async_context(channel(shell, service, "read")))


async def _serving(stub: Any) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2

    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _first(shell: Shell) -> str:
    """How the first administrator logs in: told once, at the first start with a TCP port."""
    import grpc

    from falkirk.api.net.v1 import access_pb2
    from falkirk.api.registry.v1 import authority_service_pb2 as pb
    from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
    from falkirk.runtime.client import channel
    from falkirk.runtime.errors import from_rpc

    address = shell.listen_tcp["registry"]
    request = pb.AuthorityServiceCreateLoginRequest(
        name=FIRST, role=access_pb2.ROLE_ADMINISTRATOR, first=True, valid_seconds=FIRST_SECONDS
    )
    async with channel(shell, "registry", "admin") as made:
        try:
            answer = await pb_grpc.AuthorityServiceStub(made).CreateLogin(request, timeout=10)
        except grpc.RpcError as error:
            failed = from_rpc(error)
            if failed.reason == "NOT_FIRST":
                return f"  remote          {address}; `falkirk authority token NAME` makes a login token"
            return f"  remote          {address}; no login token for it: {failed.message}"
    return f"""  remote          {address}; log in there within a day as the first administrator. This is shown once:

  falkirk login --address {address}
    {answer.token}"""


def _greeting(shell: Shell, seconds: float) -> str:
    run_dir = shlex.quote(str(shell.run_dir))
    return f"""falkirk is up: {", ".join(SERVICES)} are SERVING after {seconds:.1f} s
  run directory   {shell.run_dir}
  data directory  {shell.data_dir}

try next, in another terminal:
  export FALKIRK_RUN_DIR={run_dir}
  falkirk doctor
  falkirk tenant create acme && falkirk device create laptop --tenant acme
  falkirk apply -f resources.yaml
  falkirk explain --tenant acme --device laptop --dst 192.0.2.1 --port 80
  falkirk lower --tenant acme --device laptop -- curl http://192.0.2.1/
  falkirk flow watch"""
