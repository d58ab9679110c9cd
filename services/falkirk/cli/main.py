"""`falkirk`: what people type.

Commands live in modules of their own, each with `register(app)`; a module is imported when one of its commands is asked for, so that
`falkirk --help` is quick. The six services are started by their name, `falkirk <service> [--config FILE] [--run-dir DIR] [--data-dir DIR]`.
Two services share their name with a group of commands: `falkirk flow` and `falkirk policy` start the service when nothing or an option of the
service follows, and answer questions when a command does (`falkirk flow list`).

Errors of a service are printed as `falkirk: REASON: message`. Exit status: 0 done, 1 refused or failed, 2 wrong usage; commands
say where they have more.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

SERVICES: Final = {
    "onramp": "Run the on-ramp: packets enter.",
    "flow": "Run the flow tracker; with a command: look at flows.",
    "policy": "Run the policy service; with a command: policies.",
    "upgrader": "Run the upgrader: packets become streams.",
    "router": "Run the router: where streams leave.",
    "registry": "Run the registry: who exists.",
}
COMMANDS: Final = {
    "up": ("falkirk.cli.up", "Run all six services on this machine."),
    "doctor": ("falkirk.cli.doctor", "Check this machine, and the mesh that runs on it."),
    "apply": ("falkirk.cli.resources", "Create and update resources from files."),
    "tenant": ("falkirk.cli.resources", "Tenants."),
    "user": ("falkirk.cli.resources", "Users."),
    "device": ("falkirk.cli.resources", "Devices; and this machine as one: enroll, up, status, down."),
    "vnet": ("falkirk.cli.resources", "Virtual networks."),
    "route": ("falkirk.cli.resources", "Routes."),
    "policy": ("falkirk.cli.resources", "Policies; without a command: run the policy service."),
    "node": ("falkirk.cli.resources", "Nodes, where devices reach the mesh."),
    "flow": ("falkirk.cli.flow", "Live flows; without a command: run the flow tracker."),
    "audit": ("falkirk.cli.audit", "The audit log."),
    "explain": ("falkirk.cli.explain", "What would become of a packet, stage by stage."),
    "capture": ("falkirk.cli.capture", "Write packets to a file for Wireshark, dropped ones with why."),
    "lower": ("falkirk.cli.lower", "Run a command whose TCP connections go through the mesh."),
    "connect": ("falkirk.cli.connect", "A TCP connection to a port of a device, for administrators."),
    "login": ("falkirk.cli.login", "Log in to a mesh on another machine."),
    "logout": ("falkirk.cli.login", "Forget a login on this machine."),
    "authority": ("falkirk.cli.login", "The mesh's certificates, and who may have one."),
    "trace": ("falkirk.cli.trace", "Look at traces."),
}
_SERVICE_OPTIONS: Final = ("--config", "--run-dir", "--data-dir")


class Commands(TyperGroup):
    """A group that knows its commands' names and imports them when asked."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every command, in the order in which help shows them."""
        return [*COMMANDS, *(name for name in SERVICES if name not in COMMANDS)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Imports the module that has the command; None where nobody has."""
        found = COMMANDS.get(cmd_name)
        if found is None:
            return None
        app = typer.Typer(add_completion=False)
        importlib.import_module(found[0]).register(app)
        return typer.main.get_group(app).commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Names and lines from the tables above: help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])
        with formatter.section("Services"):
            formatter.write_dl(list(SERVICES.items()))


app = typer.Typer(
    cls=Commands, rich_markup_mode=None, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def _version(asked: bool) -> None:
    if asked:
        from falkirk import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def falkirk(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    address: Annotated[
        str, typer.Option(help="host:port of a mesh's registry to which you have logged in. [$FALKIRK_ADDRESS]")
    ] = "",
) -> None:
    """Falkirk lifts IP packets to TCP streams, and lowers them back."""
    if address:
        os.environ["FALKIRK_ADDRESS"] = address


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if _is_service(arguments):
        _become(arguments)
    with _errors():
        app(prog_name="falkirk")


def _is_service(arguments: list[str]) -> bool:
    if not arguments or arguments[0] not in SERVICES:
        return False
    if arguments[0] not in COMMANDS:
        return True
    return len(arguments) == 1 or arguments[1].split("=")[0] in _SERVICE_OPTIONS


def _become(arguments: list[str]) -> None:
    """Turns into the service: same process id, nothing of the CLI left in memory."""
    os.execv(sys.executable, [sys.executable, "-m", f"falkirk.{arguments[0]}", *arguments[1:]])


@contextlib.contextmanager
def _errors() -> Any:
    """Errors of services as one line. gRPC is imported only where something was raised."""
    try:
        yield
    except Exception as error:
        text = _told(error)
        if text is None:
            raise
        print(f"falkirk: {text}", file=sys.stderr)
        sys.exit(1)


def _told(error: Exception) -> str | None:
    """One line for people; None for what is a fault of ours and deserves its traceback."""
    if "grpc" not in sys.modules:
        return None
    import grpc

    from falkirk.runtime.errors import FalkirkError, from_rpc

    if isinstance(error, FalkirkError):
        return str(error)
    if isinstance(error, grpc.RpcError):
        return str(from_rpc(error))
    return None


if __name__ == "__main__":
    main()
