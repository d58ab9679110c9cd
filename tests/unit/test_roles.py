"""The table of who may call what over TCP, read from the protos and held against services/ROLES.md."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, MethodDescriptor

from falkirk.decide.callers import Role
from falkirk.runtime import access

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "services" / "ROLES.md"
TENANT_FIELDS = {"tenant", "tenant_id"}


def methods() -> list[MethodDescriptor]:
    """Every RPC of every proto."""
    found = []
    for proto in sorted((ROOT / "protos").rglob("*.proto")):
        module = ".".join(proto.relative_to(ROOT / "protos").with_suffix("").parts) + "_pb2"
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
            found += service.methods
    return sorted(found, key=lambda method: method.full_name)


METHODS = methods()


def path_of(method: MethodDescriptor) -> str:
    """As gRPC calls it."""
    return f"/{method.containing_service.full_name}/{method.name}"


def texts(message: Descriptor, before: str = "", depth: int = 4) -> Iterator[str]:
    """Paths of the texts in a message that are called as tenants are."""
    for field in message.fields:
        place = f"{before}{'*' if field.containing_oneof and before else field.name}"
        if field.message_type is None:
            if field.name in TENANT_FIELDS:
                yield f"{before}{field.name}"
        elif depth and not field.message_type.GetOptions().map_entry:
            yield from texts(field.message_type, f"{place}.", depth - 1)


@pytest.mark.parametrize("method", METHODS, ids=path_of)
def test_every_tenant_in_a_request_is_looked_at(method: MethodDescriptor) -> None:
    """A request that names a tenant anywhere says so in the option, or no caller who is bound to a tenant may send it."""
    rule = access.rule_of(method)
    assert rule is not None
    if not rule.tenant:
        return
    missing = set(texts(method.input_type)) - set(rule.tenant)
    assert missing == set()


@pytest.mark.parametrize("method", METHODS, ids=path_of)
def test_what_names_its_tenant_can_be_called_by_who_is_bound_to_one(method: MethodDescriptor) -> None:
    """Without the option nobody who is bound to the tenant could send it. Tenants themselves, and nodes, are the mesh's to write."""
    rule = access.rule_of(method)
    assert rule is not None
    if method.containing_service.name in ("TenantService", "NodeService"):
        return
    if rule.roles - {Role.NODE} and Role.ANYONE not in rule.roles and list(texts(method.input_type)):
        assert rule.tenant, f'{path_of(method)} needs `option (falkirk.api.net.v1.tenant) = "…";`'


@pytest.mark.parametrize("method", METHODS, ids=path_of)
def test_paths_lead_to_texts(method: MethodDescriptor) -> None:
    rule = access.rule_of(method)
    assert rule is not None
    for path in rule.tenant:
        messages = [method.input_type]
        *steps, last = path.split(".")
        for step in steps:
            fields = [
                field
                for message in messages
                for field in (message.oneofs[0].fields if step == "*" else [message.fields_by_name[step]])
            ]
            messages = [field.message_type for field in fields if field.message_type is not None]
        assert {message.fields_by_name[last].type for message in messages} == {9}, path  # TYPE_STRING


def test_a_method_that_nobody_knows_has_no_rule() -> None:
    assert access.rule("/falkirk.api.registry.v1.DeviceService/Steal") is None
    assert access.rule("/nobody.Service/Get") is None
    assert access.rule("nonsense") is None


def reference() -> str:
    """The table of services/ROLES.md."""
    lines = ["", "", "| RPC | Roles | Of a caller's own tenant |", "|---|---|---|"]
    for method in METHODS:
        rule = access.rule_of(method)
        assert rule is not None
        roles = ", ".join(role for role in Role if role in rule.roles)
        tenant = ", ".join(f"`{path}`" for path in rule.tenant) or "no"
        lines.append(f"| `{method.full_name.removeprefix('falkirk.api.')}` | {roles} | {tenant} |")
    return "\n".join(lines) + "\n"


def test_the_reference_is_what_the_protos_say() -> None:
    """Where it differs: `PYTHONPATH=services:. python tests/unit/test_roles.py`."""
    head, _, table = REFERENCE.read_text().partition("\n\n| RPC")
    assert f"\n\n| RPC{table}" == reference()
    assert head.startswith("# Roles")


if __name__ == "__main__":
    REFERENCE.write_text(REFERENCE.read_text().partition("\n\n| RPC")[0] + reference())
