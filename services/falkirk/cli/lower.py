"""`falkirk lower`: run a command whose TCP connections travel as packets over a connected tunnel.

This module only reads the command line; the work is `falkirk.linux.lower`, in a process of its own that takes this
one's place (same pid, so that signals and job control reach it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from falkirk.linux.lower.request import LowerRequest
from falkirk.wire.context import Framing, Transport

MODULE = "falkirk.linux.lower"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("lower", context_settings={"allow_interspersed_args": False})(lower)


def lower(
    command: Annotated[list[str], typer.Argument(help="Command to run, with its arguments; put -- before it.")],
    tenant: Annotated[str, typer.Option(help="Name of the tenant.")],
    device: Annotated[str, typer.Option(help="Name of the device to speak for.")],
    tunnel: Annotated[
        Path | None, typer.Option(help="The on-ramp's socket. [default: tunnel.sock in $FALKIRK_RUN_DIR]")
    ] = None,
    virtual_network: Annotated[str, typer.Option(help="Virtual network; the device's own if not given.")] = "",
    framing: Annotated[Framing, typer.Option(help="How packets are framed on the tunnel.")] = Framing.VNET,
    transport: Annotated[
        Literal["socket", "device"] | None,
        typer.Option(
            help="What carries packets; a device that is handed over where that is permitted, else the socket."
        ),
    ] = None,
    packed: Annotated[bool, typer.Option(help="With raw framing: several packets in one datagram, each way.")] = True,
    attribute: Annotated[list[str] | None, typer.Option(help="key=value for the tunnel's context; repeatable.")] = None,
    mtu: Annotated[int, typer.Option(min=0, max=65535, help="Bytes; 0 takes what the on-ramp admits.")] = 0,
    congestion: Annotated[str, typer.Option(help="TCP congestion control of the command's connections.")] = "cubic",
    sysctl: Annotated[list[str] | None, typer.Option(help="name=value in the command's namespace; repeatable.")] = None,
    linger: Annotated[
        float, typer.Option(min=0, help="Seconds to wait at the end for connections to be closed by both sides.")
    ] = 5.0,
    stats: Annotated[bool, typer.Option(help="Print packet counters on standard error at the end.")] = False,
) -> None:
    """Run a command in a namespace whose only way out is a connected tunnel.

    Ends as the command does; 3 when the on-ramp refuses, 4 when the tunnel ends first, 5 when no TUN device or namespace
    can be had.
    """
    request = LowerRequest(
        tunnel=str(_tunnel(tunnel)),
        tenant=tenant,
        device=device,
        command=tuple(command),
        virtual_network=virtual_network,
        framing=framing,
        transport=Transport(transport) if transport else None,
        packed=packed,
        attributes=_pairs(attribute, "--attribute"),
        mtu=mtu,
        congestion=congestion,
        settings=_pairs(sysctl, "--sysctl"),
        linger_s=linger,
        stats=stats,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", MODULE, msgspec.json.encode(request).decode()])


def _tunnel(given: Path | None) -> Path:
    if given is not None:
        return given
    run_dir = os.environ.get("FALKIRK_RUN_DIR")
    if not run_dir:
        raise typer.BadParameter("give the on-ramp's socket, or set FALKIRK_RUN_DIR", param_hint="--tunnel")
    return Path(run_dir) / "tunnel.sock"


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    result = {}
    for item in given or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{item!r} isn't key=value", param_hint=option)
        result[key] = value
    return result
