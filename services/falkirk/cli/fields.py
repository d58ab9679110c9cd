"""The fields of each kind as command-line options and as columns, in one table.

`falkirk device create` and its neighbours are built from a row: what is added here shows up in create, update and
list alike. What flags can't say in a sensible way (the rules of a policy) goes by manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from falkirk.api.registry.v1 import (
    device_service_pb2,
    device_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    policy_document_service_pb2,
    policy_document_service_pb2_grpc,
    route_service_pb2,
    route_service_pb2_grpc,
    tenant_service_pb2,
    tenant_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
    virtual_network_service_pb2,
    virtual_network_service_pb2_grpc,
    zone_service_pb2,
    zone_service_pb2_grpc,
)
from falkirk.cli.output import instant, joined, timestamp

Setter = Callable[[Any, Any], None]


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of create and update. Its type is str, int, bool, or list[str] (given several times; an empty value clears)."""

    names: str
    """As typer takes them: `--disabled/--enabled`."""
    type: Any
    help: str
    set: Setter

    @property
    def key(self) -> str:
        """The parameter's name."""
        return self.names.split("/")[0].removeprefix("--").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Spec:
    """A kind, as the command line knows it."""

    command: str
    """The group: `vnet`."""
    name: str
    """The field in messages."""
    plural: str
    messages: Any
    """The generated module of its messages."""
    stub: Any
    """Makes a stub from a channel."""
    flags: tuple[Flag, ...]
    columns: Mapping[str, Callable[[Any], object]]
    """Columns of `list` after the name."""

    @property
    def scoped(self) -> bool:
        """Whether it lives in a tenant."""
        return self.name not in ("tenant", "node")

    @property
    def service(self) -> str:
        """The start of the names of its requests."""
        return "".join(part.capitalize() for part in self.name.split("_")) + "Service"

    def request(self, method: str, **values: Any) -> Any:
        """A request of its service."""
        return getattr(self.messages, f"{self.service}{method}Request")(**values)


def _plain(name: str) -> Setter:
    def put(message: Any, value: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            message = getattr(message, part)
        setattr(message, last, value)

    return put


def _list(name: str) -> Setter:
    def put(message: Any, value: list[str]) -> None:
        getattr(message, name)[:] = [item for item in value if item]

    return put


def _pairs(name: str) -> Setter:
    def put(message: Any, value: list[str]) -> None:
        *path, last = name.split(".")
        for part in path:
            message = getattr(message, part)
        pairs = getattr(message, last)
        pairs.clear()
        for item in filter(None, value):
            key, equals, text = item.partition("=")
            if not equals:
                raise typer.BadParameter(f"{item!r} isn't KEY=VALUE")
            pairs[key] = text

    return put


def _instant(name: str) -> Setter:
    def put(message: Any, value: str) -> None:
        if not value:
            message.ClearField(name)
            return
        try:
            getattr(message, name).CopyFrom(instant(value))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return put


TARGETS = "internet, blackhole or device:NAME"


def _target(message: Any, value: str) -> None:
    kind, colon, name = value.partition(":")
    if (kind, colon) == ("device", ":") and name:
        message.target.device.device = name
    elif value in ("internet", "blackhole"):
        getattr(message.target, value).SetInParent()
    else:
        raise typer.BadParameter(f"{value!r} isn't {TARGETS}", param_hint="--target")


def _egress(name: str) -> Setter:
    def put(message: Any, value: Any) -> None:
        kind = message.target.WhichOneof("target")
        if kind not in (None, "internet"):
            raise typer.BadParameter(f"target {kind} dials nothing", param_hint=f"--{name.replace('_', '-')}")
        setattr(message.target.internet, name, value)

    return put


def target_text(route: Any) -> str:
    """A route's target in a cell."""
    kind = route.target.WhichOneof("target") or ""
    if kind == "device":
        return f"device {route.target.device.device}"
    if kind != "internet":
        return kind
    internet = route.target.internet
    egress = [address for address in (internet.egress_address4, internet.egress_address6) if address]
    return f"internet from {joined(egress)}" if egress else "internet"


def _records(message: Any, value: list[str]) -> None:
    del message.records[:]
    for item in filter(None, value):
        name, _, rest = item.strip().partition(" ")
        kind, _, said = rest.strip().partition(" ")
        number = zone_service_pb2.ZoneRecordType.DESCRIPTOR.values_by_name.get(f"ZONE_RECORD_TYPE_{kind.upper()}")
        if number is None or not number.number or not said:
            raise typer.BadParameter(f"{item!r} isn't NAME TYPE VALUE", param_hint="--record")
        message.records.add(name=name, type=number.name, value=said.strip())


LABELS = Flag("--label", list[str], "KEY=VALUE, several times.", _pairs("metadata.labels"))
_COMMENT = Flag("--comment", str, "Free text for people.", _plain("comment"))
_DISABLED = Flag("--disabled/--enabled", bool, "May it connect?", _plain("disabled"))
_VNET = Flag("--vnet", str, "Its virtual network; not given takes the tenant's default.", _plain("virtual_network"))
_MAX_FLOWS = Flag(
    "--max-flows", int, "Flows that it may have at once; 0 takes the node's default.", _plain("max_flows")
)
_GROUPS = Flag("--group", list[str], "A group, several times.", _list("groups"))

SPECS: tuple[Spec, ...] = (
    Spec(
        "tenant",
        "tenant",
        "tenants",
        tenant_service_pb2,
        tenant_service_pb2_grpc.TenantServiceStub,
        (
            Flag("--display-name", str, "A name for people.", _plain("display_name")),
            _MAX_FLOWS,
            Flag("--device-pool4", str, "The IPv4 prefix that device addresses come from.", _plain("device_pool4")),
            Flag("--device-pool6", str, "The IPv6 /64 that device addresses come from.", _plain("device_pool6")),
        ),
        {
            "display name": lambda value: value.display_name,
            "pool4": lambda value: value.device_pool4,
            "pool6": lambda value: value.device_pool6,
            "max flows": lambda value: value.max_flows or "",
        },
    ),
    Spec(
        "user",
        "user",
        "users",
        user_service_pb2,
        user_service_pb2_grpc.UserServiceStub,
        (Flag("--email", str, "The mail address.", _plain("email")), _GROUPS, _DISABLED),
        {
            "email": lambda value: value.email,
            "groups": lambda value: joined(value.groups),
            "disabled": lambda value: value.disabled,
        },
    ),
    Spec(
        "device",
        "device",
        "devices",
        device_service_pb2,
        device_service_pb2_grpc.DeviceServiceStub,
        (
            Flag("--user", str, "The owner.", _plain("user")),
            _GROUPS,
            Flag(
                "--address",
                list[str],
                "A virtual address, at most one of each version; not given takes one from each pool.",
                _list("addresses"),
            ),
            _VNET,
            Flag("--public-key", str, "Its WireGuard public key, in base64.", _plain("public_key")),
            Flag("--posture", list[str], "KEY=VALUE, several times.", _pairs("posture")),
            _DISABLED,
            Flag(
                "--expires",
                str,
                "When it ends: a time (2027-01-31T12:00:00Z), or how long from now (90s, 12h, 30d); empty: never.",
                _instant("expire_time"),
            ),
            _MAX_FLOWS,
        ),
        {
            "user": lambda value: value.user,
            "addresses": lambda value: joined(value.addresses),
            "vnet": lambda value: value.virtual_network,
            "groups": lambda value: joined(value.groups),
            "disabled": lambda value: value.disabled,
            "pending": lambda value: value.pending,
            "expires": lambda value: timestamp(value.expire_time),
        },
    ),
    Spec(
        "vnet",
        "virtual_network",
        "virtual_networks",
        virtual_network_service_pb2,
        virtual_network_service_pb2_grpc.VirtualNetworkServiceStub,
        (_COMMENT, Flag("--default", bool, "Make it the tenant's default.", _plain("is_default"))),
        {"default": lambda value: value.is_default, "comment": lambda value: value.comment},
    ),
    Spec(
        "route",
        "route",
        "routes",
        route_service_pb2,
        route_service_pb2_grpc.RouteServiceStub,
        (
            Flag("--prefix", str, "Such as 10.1.0.0/16 or 2001:db8::/32.", _plain("prefix")),
            _VNET,
            Flag("--target", str, f"{TARGETS}.", _target),
            Flag("--egress-address4", str, "The IPv4 address to leave from.", _egress("egress_address4")),
            Flag("--egress-address6", str, "The IPv6 address to leave from.", _egress("egress_address6")),
            Flag(
                "--connect-timeout-ms",
                int,
                "How long a dial may take; 0 takes the node's default.",
                _egress("connect_timeout_ms"),
            ),
            _COMMENT,
        ),
        {
            "vnet": lambda value: value.virtual_network,
            "prefix": lambda value: value.prefix,
            "target": target_text,
            "comment": lambda value: value.comment,
        },
    ),
    Spec(
        "policy",
        "policy",
        "policies",
        policy_document_service_pb2,
        policy_document_service_pb2_grpc.PolicyServiceStub,
        (
            Flag("--priority", int, "Lower is read first.", _plain("priority")),
            _COMMENT,
            Flag("--disabled/--enabled", bool, "Is it enforced?", _plain("disabled")),
        ),
        {
            "priority": lambda value: value.priority,
            "rules": lambda value: len(value.rules),
            "disabled": lambda value: value.disabled,
            "comment": lambda value: value.comment,
        },
    ),
    Spec(
        "node",
        "node",
        "nodes",
        node_service_pb2,
        node_service_pb2_grpc.NodeServiceStub,
        (
            Flag("--public-key", str, "Its WireGuard public key, in base64.", _plain("public_key")),
            Flag("--endpoint", list[str], "HOST:PORT where devices reach it, several times.", _list("endpoints")),
            Flag("--mtu", int, "The largest inner packet of its tunnels, in bytes; 0 is 1420.", _plain("mtu")),
        ),
        {
            "endpoints": lambda value: joined(value.endpoints),
            "public key": lambda value: value.public_key,
            "mtu": lambda value: value.mtu or "",
            "version": lambda value: value.version,
        },
    ),
    Spec(
        "zone",
        "zone",
        "zones",
        zone_service_pb2,
        zone_service_pb2_grpc.ZoneServiceStub,
        (
            Flag("--domain", str, "Such as corp.internal or 1.10.in-addr.arpa.", _plain("domain")),
            _VNET,
            Flag(
                "--record",
                list[str],
                "NAME TYPE VALUE, such as 'www A 10.1.0.2' or '@ TXT hello', several times.",
                _records,
            ),
            Flag("--forward-to", list[str], "A resolver that knows the domain, several times.", _list("forward_to")),
            _COMMENT,
        ),
        {
            "vnet": lambda value: value.virtual_network,
            "domain": lambda value: value.domain,
            "records": lambda value: len(value.records) or "",
            "forwarded to": lambda value: joined(value.forward_to),
            "comment": lambda value: value.comment,
        },
    ),
)
"""All kinds, in the order in which a new mesh needs them."""
