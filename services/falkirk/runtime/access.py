"""The table of who may call what, read from the protos: `(falkirk.api.net.v1.access)` and its two companions.

There is no other table. A method's access gives the roads (`falkirk.runtime.roads`) and, over TCP, the roles of `ROLES`; the options `also` and
`tenant` add roles and say where a request names its tenant. `services/ROLES.md` shows the outcome, and a test holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from falkirk.api.net.v1 import access_pb2
from falkirk.decide.callers import Role, Rule

ROLES: Final[Mapping[int, frozenset[Role]]] = {
    access_pb2.ACCESS_READ: frozenset({Role.ADMINISTRATOR, Role.AUDITOR, Role.NODE}),
    access_pb2.ACCESS_MESH: frozenset({Role.NODE}),
    access_pb2.ACCESS_ADMIN: frozenset({Role.ADMINISTRATOR}),
}
"""Which roles travel which road."""
OPEN: Final = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1alpha.ServerReflection/",
    "/grpc.reflection.v1.ServerReflection/",
)
"""Not of ours and without options: read by whoever may read, in whatever tenant."""
ANY_TENANT: Final = ("*",)
"""In place of paths: what is asked belongs to no tenant and shows nothing of any."""
_READERS: Final = Rule(frozenset(Role) - {Role.ANYONE}, ANY_TENANT)


def role(number: int) -> Role:
    """Of falkirk.api.net.v1.Role. ValueError for one that isn't said."""
    return Role(access_pb2.Role.Name(number).removeprefix("ROLE_").lower())


def method(path: str) -> MethodDescriptor | None:
    """The method of "/package.Service/Method"; None where there is none."""
    service, _, name = path.removeprefix("/").partition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
    except KeyError:
        return None


@cache
def rule(path: str) -> Rule | None:
    """Who may call a method over TCP; None: nobody."""
    if path.startswith(OPEN):
        return _READERS
    found = method(path)
    return None if found is None else rule_of(found)


def rule_of(found: MethodDescriptor) -> Rule | None:
    """The rule that a method's options make; None where it declares no access."""
    options: Any = found.GetOptions()
    extensions = options.Extensions
    roles = ROLES.get(extensions[access_pb2.access])
    if roles is None:
        return None
    return Rule(roles | {role(number) for number in extensions[access_pb2.also]}, tuple(extensions[access_pb2.tenant]))


def tenants(request: Any, paths: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """What a request says of its tenant: by the first path, and by the others. `paths` isn't empty."""
    return list(_values(request, paths[0].split("."))), [
        value for path in paths[1:] for value in _values(request, path.split("."))
    ]


def _values(message: Message, path: list[str]) -> Iterator[str]:
    """The texts at a path. A message that isn't set has none."""
    name, *rest = path
    if name == "*":
        (oneof,) = message.DESCRIPTOR.oneofs
        chosen = message.WhichOneof(oneof.name)
        if chosen is None:
            yield ""
        else:
            yield from _values(getattr(message, chosen), rest)
        return
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    if not rest:
        yield str(value)
    elif field.is_repeated:
        for item in value:
            yield from _values(item, rest)
    elif message.HasField(name):
        yield from _values(value, rest)
