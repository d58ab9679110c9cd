"""Who calls over TCP, and whether they may. PURE.

A caller is what its certificate says: one URI, `falkirk://<mesh>/<role>/<id>/<name>`, and `/<tenant id>/<tenant>` behind it where it is bound to a
tenant. TLS has verified that the mesh's authority signed it and that the peer has its key; all else is judged here, at each call, so that a
connection doesn't outlive its certificate:

    certificate? ─► of this mesh, its time, not revoked? ─► role in the method's rule? ─► the request's tenant is the caller's?

The rule of a method follows from its proto (`falkirk.runtime.access`): roads give the roles, two options add to them. Default deny: a method without
a rule, a role that isn't named, and a request whose tenant isn't said are refused.

Limit: a tenant is known by the name that it had when the certificate was made, besides its id; a name that changes hands within a certificate's
life of hours is the tenant's that had it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MESH: Final = re.compile(r"[0-9a-f]{32}\Z")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}\Z")
"""Of principals and nodes."""
_SCHEME: Final = "falkirk://"
_PART: Final = re.compile(r"[A-Za-z0-9._@+-]{1,64}\Z")


class Role(StrEnum):
    """What a caller is; falkirk.api.net.v1.Role without its prefix."""

    ADMINISTRATOR = "administrator"
    AUDITOR = "auditor"
    OWNER = "owner"
    NODE = "node"
    CONNECTOR = "connector"
    ANYONE = "anyone"
    """No certificate at all; a role of methods, never of callers."""


class NotAnIdentity(ValueError):
    """A certificate that names nobody of a mesh."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a certificate names."""

    mesh: str
    role: Role
    id: str
    """The principal's; a node's is its name."""
    name: str
    tenant_id: str = ""
    """Empty: bound to no tenant."""
    tenant: str = ""
    begin: float = 0.0
    """Seconds since 1970, wall clock: the certificate's notBefore."""
    end: float = 0.0
    """The same: its notAfter."""

    @property
    def uri(self) -> str:
        """The identity as certificates carry it."""
        bound = f"/{self.tenant_id}/{self.tenant}" if self.tenant_id else ""
        return f"{_SCHEME}{self.mesh}/{self.role}/{self.id}/{self.name}{bound}"

    def __str__(self) -> str:
        """For people and records: administrator alice, or owner bob of acme."""
        return f"{self.role} {self.name}" + (f" of {self.tenant}" if self.tenant else "")


def parse(uri: str, begin: float, end: float) -> Caller:
    """The caller of a certificate's URI and times. Raises NotAnIdentity."""
    parts = uri.removeprefix(_SCHEME).split("/") if uri.startswith(_SCHEME) else []
    if len(parts) not in (4, 6) or not MESH.match(parts[0]) or not all(_PART.match(part) for part in parts):
        raise NotAnIdentity("the certificate's URI is no identity of a mesh")
    try:
        role = Role(parts[1])
    except ValueError:
        raise NotAnIdentity("the certificate's role is unknown") from None
    if role is Role.ANYONE:
        raise NotAnIdentity("the certificate's role is unknown")
    mesh, _, key, name, tenant_id, tenant = (*parts, "", "")[:6]
    return Caller(mesh, role, key, name, tenant_id, tenant, begin, end)


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may call a method over TCP."""

    roles: frozenset[Role]
    tenant: tuple[str, ...] = ()
    """Paths in the request that name its tenant; none: only callers who are bound to no tenant."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not."""

    reason: str
    message: str
    unauthenticated: bool = False
    """Whether another certificate of the same caller might do."""


def admit(rule: Rule | None, caller: Caller | None, mesh: str, now: float, revoked: Collection[str]) -> Refusal | None:
    """Judge all but the request. `now` is wall-clock seconds since 1970, `revoked` ids of principals."""
    if caller is None:
        if rule is not None and Role.ANYONE in rule.roles:
            return None
        return Refusal("CERTIFICATE_NEEDED", "this call needs a client certificate of the mesh", unauthenticated=True)
    if caller.mesh != mesh:
        return Refusal("CERTIFICATE_FOREIGN", "the client certificate is of another mesh", unauthenticated=True)
    if now >= caller.end:
        return Refusal("CERTIFICATE_EXPIRED", "the client certificate has expired", unauthenticated=True)
    if now < caller.begin:
        return Refusal("CERTIFICATE_NOT_YET_VALID", "the client certificate isn't valid yet", unauthenticated=True)
    if caller.id in revoked:
        return Refusal("CERTIFICATE_REVOKED", f"{caller} was revoked", unauthenticated=True)
    if rule is None:
        return Refusal("ROLE_FORBIDDEN", "nobody may call this over TCP")
    if Role.ANYONE in rule.roles or caller.role in rule.roles:
        if caller.tenant_id and not rule.tenant and Role.ANYONE not in rule.roles:
            return Refusal("TENANT_FORBIDDEN", f"{caller} is bound to a tenant, and this call isn't")
        return None
    allowed = ", ".join(sorted(rule.roles)) or "nobody"
    return Refusal("ROLE_FORBIDDEN", f"{caller} may not call this; who may: {allowed}")


def in_tenant(caller: Caller | None, first: Iterable[str], others: Iterable[str]) -> Refusal | None:
    """Judge the tenants that a request names: by the rule's first path, each must be the caller's; by the others, none may be another's."""
    if caller is None or not caller.tenant_id:
        return None
    own = (caller.tenant, caller.tenant_id)
    named = list(first)
    if named and all(name in own for name in named) and all(name in own for name in others if name):
        return None
    said = "the request names no tenant" if not any(named) else "the request is about another tenant"
    return Refusal("TENANT_FORBIDDEN", f"{caller} is bound to tenant {caller.tenant}, and {said}")
