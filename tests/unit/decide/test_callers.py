"""Who calls over TCP, and whether they may: tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from falkirk.decide.callers import Caller, NotAnIdentity, Role, Rule, admit, in_tenant, parse

MESH = "0123456789abcdef" * 2
NOW = 1_000_000.0
ALICE = Caller(MESH, Role.ADMINISTRATOR, "id-a", "alice", begin=NOW - 60, end=NOW + 60)
BOB = Caller(MESH, Role.ADMINISTRATOR, "id-b", "bob", "t-1", "acme", begin=NOW - 60, end=NOW + 60)
ADMIN = Rule(frozenset({Role.ADMINISTRATOR}))
SCOPED = Rule(frozenset({Role.ADMINISTRATOR}), ("tenant",))
OPEN = Rule(frozenset({Role.ADMINISTRATOR, Role.ANYONE}))


@pytest.mark.parametrize("caller", [ALICE, BOB])
def test_an_identity_survives_its_uri(caller: Caller) -> None:
    assert parse(caller.uri, caller.begin, caller.end) == caller


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://example.com/",
        f"falkirk://{MESH}/administrator/id",
        f"falkirk://{MESH}/administrator/id/alice/t-1",
        f"falkirk://{MESH}/administrator/id/alice/t-1/acme/more",
        f"falkirk://{MESH}/administrator//alice",
        f"falkirk://{MESH}/administrator/id/al ice",
        f"falkirk://{MESH}/administrator/id/alice\n",
        f"falkirk://{MESH}/administrator/id/{'a' * 65}",
        f"falkirk://{MESH[:-1]}/administrator/id/alice",
        f"falkirk://{MESH.upper()}/administrator/id/alice",
        f"falkirk://{MESH}/emperor/id/alice",
        f"falkirk://{MESH}/anyone/id/alice",
    ],
)
def test_what_is_no_identity(uri: str) -> None:
    with pytest.raises(NotAnIdentity):
        parse(uri, 0.0, 1.0)


def other(caller: Caller, **changes: Any) -> Caller:
    """The caller with some fields changed."""
    return replace(caller, **changes)


@pytest.mark.parametrize(
    ("rule", "caller", "reason", "unauthenticated"),
    [
        (ADMIN, ALICE, None, False),
        (SCOPED, BOB, None, False),
        (OPEN, None, None, False),
        (OPEN, other(ALICE, role=Role.CONNECTOR), None, False),
        (ADMIN, None, "CERTIFICATE_NEEDED", True),
        (None, None, "CERTIFICATE_NEEDED", True),
        (ADMIN, other(ALICE, mesh="f" * 32), "CERTIFICATE_FOREIGN", True),
        (ADMIN, other(ALICE, end=NOW), "CERTIFICATE_EXPIRED", True),
        (OPEN, other(ALICE, end=NOW), "CERTIFICATE_EXPIRED", True),
        (ADMIN, other(ALICE, begin=NOW + 1), "CERTIFICATE_NOT_YET_VALID", True),
        (ADMIN, other(ALICE, id="id-gone"), "CERTIFICATE_REVOKED", True),
        (None, ALICE, "ROLE_FORBIDDEN", False),
        (ADMIN, other(ALICE, role=Role.AUDITOR), "ROLE_FORBIDDEN", False),
        (SCOPED, other(BOB, role=Role.OWNER), "ROLE_FORBIDDEN", False),
        (ADMIN, BOB, "TENANT_FORBIDDEN", False),
    ],
)
def test_admission(rule: Rule | None, caller: Caller | None, reason: str | None, unauthenticated: bool) -> None:
    refusal = admit(rule, caller, MESH, NOW, {"id-gone"})
    assert (refusal.reason if refusal else None) == reason
    assert (refusal is not None and refusal.unauthenticated) == unauthenticated


@pytest.mark.parametrize(
    ("caller", "first", "others", "allowed"),
    [
        (ALICE, ["acme"], [], True),
        (ALICE, [], [], True),
        (None, ["acme"], [], True),
        (BOB, ["acme"], [], True),
        (BOB, ["t-1"], ["acme", ""], True),
        (BOB, ["acme", "acme"], ["t-1"], True),
        (BOB, [], [], False),
        (BOB, [""], [], False),
        (BOB, [""], ["t-1"], False),
        (BOB, ["other"], [], False),
        (BOB, ["acme", "other"], [], False),
        (BOB, ["acme", ""], [], False),
        (BOB, ["acme"], ["t-2"], False),
    ],
)
def test_tenants(caller: Caller | None, first: list[str], others: list[str], allowed: bool) -> None:
    refusal = in_tenant(caller, first, others)
    assert (refusal is None) == allowed
    assert refusal is None or refusal.reason == "TENANT_FORBIDDEN"
