"""`falkirk connect`: a TCP connection from Falkirk itself to a port of a device, on standard input and output.

An administrator's tool, to see whether a device answers: no rule of the tenant is asked, and the audit log says who asked, as far as
this command says so truthfully (a unix socket doesn't tell). The end of standard input is a FIN for the device; once the device has ended its own side
the command ends. What breaks off is an error, never an end.
"""

from __future__ import annotations

import os
import pwd
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from falkirk.cli.connection import RunDir, calling

if TYPE_CHECKING:
    from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb

CHUNK = 64 * 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("connect")(connect)


def connect(
    run_dir: RunDir,
    tenant: Annotated[str, typer.Option(help="Name of the tenant.")],
    device: Annotated[str, typer.Option(help="Name of the device.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port of the device.")],
    ipv4: Annotated[bool, typer.Option("-4", help="Use the device's IPv4 address.")] = False,
    ipv6: Annotated[bool, typer.Option("-6", help="Use the device's IPv6 address.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say on standard error which flow it is.")] = False,
) -> None:
    """Connect to a port of a device, as an administrator; standard input goes there, what comes back to standard output."""
    from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb
    from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc

    if ipv4 and ipv6:
        raise typer.BadParameter("-4 and -6 exclude each other")
    version = 4 if ipv4 else 6 if ipv6 else 0
    target = pb.LowerTarget(tenant=tenant, device=device, port=port, ip_version=version, actor=who())
    ended, end = os.pipe()
    with calling(run_dir, "upgrader") as channel:
        for response in upgrader_service_pb2_grpc.UpgraderServiceStub(channel).Lower(_requests(target, ended)):
            kind = response.WhichOneof("content")
            if kind == "data":
                sys.stdout.buffer.write(response.data)
                sys.stdout.buffer.flush()
            elif kind == "end":
                os.write(end, b".")
            elif verbose:
                print(f"connected: flow {response.opened.flow_id}", file=sys.stderr)


def who() -> str:
    """Who runs this, for the audit log."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    behind = os.environ.get("SUDO_USER")
    return f"{name} (uid {uid}{f', sudo by {behind}' if behind else ''})"


def _requests(target: pb.LowerTarget, ended: int) -> Iterator[pb.LowerRequest]:
    """What goes up: the target, standard input, an end; in the thread in which gRPC asks for it."""
    from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb

    yield pb.LowerRequest(open=target)
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready or not (data := os.read(0, CHUNK)):
            break
        yield pb.LowerRequest(data=data)
    yield pb.LowerRequest(end=pb.LowerEnd())
