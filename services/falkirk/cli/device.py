"""`falkirk device token|approve|rename|disable|enable|expire|show|ping|config|rotate`: what administrators do with devices beside their fields.

A private key is made here, shown once in the configuration (or written to a file of mode 0600), and kept nowhere: the registry learns the public one only.
"""

from __future__ import annotations

import base64
import json as jsonlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from falkirk.api.registry.v1 import (
    device_service_pb2,
    device_token_service_pb2,
    presence_service_pb2,
)
from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.api.registry.v1.device_service_pb2_grpc import DeviceServiceStub
from falkirk.api.registry.v1.device_token_service_pb2_grpc import DeviceTokenServiceStub
from falkirk.api.registry.v1.presence_service_pb2_grpc import PresenceServiceStub
from falkirk.api.upgrader.v1 import upgrader_service_pb2
from falkirk.api.upgrader.v1.upgrader_service_pb2_grpc import UpgraderServiceStub
from falkirk.cli import manifest, wgconfig
from falkirk.cli.connect import who
from falkirk.cli.connection import Json, RunDir, calling, fail
from falkirk.cli.output import instant, joined, print_json, print_table, seconds, timestamp
from falkirk.runtime.errors import from_rpc
from falkirk.wireguard import proof

_SERVICE = "registry"
_SILENT = "silent"
_ANSWERS = {
    "CONNECTION_REFUSED": "closed",
    "CONNECT_TIMEOUT": _SILENT,
    "UNREACHABLE": _SILENT,
    "DEADLINE_EXCEEDED": _SILENT,
}
"""Reasons of UpgraderService.Lower, by what they say of the device."""
_TIMEOUT_S = 30.0
_PAGE = 1000

_Tenant = Annotated[str, typer.Option("--tenant", help="The tenant's name or id.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The device's name or id.", show_default=False)]
_Format = Annotated[str, typer.Option("--format", help="wg-quick, json, or qr (for a phone's camera).")]
_Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write to this new file, readable by you alone, instead of standard output."),
]


def register(group: typer.Typer) -> None:
    """Add the commands to the group `device`."""
    tokens = typer.Typer(name="token", help="Enrolment tokens: what a new device shows.", no_args_is_help=True)
    tokens.command("create")(token_create)
    tokens.command("list")(token_list)
    tokens.command("revoke")(token_revoke)
    group.add_typer(tokens)
    for command in (approve, rename, disable, enable, expire, show, ping, config, rotate):
        group.command(command.__name__)(command)


def token_create(
    tenant: _Tenant,
    run_dir: RunDir,
    user: Annotated[str, typer.Option("--user", help="The owner that devices get.")] = "",
    group: Annotated[list[str] | None, typer.Option("--group", help="A group that devices get, several times.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="A label that devices get, KEY=VALUE, several times.")
    ] = None,
    reusable: Annotated[bool, typer.Option("--reusable", help="For any number of devices.")] = False,
    approval: Annotated[bool, typer.Option("--approval", help="Devices wait for `falkirk device approve`.")] = False,
    expires: Annotated[
        str, typer.Option("--expires", help="When it ends: a time or a span (12h); not given: 1h, reusable 1d.")
    ] = "",
    device_lifetime: Annotated[
        str, typer.Option("--device-lifetime", help="How long its devices may connect (90d); not given: without end.")
    ] = "",
    comment: Annotated[str, typer.Option("--comment", help="Free text for people.")] = "",
    json: Json = False,
) -> None:
    """Make an enrolment token and print it, this once."""
    token = device_token_service_pb2.DeviceToken(
        tenant=tenant, user=user, groups=group or (), reusable=reusable, needs_approval=approval, comment=comment
    )
    for item in tag or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} isn't KEY=VALUE", param_hint="--tag")
        token.tags[key] = value
    try:
        if expires:
            token.expire_time.CopyFrom(instant(expires))
        token.device_lifetime_s = seconds(device_lifetime) if device_lifetime else 0
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with calling(run_dir, _SERVICE) as channel:
        request = device_token_service_pb2.DeviceTokenServiceCreateRequest(token=token)
        answer = DeviceTokenServiceStub(channel).Create(request, timeout=_TIMEOUT_S)
    if json:
        print_json(answer)
        return
    made = answer.token
    print(answer.secret)
    times = "for any number of devices" if made.reusable else "for one device"
    print(f"token {made.id[:8]} of {made.tenant}, {times}, until {timestamp(made.expire_time)}", file=sys.stderr)


def token_list(tenant: _Tenant, run_dir: RunDir, json: Json = False) -> None:
    """List enrolment tokens, without their secrets."""
    with calling(run_dir, _SERVICE) as channel:
        request = device_token_service_pb2.DeviceTokenServiceListRequest(tenant=tenant)
        answer = DeviceTokenServiceStub(channel).List(request, timeout=_TIMEOUT_S)
    if json:
        print_json(answer)
        return
    print_table(
        ["id", "user", "groups", "tags", "reusable", "approval", "uses", "expires", "comment"],
        (
            (
                token.id[:8],
                token.user,
                joined(token.groups),
                joined(f"{key}={value}" for key, value in sorted(token.tags.items())),
                token.reusable,
                token.needs_approval,
                token.uses,
                timestamp(token.expire_time),
                token.comment,
            )
            for token in answer.tokens
        ),
    )


def token_revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="Its id, or the start of it.", show_default=False)],
    tenant: _Tenant,
    run_dir: RunDir,
    json: Json = False,
) -> None:
    """Revoke an enrolment token; devices that enrolled by it stay."""
    with calling(run_dir, _SERVICE) as channel:
        request = device_token_service_pb2.DeviceTokenServiceRevokeRequest(tenant=tenant, id=token)
        answer = DeviceTokenServiceStub(channel).Revoke(request, timeout=_TIMEOUT_S)
    if json:
        print_json(answer)
    else:
        print(f"token {answer.token.id[:8]} revoked")


def approve(name: _Name, tenant: _Tenant, run_dir: RunDir, json: Json = False) -> None:
    """Let a device that waits for it connect."""
    with calling(run_dir, _SERVICE) as channel:
        request = device_service_pb2.DeviceServiceApproveRequest(tenant=tenant, name=name)
        answer = DeviceServiceStub(channel).Approve(request, timeout=_TIMEOUT_S)
    _said(answer, "approved", json)


def rename(
    name: _Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new name.", show_default=False)],
    tenant: _Tenant,
    run_dir: RunDir,
    json: Json = False,
) -> None:
    """Give a device another name; addresses, key and references stay."""
    _change(run_dir, tenant, name, lambda device: setattr(device.metadata, "name", new), "renamed", json)


def disable(name: _Name, tenant: _Tenant, run_dir: RunDir, json: Json = False) -> None:
    """Close a device's tunnels and let it open none."""
    _change(run_dir, tenant, name, lambda device: setattr(device, "disabled", True), "disabled", json)


def enable(name: _Name, tenant: _Tenant, run_dir: RunDir, json: Json = False) -> None:
    """Let a disabled device connect again."""
    _change(run_dir, tenant, name, lambda device: setattr(device, "disabled", False), "enabled", json)


def expire(
    name: _Name,
    when: Annotated[
        str,
        typer.Argument(metavar="WHEN", help="now, never, a time (2027-01-31T12:00:00Z), or a span from now (30d)."),
    ],
    tenant: _Tenant,
    run_dir: RunDir,
    json: Json = False,
) -> None:
    """Say when a device ends: its tunnels are closed then, and it can open none."""

    def change(device: Device) -> None:
        if when == "never":
            device.ClearField("expire_time")
            return
        try:
            device.expire_time.CopyFrom(instant("0s" if when == "now" else when))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="WHEN") from None

    _change(run_dir, tenant, name, change, f"ends {when}", json)


def show(name: _Name, tenant: _Tenant, run_dir: RunDir, json: Json = False) -> None:
    """Show a device, and where it is attached now."""
    with calling(run_dir, _SERVICE) as channel:
        found = DeviceServiceStub(channel).Get(
            device_service_pb2.DeviceServiceGetRequest(tenant=tenant, name=name), timeout=_TIMEOUT_S
        )
        request = presence_service_pb2.PresenceServiceListRequest(tenant=tenant, device=found.device.metadata.id)
        presence = _present(PresenceServiceStub(channel), request)
    if json:
        from google.protobuf.json_format import MessageToDict

        both = {
            "device": MessageToDict(found.device, always_print_fields_with_no_presence=True),
            "presences": [
                MessageToDict(item, always_print_fields_with_no_presence=True) for item in presence.presences
            ],
        }
        print(jsonlib.dumps(both, ensure_ascii=False, indent=2))
        return
    print(manifest.render(found.device), end="")
    if not presence.presences:
        print("# attached nowhere")
        return
    print_table(
        ["node", "endpoint", "path", "last handshake", "since", "received", "sent"],
        (
            (
                item.node,
                item.endpoint,
                path_text(item.path),
                timestamp(item.last_handshake),
                timestamp(item.since),
                item.received_bytes,
                item.sent_bytes,
            )
            for item in presence.presences
        ),
    )


def ping(
    name: _Name,
    tenant: _Tenant,
    run_dir: RunDir,
    count: Annotated[int, typer.Option("--count", "-c", min=1, max=1000, help="How many times.")] = 3,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The TCP port to knock at.")] = 7,
    wait: Annotated[float, typer.Option("--wait", min=0.1, max=60, help="Seconds to wait for each answer.")] = 5.0,
) -> None:
    """See whether a device answers: knocks at a TCP port of it, open or not. Status 1 where it never did.

    An administrator's tool: no rule of the tenant is asked, and the audit log says who asked. A firewall on the device that drops silently looks
    like no answer.
    """
    with calling(run_dir, "upgrader") as channel:
        answers = list(knocks(channel, tenant, name, count, port, wait))
    taken = [milliseconds for milliseconds in answers if milliseconds is not None]
    if not taken:
        remedy = f"`falkirk device show {name} --tenant {tenant}` tells where it is attached"
        fail(f"device {name} answered none of {count}", "NO_ANSWER", remedy)
    print(f"{len(taken)} of {count} answered, {min(taken):.1f} to {max(taken):.1f} ms")


def knocks(channel: Any, tenant: str, name: str, count: int, port: int, wait: float) -> Iterator[float | None]:
    """Milliseconds until each answer (a connection or its refusal), None where there was none; prints each.

    Raises grpc.RpcError for what isn't the device's silence, such as no tunnel at all.
    """
    stub = UpgraderServiceStub(channel)
    for number in range(1, count + 1):
        target = upgrader_service_pb2.LowerTarget(tenant=tenant, device=name, port=port, actor=who())
        began = time.monotonic()
        call = stub.Lower(iter([upgrader_service_pb2.LowerRequest(open=target)]), timeout=wait)
        said = "open"
        try:
            next(call)
        except grpc.RpcError as error:
            said = _ANSWERS.get(from_rpc(error).reason, "")
            if not said:
                raise
        taken = (time.monotonic() - began) * 1000
        call.cancel()
        if said == _SILENT:
            print(f"{number}: no answer after {taken:.0f} ms")
            yield None
        else:
            print(f"{number}: port {port} {said}, {taken:.1f} ms")
            yield taken


def config(name: _Name, tenant: _Tenant, run_dir: RunDir, format: _Format = "wg-quick", out: _Out = None) -> None:
    """Make a key pair for a device that has none, and print its configuration, this once."""
    _configure(run_dir, tenant, name, format, out, replace=False)


def rotate(name: _Name, tenant: _Tenant, run_dir: RunDir, format: _Format = "wg-quick", out: _Out = None) -> None:
    """Replace a device's key pair, and print the new configuration, this once; the old key is refused at once."""
    _configure(run_dir, tenant, name, format, out, replace=True)


def _present(stub: Any, request: Any) -> presence_service_pb2.PresenceServiceListResponse:
    """Where devices are; nothing for who may see devices, but not where they are (an owner over TCP)."""
    try:
        answer: presence_service_pb2.PresenceServiceListResponse = stub.List(request, timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        if from_rpc(error).reason != "ROLE_FORBIDDEN":
            raise
        return presence_service_pb2.PresenceServiceListResponse()
    return answer


def presence_columns(channel: Any, tenant: str) -> dict[str, Callable[[Any], object]]:
    """What `device list` shows beside the fields: where each is attached, and its last handshake."""
    places: dict[str, list[presence_service_pb2.Presence]] = {}
    stub, token = PresenceServiceStub(channel), ""
    while True:
        request = presence_service_pb2.PresenceServiceListRequest(tenant=tenant, page_size=_PAGE, page_token=token)
        page = _present(stub, request)
        for item in page.presences:
            places.setdefault(item.device_id, []).append(item)
        token = page.next_page_token
        if not token:
            break

    def shown(text: Callable[[presence_service_pb2.Presence], str]) -> Callable[[Any], object]:
        return lambda device: joined(filter(None, map(text, places.get(device.metadata.id, ()))))

    return {
        "at": shown(lambda item: f"{item.node} {item.endpoint}".strip()),
        "last handshake": shown(lambda item: timestamp(item.last_handshake)),
    }


def path_text(path: int) -> str:
    """PRESENCE_PATH_WIREGUARD is shown as wireguard."""
    return presence_service_pb2.PresencePath.Name(path).removeprefix("PRESENCE_PATH_").lower() if path else ""


def _configure(run_dir: Path, tenant: str, name: str, format: str, out: Path | None, *, replace: bool) -> None:
    if format not in wgconfig.FORMATS:
        raise typer.BadParameter(f"{format!r} isn't {', '.join(wgconfig.FORMATS)}", param_hint="--format")
    if out is not None and out.exists():
        fail(f"{out} exists", "FILE_EXISTS", "choose another file, or remove that one: a configuration holds a key")
    private = os.urandom(32)
    with calling(run_dir, _SERVICE) as channel:
        stub = DeviceServiceStub(channel)
        found = stub.GetTunnel(
            device_service_pb2.DeviceServiceGetTunnelRequest(tenant=tenant, name=name), timeout=_TIMEOUT_S
        )
        device, tunnel = found.device, found.tunnel
        if device.public_key and not replace:
            fail(
                f"device {name} has a key already, and nobody but it knows the private one",
                "KEY_EXISTS",
                f"`falkirk device rotate {name} --tenant {tenant}` replaces it",
            )
        if not tunnel.peers:
            fail(
                "no node takes WireGuard yet",
                "NO_NODE",
                "set onramp.wireguard.port and endpoints, or `falkirk node create`; `falkirk node list` shows them",
            )
        device.public_key = proof.text_of(proof.public_of(private))
        device = stub.Update(device_service_pb2.DeviceServiceUpdateRequest(device=device), timeout=_TIMEOUT_S).device
    key = base64.b64encode(private).decode()
    text = wgconfig.wg_quick(device, tunnel, key)
    if format == "json":
        text = jsonlib.dumps(wgconfig.document(device, tunnel, key), indent=2) + "\n"
    elif format == "qr":
        text = wgconfig.qr(text)
    if out is None:
        print(text, end="")
        return
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    print(f"{out} written", file=sys.stderr)


def _change(run_dir: Path, tenant: str, name: str, change: Callable[[Device], None], outcome: str, json: bool) -> None:
    """Read, change, and write on condition that nobody else wrote meanwhile."""
    with calling(run_dir, _SERVICE) as channel:
        stub = DeviceServiceStub(channel)
        request = device_service_pb2.DeviceServiceGetRequest(tenant=tenant, name=name)
        device = stub.Get(request, timeout=_TIMEOUT_S).device
        change(device)
        answer = stub.Update(device_service_pb2.DeviceServiceUpdateRequest(device=device), timeout=_TIMEOUT_S)
    _said(answer, outcome, json)


def _said(answer: Any, outcome: str, json: bool) -> None:
    if json:
        print_json(answer)
    else:
        print(f"device/{answer.device.metadata.tenant}/{answer.device.metadata.name} {outcome}")
