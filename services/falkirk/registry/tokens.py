"""Enrolment tokens in the store: only the SHA-256 of each secret, its message, and whom it is for by id.

They lie beside the resources, not among them: no watch carries them and no replica holds them. A secret has 256 random bits, so its plain
hash tells nothing and needs no salt, and looking it up by the hash leaks nothing of use by time.
Limits: 1,000 tokens a tenant; a token that has ended or was used up is kept for 30 days, then forgotten when the next one is made.
"""

from __future__ import annotations

import base64
import sqlite3
from hashlib import sha256

from google.protobuf.timestamp_pb2 import Timestamp

from falkirk.api.registry.v1.device_token_service_pb2 import DeviceToken
from falkirk.registry import engine, fields
from falkirk.registry.engine import Engine
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.refusal import Reason, Refused

PREFIX = "fkt_"
"""What every secret begins with, so that a leaked one is found by who looks for such."""
MOST = 1000
"""Tokens of one tenant."""
ONE_TIME_S = 3600
"""How long a one-time token lasts where nothing is said."""
REUSABLE_S = 86400
"""How long a reusable token lasts where nothing is said."""
LONGEST_S = 366 * 86400
"""How long any token may last."""
LONGEST_DEVICE_S = 10 * 366 * 86400
"""The longest lifetime of a device that a token may give."""
_KEPT_NS = 30 * 86400 * 1_000_000_000
_NS = 1_000_000_000


def create(work: Engine, token: DeviceToken) -> tuple[DeviceToken, str]:
    """Make one: the token as kept, and its secret. Raises `Refused`."""
    for name in ("id", "tenant_id", "uses"):
        fields.empty(getattr(token, name), name)
    for name in ("create_time", "last_use_time"):
        fields.empty(token.HasField(name), name)
    tenant, user_id = _owner(work.connection, token)
    token.groups[:] = fields.words(token.groups, "groups")
    fields.pairs(token.tags, "tags")
    fields.text(token.comment, "comment")
    fields.at_most(token.device_lifetime_s, "device_lifetime_s", LONGEST_DEVICE_S)
    now = work.surroundings.now_ns()
    _judge_end(token, now)
    token.id, token.tenant_id, token.tenant = work.surroundings.new_id(), *tenant
    token.create_time.FromNanoseconds(now)
    work.connection.execute(
        "DELETE FROM enrolment_token WHERE tenant_id = ? AND ended_ns < ?", (token.tenant_id, now - _KEPT_NS)
    )
    (count,) = work.connection.execute(
        "SELECT count(*) FROM enrolment_token WHERE tenant_id = ?", (token.tenant_id,)
    ).fetchone()
    if count >= MOST:
        raise Refused(Reason.TOO_MANY_TOKENS, f"tenant {token.tenant} has {count} enrolment tokens; revoke some first")
    secret = PREFIX + base64.urlsafe_b64encode(work.surroundings.random(32)).decode().rstrip("=")
    work.connection.execute(
        "INSERT INTO enrolment_token (id, hash, tenant_id, user_id, ended_ns, body) VALUES (?, ?, ?, ?, ?, ?)",
        (
            token.id,
            digest(secret),
            token.tenant_id,
            user_id,
            token.expire_time.ToNanoseconds(),
            token.SerializeToString(),
        ),
    )
    return token, secret


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return sha256(secret.encode()).digest()


def by_secret(connection: sqlite3.Connection, secret: str) -> DeviceToken | None:
    """The token of a secret."""
    row = connection.execute(
        "SELECT tenant_id, user_id, body FROM enrolment_token WHERE hash = ?", (digest(secret),)
    ).fetchone()
    return _read(connection, *row) if row else None


def of_tenant(connection: sqlite3.Connection, tenant_id: str) -> list[DeviceToken]:
    """All of a tenant, the newest first."""
    rows = connection.execute(
        "SELECT tenant_id, user_id, body FROM enrolment_token WHERE tenant_id = ?", (tenant_id,)
    ).fetchall()
    found = [_read(connection, *row) for row in rows]
    return sorted(found, key=lambda token: token.create_time.ToNanoseconds(), reverse=True)


def revoke(work: Engine, tenant_id: str, given: str) -> DeviceToken:
    """Remove one, given by its id or an unambiguous start of that. Raises `Refused`."""
    found = [token for token in of_tenant(work.connection, tenant_id) if given and token.id.startswith(given)]
    if not found:
        raise Refused(Reason.NOT_FOUND, f"the tenant has no enrolment token whose id begins with {given!r}", field="id")
    if len(found) > 1:
        raise Refused(
            Reason.INVALID_FIELD, f"id: {len(found)} enrolment tokens begin with {given!r}; say more", field="id"
        )
    work.connection.execute("DELETE FROM enrolment_token WHERE id = ?", (found[0].id,))
    return found[0]


def used(work: Engine, token: DeviceToken, device_id: str) -> None:
    """Note that a device has enrolled by it; a one-time token has ended by that."""
    now = work.surroundings.now_ns()
    token.uses += 1
    token.last_use_time.FromNanoseconds(now)
    ended = token.expire_time.ToNanoseconds() if token.reusable else now
    work.connection.execute(
        "UPDATE enrolment_token SET body = ?, ended_ns = ? WHERE id = ?", (token.SerializeToString(), ended, token.id)
    )
    work.connection.execute(
        "INSERT OR REPLACE INTO enrolled (device_id, token_id) VALUES (?, ?)", (device_id, token.id)
    )


def enrolled_by(connection: sqlite3.Connection, device_id: str) -> str:
    """The id of the token that a device has enrolled by; empty where there was none."""
    row = connection.execute("SELECT token_id FROM enrolled WHERE device_id = ?", (device_id,)).fetchone()
    return str(row[0]) if row else ""


def check_usable(token: DeviceToken | None, now_ns: int) -> DeviceToken:
    """The token, where it hasn't ended; whether it is used up comes after the look for an answer that was lost. Raises `Refused`."""
    if token is None:
        raise Refused(Reason.TOKEN_UNKNOWN, "the enrolment token isn't known: mistyped, or revoked")
    if token.expire_time.ToNanoseconds() <= now_ns:
        raise Refused(
            Reason.TOKEN_EXPIRED, f"the enrolment token ended at {token.expire_time.ToJsonString()}; ask for another"
        )
    return token


def _owner(connection: sqlite3.Connection, token: DeviceToken) -> tuple[tuple[str, str], str]:
    """((tenant's id, name), user's id or empty); names what the request gave by id."""
    if not token.tenant:
        raise Refused(Reason.INVALID_FIELD, "tenant: a token lets devices into a tenant", field="tenant")
    tenant = engine.find(connection, BY_NAME["tenant"], "", token.tenant)
    if tenant is None:
        raise engine.not_found(BY_NAME["tenant"], token.tenant)
    if not token.user:
        return (tenant.metadata.id, tenant.metadata.name), ""
    user = engine.find(connection, BY_NAME["user"], tenant.metadata.name, token.user)
    if user is None:
        raise engine.not_found(BY_NAME["user"], token.user, tenant.metadata.name)
    token.user = user.metadata.name
    return (tenant.metadata.id, tenant.metadata.name), user.metadata.id


def _judge_end(token: DeviceToken, now_ns: int) -> None:
    if not token.HasField("expire_time"):
        seconds = REUSABLE_S if token.reusable else ONE_TIME_S
        token.expire_time.FromNanoseconds(now_ns + seconds * _NS)
    ahead = fields.instant(token.expire_time.seconds, token.expire_time.nanos, "expire_time") - now_ns
    if not 0 < ahead <= LONGEST_S * _NS:
        raise Refused(Reason.INVALID_FIELD, "expire_time: must lie ahead, by at most 366 days", field="expire_time")


def _read(connection: sqlite3.Connection, tenant_id: str, user_id: str, body: bytes) -> DeviceToken:
    """A stored token, names as they are now."""
    token = DeviceToken.FromString(body)
    for field, kind, key in (("tenant", "tenant", tenant_id), ("user", "user", user_id)):
        if key:
            named = engine.by_id(connection, BY_NAME[kind], key)
            setattr(token, field, named.metadata.name if named else "")
    return token


def instant(now_ns: int, seconds: int) -> Timestamp:
    """A time so many seconds ahead."""
    found = Timestamp()
    found.FromNanoseconds(now_ns + seconds * _NS)
    return found
