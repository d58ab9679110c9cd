"""How commands reach a service, and how they say what went wrong.

A command opens the most privileged road that its user can: admin/, else mesh/, else read/ below the run directory; with `FALKIRK_ADDRESS`
or `falkirk --address` it goes over TCP with the user's login instead. What a service refuses is printed to stderr as `error: <message> (REASON)`, followed by a remedy where there is one, and ends
the command with status 1. Status 2 is kept for wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final, NoReturn

import grpc
import typer

from falkirk.runtime.client import sync_channel
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.runtime.settings import default_run_dir

ADDRESS: Final = "FALKIRK_ADDRESS"
"""Environment variable: host:port of the registry of a mesh on another machine."""
FAILED = 1
"""Exit status of a command that was refused or didn't find its service."""

RunDir = Annotated[
    Path,
    typer.Option(
        "--run-dir",
        envvar="FALKIRK_RUN_DIR",
        help="Directory of the mesh's sockets.",
        default_factory=default_run_dir,
        show_default=False,
    ),
]
"""The option of every command that talks to a service."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
"""The option of every command that prints something to read."""

_REMEDIES: dict[str, str] = {
    "SERVICE_UNREACHABLE": "`falkirk doctor` looks closer",
    "UNAVAILABLE": "the service went away under way; try again once it is back (`falkirk doctor` shows which one is down)",
    "DRAINING": "the service is being restarted; try again in a moment",
    "ROAD_FORBIDDEN": "run the command as a user who may enter that directory of the run directory",
    "NOT_LOGGED_IN": "`falkirk login --address HOST:PORT`",
    "LOGIN_EXPIRED": "`falkirk login --address HOST:PORT` with a new token of `falkirk authority token NAME`",
    "CERTIFICATE_EXPIRED": "`falkirk login --address HOST:PORT`",
    "CERTIFICATE_NEEDED": "`falkirk login --address HOST:PORT`",
    "ROLE_FORBIDDEN": "ask somebody with that role; services/ROLES.md has who may do what",
    "TENANT_FORBIDDEN": "name your own tenant with --tenant; what belongs to no tenant is for those who belong to none",
    "LOGIN_REFUSED": "ask for a new token: `falkirk authority token NAME` makes one",
    "FINGERPRINT_MISMATCH": "is the address right? if it is, somebody is in between",
    "AUTHORITY_LOCKED": "registry.authority in the settings names that file",
    "REVISION_CONFLICT": "someone else changed it meanwhile: read it again, then repeat your change",
    "REVISION_GONE": "watch again from the start",
    "WATCH_TOO_SLOW": "watch again from the start, and read faster",
    "IN_USE": "remove or change those first",
    "IS_DEFAULT": "`falkirk vnet update --tenant TENANT OTHER --default` gives the mark to another one",
    "NAME_TAKEN": "choose another name, or use `update` to change the one that has it",
    "PREFIX_TAKEN": "change the route that has the prefix, or put this one into another virtual network (--vnet)",
    "KEY_TAKEN": "make another pair of keys for this device: a key tells whose packets they are",
    "TOKEN_UNKNOWN": "`falkirk device token create` makes another",
    "TOKEN_EXPIRED": "`falkirk device token create` makes another",
    "TOKEN_USED": "`falkirk device token create` makes another",
    "TOO_MANY_TOKENS": "`falkirk device token list` shows them, `falkirk device token revoke` removes one",
    "PROOF_REFUSED": "enrol the device again, or give it its key anew (`falkirk device rotate`)",
    "ADDRESS_TAKEN": "leave the address out: a free one is taken from the tenant's pool",
    "NO_TUNNEL": "`grpcurl ... onramp.v1.OnrampService/List` shows which tunnels are open",
    "CONNECTION_REFUSED": "does a server listen on that port, on that address?",
    "CONNECT_TIMEOUT": "does the device route the address that audit records as the source into its tunnel?",
    "HOST_BITS_SET": "clear the bits beyond the prefix length",
    "TRANSACTION_TOO_LARGE": "apply the resources in several parts",
}


@contextmanager
def calling(
    run_dir: Path, service: str, locate: Callable[[FalkirkError], str] = lambda error: ""
) -> Iterator[grpc.Channel]:
    """A channel to a service. Any error of a call inside ends the command; `locate` may say where in the input it lies."""
    with told(locate), reach(run_dir, service) as channel:
        yield channel


def reach(run_dir: Path, service: str) -> grpc.Channel:
    """A blocking channel to a service, where the user wants it. Raises FalkirkError."""
    if not os.environ.get(ADDRESS):
        return sync_channel(run_dir, service)
    from falkirk.cli import logins  # loads cryptography, for those who need it

    return logins.channel(service)


@contextmanager
def told(locate: Callable[[FalkirkError], str] = lambda error: "") -> Iterator[None]:
    """Any error of a call inside ends the command."""
    try:
        yield
    except grpc.RpcError as error:
        failed = from_rpc(error)
        _explain(failed, locate(failed))
    except FalkirkError as error:
        _explain(error, locate(error))


@contextmanager
def until_interrupted() -> Iterator[None]:
    """For what goes on until Ctrl-C: that is its end, and no failure."""
    with suppress(KeyboardInterrupt):
        yield


def fail(message: str, reason: str, remedy: str = "") -> NoReturn:
    """End the command with status 1 and `error: <message> (REASON)`."""
    print(f"error: {message} ({reason})", file=sys.stderr)
    remedy = remedy or _REMEDIES.get(reason, "")
    if remedy:
        print(f"  {remedy}", file=sys.stderr)
    raise typer.Exit(FAILED)


def _explain(error: FalkirkError, where: str) -> NoReturn:
    fail(f"{where}: {error.message}" if where else error.message, error.reason)
