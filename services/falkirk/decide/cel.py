"""The language of rules: CEL over what is known of a flow before its first packet leaves. PURE.

    identity.tenant            string                the tenant's name at the tunnel's admission
    identity.user              string                the device owner's name; "" for a device without one
    identity.groups            list(string)          groups of the owner and of the device
    device.name                string
    device.groups              list(string)          the same list as identity.groups
    device.posture             map(string, string)   facts that the device reported
    device.addresses           list(string)          addresses that the tunnel may speak from
    net.dst                    string                the destination address, RFC 5952 text
    net.port                   int                   the destination port; 0 where the protocol has none
    net.protocol               string                "tcp", "udp", "icmp" (either family's) or "other"
    net.protocol_number        int                   IANA number
    net.family                 int                   4 or 6
    net.dst_device             string                the name of the device that the destination leads to; "" where it isn't one
    net.dst_user               string                that device's owner's name; "" for a device without one
    net.dst_groups             list(string)          groups of that owner and of that device
    vnet.name                  string                the virtual network's name
    app.attributes             map(string, string)   what the tunnel's producer said about it
    app.dns_name               string                the name that the tenant's resolver is asked for, in lower case, no last dot; "" for a flow
    app.dns_type               string                the type that it is asked for ("A", "SRV"); "" for a flow
    net.dst.inCidr("10.0.0.0/8"), inCidr(address, prefix)    true where the address lies in the prefix (IPv4 and IPv6)

Rules are asked once for a flow, and again for each question that the tenant's resolver gets in it; only then the two of DNS aren't empty.
There is no source port and no time, and a destination's device follows from its route, so a verdict holds for (tunnel, destination, port,
protocol) until rules or routes change, and may be memoised.
Each name is its own typed CEL variable: a misspelt one is a compile error, and has() is for map keys only. An evaluation ends in true, false or an
error (a missing map key, a malformed address); what an error means is said in `falkirk.decide.rules`.

Limits: 4096 characters and 32 levels an expression; 10,000 comprehension steps an evaluation (then an error).
"""

from __future__ import annotations

import functools
import ipaddress
import re
from typing import Any, Final

import msgspec
from cel_expr_python import cel

from falkirk.decide.checked import Checked, UnreadableExpression, parse
from falkirk.decide.destination import NO_DEVICE, DestinationDevice
from falkirk.decide.resolver import NO_QUERY, Query
from falkirk.wire.context import TunnelContext

MAX_EXPRESSION: Final = 4096
"""Characters."""

_STRINGS: Final = cel.Type.List(cel.Type.STRING)
_MAP: Final = cel.Type.Map(cel.Type.STRING, cel.Type.STRING)
VARIABLES: Final[dict[str, cel.Type]] = {
    "identity.tenant": cel.Type.STRING,
    "identity.user": cel.Type.STRING,
    "identity.groups": _STRINGS,
    "device.name": cel.Type.STRING,
    "device.groups": _STRINGS,
    "device.posture": _MAP,
    "device.addresses": _STRINGS,
    "net.dst": cel.Type.STRING,
    "net.port": cel.Type.INT,
    "net.protocol": cel.Type.STRING,
    "net.protocol_number": cel.Type.INT,
    "net.family": cel.Type.INT,
    "net.dst_device": cel.Type.STRING,
    "net.dst_user": cel.Type.STRING,
    "net.dst_groups": _STRINGS,
    "vnet.name": cel.Type.STRING,
    "app.attributes": _MAP,
    "app.dns_name": cel.Type.STRING,
    "app.dns_type": cel.Type.STRING,
}

PROTOCOL_NAMES: Final = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp"}
"""IANA number -> `net.protocol`; any other is "other"."""

_DIAGNOSTIC: Final = re.compile(r"^(?:[A-Z_]+: )?ERROR: <input>:(\d+):(\d+): (.*)$", re.MULTILINE)


Activation = cel.Activation
"""The variables of one question, as the library holds them."""


class Diagnostic(msgspec.Struct, frozen=True):
    """What is wrong in an expression; line and column count from 1, columns in code points."""

    line: int
    column: int
    message: str


class InvalidExpression(ValueError):
    """An expression that doesn't compile."""

    def __init__(self, diagnostics: list[Diagnostic]) -> None:
        super().__init__("; ".join(f"{d.line}:{d.column}: {d.message}" for d in diagnostics))
        self.diagnostics = diagnostics


class Compiled(msgspec.Struct, frozen=True):
    """An expression that compiled to bool."""

    serialized: bytes
    checked: Checked


@functools.lru_cache(4096)
def _address(text: str) -> tuple[int, int]:
    address = ipaddress.ip_address(text)
    return address.version, int(address)


@functools.lru_cache(16384)
def _network(text: str) -> tuple[int, int, int]:
    network = ipaddress.ip_network(text)
    return network.version, int(network.netmask), int(network.network_address)


def _in_cidr(address: str, prefix: str) -> bool:
    """The CEL function; a ValueError becomes an evaluation error."""
    version, value = _address(address)
    network_version, mask, network = _network(prefix)
    return version == network_version and value & mask == network


def _environment() -> cel.Env:
    parameters = [cel.Type.STRING, cel.Type.STRING]
    overloads = [
        cel.Overload("string_in_cidr", cel.Type.BOOL, parameters, is_member=True, impl=_in_cidr),
        cel.Overload("in_cidr_string", cel.Type.BOOL, parameters, is_member=False, impl=_in_cidr),
    ]
    return cel.NewEnv(variables=VARIABLES, functions=[cel.FunctionDecl("inCidr", overloads)])


_ENVIRONMENT: Final = _environment()


def compile_expression(source: str) -> Compiled:
    """Parses, checks and serialises one expression. Raises InvalidExpression."""
    if len(source) > MAX_EXPRESSION:
        message = f"the expression has {len(source)} characters; the most is {MAX_EXPRESSION}"
        raise InvalidExpression([Diagnostic(1, 1, message)])
    try:
        expression = _ENVIRONMENT.compile(source)
    except RuntimeError as error:  # what the library raises for syntax, types and limits alike
        raise InvalidExpression(_diagnostics(str(error))) from error
    if expression.return_type() != cel.Type.BOOL:
        message = f"a rule must be bool, this is {expression.return_type().name().lower()}"
        raise InvalidExpression([Diagnostic(1, 1, message)])
    serialized: bytes = expression.serialize()
    try:
        checked = parse(serialized)
    except UnreadableExpression as error:
        raise InvalidExpression([Diagnostic(1, 1, str(error))]) from error
    return Compiled(serialized, checked)


def position(source: str, checked: Checked, node: int, message: str) -> Diagnostic:
    """A diagnostic at a node."""
    before = source[: checked.offsets.get(node, 0)]
    return Diagnostic(before.count("\n") + 1, len(before) - before.rfind("\n"), message)


def _diagnostics(text: str) -> list[Diagnostic]:
    found = [Diagnostic(int(line), int(column), message) for line, column, message in _DIAGNOSTIC.findall(text)]
    return found or [Diagnostic(1, 1, text.split("\n", 1)[0])]


class Expression:
    """A compiled expression, ready to evaluate. About 7 kB; the first evaluation plans it (30 us), later ones cost 2 us."""

    __slots__ = ("_expression",)

    def __init__(self, serialized: bytes) -> None:
        """Raises ValueError where the bytes aren't an expression."""
        try:
            self._expression = _ENVIRONMENT.deserialize(serialized)
        except RuntimeError as error:
            raise ValueError(f"not a serialised expression: {error}") from error

    def evaluate(self, activation: cel.Activation) -> bool | str:
        """True, False, or the text of an error."""
        try:
            value: Any = self._expression.eval(activation).value()
        except RuntimeError as error:  # limits: "INTERNAL: Iteration budget exceeded"
            return str(error)
        if value is True or value is False:
            return bool(value)
        return str(value)


def activation(
    context: TunnelContext,
    destination: bytes,
    port: int,
    protocol: int,
    device: DestinationDevice = NO_DEVICE,
    query: Query = NO_QUERY,
) -> cel.Activation:
    """The variables of one question; `protocol` is the IANA number, `destination` packed."""
    groups = list(context.groups)
    return _ENVIRONMENT.Activation(
        {
            "identity.tenant": context.tenant,
            "identity.user": context.user,
            "identity.groups": groups,
            "device.name": context.device,
            "device.groups": groups,
            "device.posture": context.posture,
            "device.addresses": [address_text(address) for address in context.addresses],
            "net.dst": address_text(destination),
            "net.port": port,
            "net.protocol": PROTOCOL_NAMES.get(protocol, "other"),
            "net.protocol_number": protocol,
            "net.family": 4 if len(destination) == 4 else 6,
            "net.dst_device": device.device,
            "net.dst_user": device.user,
            "net.dst_groups": list(device.groups),
            "vnet.name": context.virtual_network,
            "app.attributes": context.attributes,
            "app.dns_name": query.name,
            "app.dns_type": query.type,
        }
    )


def address_text(address: bytes) -> str:
    """RFC 5952 text of a packed address (4 or 16 bytes)."""
    if len(address) == 4:
        return f"{address[0]}.{address[1]}.{address[2]}.{address[3]}"
    return str(ipaddress.IPv6Address(address))
