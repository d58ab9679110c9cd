"""`falkirk device enroll|up|status|down`: this machine as a device.

`enroll` makes a pair of keys here, shows the token, and keeps what the registry answers (`device_state`). `up` asks the registry how the
tunnel is now (`device_registry`), or takes what it last said where the registry can't be reached, and leaves behind an agent (`device_agent`) with the
interface, which `status` asks and `down` ends. Only `up` needs root, for the TUN device.

Secrets come from files, standard input or the environment, never from arguments.
"""

from __future__ import annotations

import base64
import json as json_module
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer

from falkirk.api.registry.v1 import device_service_pb2 as pb
from falkirk.cli import device_registry, posture
from falkirk.cli.connection import Json, RunDir, fail
from falkirk.cli.device_state import BadState, Enrolled, Place, State, default_folder
from falkirk.cli.output import print_table
from falkirk.linux.wireguard import control
from falkirk.runtime import remote
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.wireguard import primitives, proof

_SECONDS: Final = 10.0
_ASK_SECONDS: Final = 3.0
"""How long `up` waits for the registry before it takes what is known."""
_END_SECONDS: Final = 10.0
_TOKEN: Final = "FALKIRK_DEVICE_TOKEN"

_Folder = Annotated[
    Path,
    typer.Option(
        "--state",
        envvar="FALKIRK_DEVICE_DIR",
        help="Directory of this device's key and state.",
        default_factory=default_folder,
        show_default=False,
    ),
]


def add(group: typer.Typer) -> None:
    """Add the commands to the group `device`."""
    for command in (enroll, up, status, down):
        group.command(command.__name__)(command)


def enroll(
    run_dir: RunDir,
    state: _Folder,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help=f"File with the enrolment token, - for standard input. [default: ${_TOKEN}]"),
    ] = None,
    oidc_token_file: Annotated[
        Path | None, typer.Option("--oidc-token-file", help="File with an OIDC ID token instead, - for standard input.")
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="The tenant, where an OIDC issuer serves several.")] = "",
    name: Annotated[str, typer.Option("--name", help="The device's name; not given takes the host's.")] = "",
    fact: Annotated[list[str] | None, typer.Option("--fact", help="key=value for the posture; repeatable.")] = None,
    address: Annotated[
        str, typer.Option("--address", help="The registry's host:port; not given takes --run-dir.")
    ] = "",
    fingerprint: Annotated[
        str,
        typer.Option("--fingerprint", help="With --address: SHA-256 of the mesh's root (`falkirk authority show`)."),
    ] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Forget the device that was enrolled here before.")
    ] = False,
    json: Json = False,
) -> None:
    """Become a device, by an enrolment token or an OIDC token."""
    with _local():
        place = _place(run_dir, address, fingerprint)
        kept = State(state)
        before = kept.read()
        if before is not None and before.device_id and not replace:
            fail(
                f"{state} has the device {before.name} of {before.tenant} already",
                "ALREADY_ENROLLED",
                "`falkirk device up` connects it; --replace forgets it",
            )
        secret = _secret(token_file, oidc_token_file)
        facts = posture.collect() | _facts(fact)
        # An answer that was lost can be asked for again, by the same key.
        unanswered = before is not None and not before.device_id
        key = before.private_key if before is not None and unanswered else os.urandom(32)
        kept.write(Enrolled(private_key=key, place=place))
        request = pb.DeviceServiceEnrollRequest(
            tenant=tenant, name=name, public_key=proof.text_of(primitives.public_key(key)), posture=facts
        )
        if oidc_token_file is None:
            request.token = secret
        else:
            request.oidc_token = secret
        with device_registry.stub(place) as registry:
            answer = registry.Enroll(request, timeout=_SECONDS)
        enrolled = device_registry.taken(
            Enrolled(private_key=key, place=place, posture=facts), answer.device, answer.tunnel
        )
        kept.write(enrolled)
    _tell_enrolled(enrolled, pending=answer.device.pending, json=json)


def up(
    state: _Folder,
    interface: Annotated[str, typer.Option("--interface", help="Name of the interface. [default: falkirk0]")] = "",
    dns: Annotated[bool, typer.Option("--dns/--no-dns", help="Have names resolved by the tenant's resolver.")] = True,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for the first handshake.")] = 5.0,
    refresh: Annotated[
        float, typer.Option("--refresh", min=0, help="Seconds between looks at what has changed; 0: none.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Connect this device. It stays connected until `down`."""
    with _local():
        kept = State(state)
        enrolled = _enrolled(kept)
        if _running(kept) is not None:
            fail(
                "this device is up already",
                "ALREADY_UP",
                "`falkirk device status` shows it; `falkirk device down` ends it",
            )
        try:
            enrolled = device_registry.refresh(kept, enrolled)
        except device_registry.Unreachable as error:
            print(f"the registry can't be reached ({error}); taking what it said before", file=sys.stderr)
        except device_registry.MayNotConnect as error:
            fail(str(error), error.reason, error.remedy)
        if not enrolled.tunnel.peers:
            fail(
                "the registry knows no node that devices could connect to",
                "NO_NODE",
                "enable the on-ramp's WireGuard (onramp.wireguard) and enroll or ask again",
            )
        kept.write_interface(enrolled, interface, dns=dns)
        _start(kept, interface, dns=dns, refresh=refresh)
        answered = control.ask(kept.socket, "status")
        end = time.monotonic() + wait
        while not _connected(answered) and time.monotonic() < end:
            time.sleep(0.02)
            answered = control.ask(kept.socket, "status")
    _tell(enrolled, answered, json)
    if not _connected(answered):
        print(f"no node has answered within {wait:g} s; this device goes on asking", file=sys.stderr)


def status(state: _Folder, json: Json = False) -> None:
    """Show this device: its node, addresses, last handshake and traffic. Status 1 where it isn't up."""
    with _local():
        kept = State(state)
        enrolled = _enrolled(kept)
        answered = _running(kept)
    if answered is None:
        fail(f"{enrolled.name} isn't up", "NOT_UP", "`falkirk device up` connects it")
    _tell(enrolled, answered, json)


def down(state: _Folder) -> None:
    """Disconnect this device, and leave addresses, routes and DNS as they were."""
    with _local():
        kept = State(state)
        enrolled = _enrolled(kept)
        try:
            answered = control.ask(kept.socket, "down")
        except control.NotRunning:
            fail(f"{enrolled.name} isn't up", "NOT_UP")
        end = time.monotonic() + _END_SECONDS
        while not _ended(answered["pid"]):
            if time.monotonic() > end:
                fail(f"process {answered['pid']} doesn't end", "STILL_UP", f"look into {kept.log}")
            time.sleep(0.01)
    print(f"{enrolled.name} is down")


@contextmanager
def _local() -> Iterator[None]:
    """Errors of this machine and of the registry, told as every command's."""
    try:
        yield
    except BadState as error:
        fail(str(error), "BAD_STATE")
    except control.NotRunning as error:
        fail(str(error), "NOT_UP")
    except grpc.RpcError as error:
        told = from_rpc(error)
        fail(told.message, told.reason)
    except FalkirkError as error:
        fail(error.message, error.reason)


def _place(run_dir: Path, address: str, fingerprint: str) -> Place:
    """Raises FalkirkError where nobody with that fingerprint answers."""
    if not address:
        return Place(run_dir=str(run_dir.absolute()))
    if not fingerprint:
        raise typer.BadParameter("over TCP it must be known who answers: give --fingerprint", param_hint="--address")
    return Place(address=address, roots=remote.roots(address, fingerprint))


def _secret(token_file: Path | None, oidc_token_file: Path | None) -> str:
    if token_file is not None and oidc_token_file is not None:
        raise typer.BadParameter("one token is enough: --token-file or --oidc-token-file", param_hint="--token-file")
    path = token_file or oidc_token_file
    if path is None:
        secret = os.environ.get(_TOKEN, "")
    else:
        try:
            secret = sys.stdin.read() if str(path) == "-" else path.read_text()
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--token-file") from None
    if not secret.strip():
        raise typer.BadParameter(
            f"an administrator makes a token by `falkirk device token create`; give it by a file, - or ${_TOKEN}",
            param_hint="--token-file",
        )
    return secret.strip()


def _facts(given: list[str] | None) -> dict[str, str]:
    facts = {}
    for item in given or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{item!r} isn't key=value", param_hint="--fact")
        facts[key] = value
    return facts


def _enrolled(kept: State) -> Enrolled:
    enrolled = kept.read()
    if enrolled is None or not enrolled.device_id:
        fail(
            f"no device is enrolled in {kept.folder}", "NOT_ENROLLED", "`falkirk device enroll` makes this machine one"
        )
    return enrolled


def _start(kept: State, interface: str, *, dns: bool, refresh: float) -> None:
    """Start the agent, and wait until its interface is up. What it says goes to the log, and is shown where it fails."""
    options = [
        *(("--interface", interface) if interface else ()),
        *(() if dns else ("--no-dns",)),
        "--refresh",
        str(refresh),
    ]
    with open(os.open(kept.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "falkirk.cli.device_agent", str(kept.folder), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.readline()
    if said != b"up\n":
        process.wait()
        fail(kept.log.read_text().strip().removeprefix("falkirk: ") or "the interface ended at once", "NO_INTERFACE")


def _running(kept: State) -> dict[str, Any] | None:
    try:
        return control.ask(kept.socket, "status")
    except control.NotRunning:
        return None


def _ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not fetched by its parent yet (proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return True


def _connected(answered: dict[str, Any]) -> bool:
    return any(peer["connected"] for peer in answered["peers"])


def _tell_enrolled(enrolled: Enrolled, *, pending: bool, json: bool) -> None:
    if json:
        said = {
            "device": enrolled.name,
            "tenant": enrolled.tenant,
            "deviceId": enrolled.device_id,
            "addresses": enrolled.tunnel.addresses,
            "pending": pending,
        }
        print(json_module.dumps(said, indent=2))
        return
    print(f"{enrolled.name} is a device of {enrolled.tenant} now: {', '.join(enrolled.tunnel.addresses)}")
    if pending:
        print("it may connect once an administrator has approved it")
    else:
        print("`falkirk device up` connects it")


def _tell(enrolled: Enrolled, answered: dict[str, Any], json: bool) -> None:
    if json:
        print(json_module.dumps({"device": enrolled.name, "tenant": enrolled.tenant, **answered}, indent=2))
        return
    dns = answered["dns"]
    print(f"device     {enrolled.name} of {enrolled.tenant}")
    print(f"interface  {answered['interface']}, {', '.join(answered['addresses'])}, MTU {answered['mtu']}")
    if dns["by"]:
        print(f"names      {', '.join(dns['servers'])} for {', '.join(dns['search']) or 'everything'}, by {dns['by']}")
    rows = [
        (
            base64.b64encode(bytes.fromhex(peer["public_key"])).decode()[:12],
            peer["endpoint"],
            (peer["connected"] and "connected") or "asking",
            "" if peer["handshake_age_s"] is None else f"{peer['handshake_age_s']:.0f} s ago",
            peer["received_bytes"],
            peer["sent_bytes"],
            " ".join(peer["allowed"]),
        )
        for peer in answered["peers"]
    ]
    print_table(("node", "endpoint", "state", "handshake", "received", "sent", "routes"), rows)
    for reason, count in answered["dropped"].items():
        print(f"dropped    {reason} {count}")
