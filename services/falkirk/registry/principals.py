"""Who may hold certificates, and the tokens with which they log in. Works inside transactions of the store; times are nanoseconds of wall clock.

A token is `fk-login-<secret>-<fingerprint of the signing root>`: the fingerprint lets whoever has only the token know the mesh before the secret is sent. The
store has the SHA-256 of the secret; it is 256 bits of randomness, so nothing slower is needed. A token is good once.

An owner is a user of the registry: its name is the user's of the moment, and a user that is disabled or gone can't log in or renew. Who signs in by OIDC is a user too, with the role that the issuer's groups give at that moment, and gets no certificate without
another sign-in: to revoke such a principal ends what it holds, to keep the person out the user is disabled.
"""

from __future__ import annotations

import base64
import hashlib
import sqlite3
from typing import Any, Final

from falkirk.api.net.v1 import access_pb2
from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.decide.callers import NAME, Caller, Role
from falkirk.registry import engine
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.refusal import Reason, Refused

PREFIX: Final = "fk-login-"
_COLUMNS: Final = "id, tenant_id, name, role, user_id, create_ns, login_ns, revoke_ns, signed_in"
_BOUND: Final = frozenset({Role.OWNER, Role.CONNECTOR})
"""Roles that need a tenant."""


def token(secret: bytes, fingerprint: str) -> str:
    """What is shown to whoever shall log in."""
    return f"{PREFIX}{text(secret)}-{fingerprint}"


def text(secret: bytes) -> str:
    """A secret as it is sent."""
    return base64.b32encode(secret).decode().rstrip("=").lower()


def ever(connection: sqlite3.Connection) -> bool:
    """Whether there has been a principal."""
    return connection.execute("SELECT 1 FROM principal LIMIT 1").fetchone() is not None


def make(
    connection: sqlite3.Connection, new_id: str, tenant_id: str, name: str, role: Role, now_ns: int
) -> pb.Principal:
    """Make one, or find the one with this name and role. Raises Refused."""
    if role in (Role.NODE, Role.ANYONE):
        raise Refused(Reason.INVALID_FIELD, f"role: a {role} doesn't log in", field="role")
    if not NAME.match(name):
        raise Refused(Reason.INVALID_FIELD, "name: must have 1 to 64 letters, digits and ._@+-", field="name")
    if role in _BOUND and not tenant_id:
        raise Refused(Reason.INVALID_FIELD, f"tenant: a {role} is of a tenant", field="tenant")
    found = _current(connection, tenant_id, name)
    if found is not None:
        if found.role != number(role):
            said = access_pb2.Role.Name(found.role).removeprefix("ROLE_").lower()
            raise Refused(
                Reason.NAME_TAKEN, f"{name} is {said} already: revoke that first", kind="principal", name=name
            )
        return found
    user_id = _user(connection, tenant_id, name).metadata.id if role is Role.OWNER else ""
    connection.execute(
        "INSERT INTO principal (id, tenant_id, name, role, user_id, create_ns) VALUES (?, ?, ?, ?, ?, ?)",
        (new_id, tenant_id, name, role, user_id, now_ns),
    )
    made = _current(connection, tenant_id, name)
    assert made is not None
    return made


def admit(connection: sqlite3.Connection, secret: str, now_ns: int) -> Caller:
    """Use a token up: whom it logs in. Raises Refused, the same for every reason."""
    digest = _digest(secret)
    row = connection.execute("SELECT principal, end_ns FROM login WHERE digest = ?", (digest,)).fetchone()
    connection.execute("DELETE FROM login WHERE digest = ? OR end_ns <= ?", (digest, now_ns))
    if row is None or row[1] <= now_ns:
        raise Refused(Reason.LOGIN_REFUSED, "the login token is unknown, used up or expired")
    return renew(connection, row[0], now_ns)


def offer(connection: sqlite3.Connection, principal: str, secret: bytes, end_ns: int) -> None:
    """Keep a token's digest."""
    connection.execute(
        "INSERT INTO login (digest, principal, end_ns) VALUES (?, ?, ?)", (_digest(text(secret)), principal, end_ns)
    )


def renew(connection: sqlite3.Connection, key: str, now_ns: int) -> Caller:
    """Whom the next certificate of a principal names; noted as its login. Raises Refused."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM principal WHERE id = ?", (key,)).fetchone()
    if row is None or row[7] is not None:
        raise Refused(Reason.LOGIN_REFUSED, "whom it is for may no longer log in")
    if row[8]:
        raise Refused(Reason.LOGIN_REFUSED, "this login was by an issuer's token: sign in again for the next one")
    return _login(connection, row, now_ns)


def sign_in(connection: sqlite3.Connection, new_id: str, user: User, role: Role, now_ns: int) -> Caller:
    """Whom an OIDC sign-in logs in, made or brought up to date. Raises Refused where the name is somebody else's."""
    where = "FROM principal WHERE tenant_id = ? AND user_id = ? AND revoke_ns IS NULL"
    values = (user.metadata.tenant_id, user.metadata.id)
    connection.execute(
        "UPDATE principal SET role = ?, signed_in = 1 WHERE tenant_id = ? AND user_id = ? AND revoke_ns IS NULL",
        (role, *values),
    )
    row = connection.execute(f"SELECT {_COLUMNS} {where}", values).fetchone()
    if row is None:
        if _current(connection, user.metadata.tenant_id, user.metadata.name) is not None:
            raise Refused(
                Reason.NAME_TAKEN,
                f"{user.metadata.name} is somebody who logs in by tokens: revoke that first",
                kind="principal",
                name=user.metadata.name,
            )
        connection.execute(
            "INSERT INTO principal (id, tenant_id, name, role, user_id, create_ns, signed_in) VALUES (?, ?, ?, ?, ?, ?, 1)",
            (new_id, user.metadata.tenant_id, user.metadata.name, role, user.metadata.id, now_ns),
        )
        row = connection.execute(f"SELECT {_COLUMNS} {where}", values).fetchone()
    return _login(connection, row, now_ns)


def _login(connection: sqlite3.Connection, row: Any, now_ns: int) -> Caller:
    key, tenant_id, name, role, user_id = row[:5]
    tenant = _tenant_name(connection, tenant_id)
    if tenant_id and not tenant:
        raise Refused(Reason.LOGIN_REFUSED, "the tenant is gone")
    if user_id:
        user = engine.by_id(connection, BY_NAME["user"], user_id)
        if not isinstance(user, User) or user.disabled:
            raise Refused(Reason.LOGIN_REFUSED, "whom it is for may no longer log in")
        name = user.metadata.name
    connection.execute("UPDATE principal SET login_ns = ? WHERE id = ?", (now_ns, key))
    return Caller("", Role(role), key, name, tenant_id, tenant)


def get(connection: sqlite3.Connection, key: str) -> pb.Principal:
    """One that is there."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM principal WHERE id = ?", (key,)).fetchone()
    return _principal(connection, row)


def every(connection: sqlite3.Connection, tenant_id: str) -> list[pb.Principal]:
    """Those of a tenant; with "" all."""
    where, values = ("WHERE tenant_id = ?", (tenant_id,)) if tenant_id else ("", ())
    rows = connection.execute(f"SELECT {_COLUMNS} FROM principal {where} ORDER BY create_ns", values).fetchall()
    found = [_principal(connection, row) for row in rows]
    return sorted(found, key=lambda one: (one.tenant, one.name))


def revoke(connection: sqlite3.Connection, tenant_id: str, given: str, now_ns: int) -> pb.Principal:
    """Take one's access away, found by name or id. Raises Refused."""
    row = connection.execute(
        "SELECT id FROM principal WHERE tenant_id = ? AND (name = ? OR id = ?) AND revoke_ns IS NULL",
        (tenant_id, given, given),
    ).fetchone()
    if row is None:
        raise Refused(Reason.NOT_FOUND, f"there is no principal called {given!r}", kind="principal", name=given)
    connection.execute("UPDATE principal SET revoke_ns = ? WHERE id = ?", (now_ns, row[0]))
    connection.execute("DELETE FROM login WHERE principal = ?", row)
    return get(connection, row[0])


def number(role: Role) -> access_pb2.Role:
    """As protos have it."""
    return access_pb2.Role.Value(f"ROLE_{role.upper()}")  # type: ignore[return-value]  # an enum's number


def _current(connection: sqlite3.Connection, tenant_id: str, name: str) -> pb.Principal | None:
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM principal WHERE tenant_id = ? AND name = ? AND revoke_ns IS NULL", (tenant_id, name)
    ).fetchone()
    return None if row is None else _principal(connection, row)


def _principal(connection: sqlite3.Connection, row: Any) -> pb.Principal:
    key, tenant_id, name, role, _, create_ns, login_ns, revoke_ns, _ = row
    found = pb.Principal(id=key, name=name, role=number(Role(role)), tenant_id=tenant_id)
    found.tenant = _tenant_name(connection, tenant_id)
    found.create_time.FromNanoseconds(create_ns)
    if login_ns is not None:
        found.login_time.FromNanoseconds(login_ns)
    if revoke_ns is not None:
        found.revoke_time.FromNanoseconds(revoke_ns)
    return found


def _tenant_name(connection: sqlite3.Connection, tenant_id: str) -> str:
    row = connection.execute("SELECT name FROM resource WHERE id = ?", (tenant_id,)).fetchone() if tenant_id else None
    return row[0] if row is not None else ""


def _user(connection: sqlite3.Connection, tenant_id: str, name: str) -> Any:
    tenant = _tenant_name(connection, tenant_id)
    found = engine.find(connection, BY_NAME["user"], tenant, name)
    if found is None:
        raise engine.not_found(BY_NAME["user"], name, tenant)
    return found


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
