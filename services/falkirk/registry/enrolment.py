"""How a machine becomes a device of a tenant, and how a device speaks for itself afterwards.

Two authorities let one in: an enrolment token (`by_token`), whose maker has said what the device will be, and a person whom an OIDC issuer has
signed in (`by_person`): that user, made at the first sign-in, owns the device; an own device of the same name gets the new key, so a
machine that was set up anew keeps its name and its addresses.
After that the device's key is the authority (`proved`, see `falkirk.wireguard.proof`), whoever carries the message.

All of it runs inside a write of the engine: a device that was refused leaves nothing behind.
Limit: a posture is the device's own word; rules that lean on it trust the software there.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from falkirk.api.registry.v1.device_service_pb2 import Device, DeviceProof
from falkirk.api.registry.v1.device_token_service_pb2 import DeviceToken
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.decide.callers import Role
from falkirk.registry import engine, fields, tokens
from falkirk.registry.engine import Engine
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.refusal import Reason, Refused
from falkirk.wireguard import proof

_TRIES = 100
"""Numbers that are tried behind a name that nobody asked for in so many words."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine says of itself."""

    name: str
    """Empty: left to us."""
    public_key: str
    posture: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Person:
    """Whom an issuer has signed in, and what its settings give."""

    tenant: str
    issuer: str
    subject: str
    """Stable and unique within the issuer (OpenID Connect Core 2), unlike a name or a mail address."""
    username: str
    email: str
    """Empty where the issuer doesn't vouch for it."""
    groups: tuple[str, ...] | None
    """None: the issuer has no say in groups."""
    needs_approval: bool = False
    device_lifetime_s: int = 0
    role: Role = Role.OWNER
    """What the person may do over TCP."""


def by_token(work: Engine, secret: str, machine: Machine) -> Device:
    """Enrol by a token. Raises `Refused`."""
    _judge(machine)
    now = work.surroundings.now_ns()
    token = tokens.by_secret(work.connection, secret)
    if token is not None and (again := _again(work, token, machine)) is not None:
        # The answer was lost: the same machine asks again. It shows the secret and names the key that it got in with.
        return again
    token = tokens.check_usable(token, now)
    if token.uses and not token.reusable:
        raise Refused(Reason.TOKEN_USED, "the enrolment token was used already, by another device; ask for another")
    device = Device(user=token.user, groups=token.groups, pending=token.needs_approval)
    device.metadata.labels.update(token.tags)
    made = _create(work, device, machine, token.tenant, token.device_lifetime_s)
    tokens.used(work, token, made.metadata.id)
    return made


def by_person(work: Engine, person: Person, machine: Machine) -> Device:
    """Enrol by a sign-in. Raises `Refused`."""
    _judge(machine)
    user = sign_in(work, person)
    name = machine.name or _label(machine.posture.get("hostname", ""))
    stored = engine.find(work.connection, BY_NAME["device"], user.metadata.tenant, name) if name else None
    if isinstance(stored, Device) and stored.user == user.metadata.name:
        device = _copy(stored)
        device.public_key = machine.public_key
        _report(device, machine.posture)
        if person.device_lifetime_s:
            device.expire_time.CopyFrom(tokens.instant(work.surroundings.now_ns(), person.device_lifetime_s))
        if stored.public_key != machine.public_key:
            work.connection.execute("DELETE FROM proved WHERE device_id = ?", (stored.metadata.id,))
            # Another key is another machine, as far as anyone can tell.
            device.pending = device.pending or person.needs_approval
        return _put(work, device, stored)
    device = Device(user=user.metadata.name, pending=person.needs_approval)
    return _create(work, device, machine, user.metadata.tenant, person.device_lifetime_s)


def sign_in(work: Engine, person: Person) -> User:
    """The user of an issuer's subject, made or brought up to date. Raises `Refused` (SIGN_IN_REFUSED) where it is disabled."""
    tenant = engine.find(work.connection, BY_NAME["tenant"], "", person.tenant)
    if tenant is None:
        raise engine.not_found(BY_NAME["tenant"], person.tenant)
    key = (tenant.metadata.id, person.issuer, person.subject)
    stored = _user_of(work.connection, key) or _user_by_email(work.connection, tenant.metadata.id, person.email)
    if stored is not None and stored.disabled:
        raise Refused(Reason.SIGN_IN_REFUSED, f"user {stored.metadata.name} is disabled")
    user = User()
    if stored is not None:
        user.CopyFrom(stored)
    else:
        user.metadata.tenant = tenant.metadata.name
        user.metadata.name = _free(work.connection, "user", tenant.metadata.name, _label(person.username) or "user")
    user.email = person.email or user.email
    if person.groups is not None:
        user.groups[:] = person.groups
    kind = BY_NAME["user"]
    made = work.put(kind, user, stored)[0] if stored is not None else work.create(kind, user)
    assert isinstance(made, User)
    work.connection.execute(
        "INSERT OR REPLACE INTO subject (tenant_id, issuer, subject, user_id) VALUES (?, ?, ?, ?)",
        (*key, made.metadata.id),
    )
    return made


def proved(work: Engine, given: DeviceProof, private_key: bytes, purpose: str, said: bytes = b"") -> Device:
    """The device that a proof is of; the proof is worth nothing from then on. Raises `Refused` (PROOF_REFUSED)."""
    device = check_proof(work.connection, work.surroundings.now_ns(), given, private_key, purpose, said)
    work.connection.execute(
        "INSERT OR REPLACE INTO proved (device_id, time_ns) VALUES (?, ?)", (given.device_id, given.time_ns)
    )
    return device


def check_proof(
    connection: sqlite3.Connection, now_ns: int, given: DeviceProof, private_key: bytes, purpose: str, said: bytes = b""
) -> Device:
    """The device that a proof is of, and nothing written. Raises `Refused` (PROOF_REFUSED), in the same words for every cause that an outsider could
    be looking for."""
    refused = Refused(
        Reason.PROOF_REFUSED,
        "the proof isn't one of this device's present key; was the key changed, or the device removed? Enrol it again",
        field="proof",
    )
    device = engine.by_id(connection, BY_NAME["device"], given.device_id)
    if not isinstance(device, Device) or not device.public_key:
        raise refused
    if not proof.check(given.mac, private_key, proof.key_of(device.public_key), purpose, given.time_ns, said):
        raise refused
    if abs(given.time_ns - now_ns) > proof.LATE_NS:
        raise Refused(
            Reason.PROOF_REFUSED, "the proof's time is more than 5 minutes off; set the device's clock", field="proof"
        )
    row = connection.execute("SELECT time_ns FROM proved WHERE device_id = ?", (given.device_id,)).fetchone()
    if row is not None and given.time_ns <= row[0]:
        raise Refused(Reason.PROOF_REFUSED, "the proof was used before, or is older than one that was", field="proof")
    return device


def report_posture(work: Engine, stored: Device, posture: Mapping[str, str]) -> Device:
    """Replace a device's posture. Raises `Refused`."""
    device = _copy(stored)
    _report(device, posture)
    return _put(work, device, stored)


def rotate_key(work: Engine, stored: Device, public_key: str) -> Device:
    """Give a device another key. Raises `Refused`."""
    if not public_key:
        raise Refused(Reason.INVALID_FIELD, "public_key: is missing", field="public_key")
    device = _copy(stored)
    device.public_key = public_key
    return _put(work, device, stored)


def approve(work: Engine, tenant: str, name: str) -> Device:
    """Let a pending device connect. Raises `Refused`."""
    kind = BY_NAME["device"]
    home = engine.find(work.connection, BY_NAME["tenant"], "", tenant)
    if home is None:
        raise engine.not_found(BY_NAME["tenant"], tenant)
    stored = engine.find(work.connection, kind, home.metadata.name, name)
    if not isinstance(stored, Device):
        raise engine.not_found(kind, name, home.metadata.name)
    device = _copy(stored)
    device.pending = False
    return _put(work, device, stored)


def _judge(machine: Machine) -> None:
    if not fields.public_key(machine.public_key, "public_key"):
        raise Refused(Reason.INVALID_FIELD, "public_key: a device enrols with its public key", field="public_key")
    if machine.name:
        fields.label(machine.name, "name")
    fields.pairs(machine.posture, "posture")


def _again(work: Engine, token: DeviceToken, machine: Machine) -> Device | None:
    """The device that this machine has become by this token before."""
    row = work.connection.execute(
        "SELECT holder FROM claim WHERE scope = 'key' AND key = ?", (machine.public_key,)
    ).fetchone()
    if row is None or tokens.enrolled_by(work.connection, row[0]) != token.id:
        return None
    device = engine.by_id(work.connection, BY_NAME["device"], row[0])
    return device if isinstance(device, Device) else None


def _create(work: Engine, device: Device, machine: Machine, tenant: str, lifetime_s: int) -> Device:
    device.metadata.tenant = tenant
    device.metadata.name = machine.name or _free(
        work.connection, "device", tenant, _label(machine.posture.get("hostname", "")) or "device"
    )
    device.public_key = machine.public_key
    _report(device, machine.posture)
    if lifetime_s:
        device.expire_time.CopyFrom(tokens.instant(work.surroundings.now_ns(), lifetime_s))
    made = work.create(BY_NAME["device"], device)
    assert isinstance(made, Device)
    return made


def _report(device: Device, posture: Mapping[str, str]) -> None:
    device.posture.clear()
    device.posture.update(posture)


def _copy(stored: Device) -> Device:
    device = Device()
    device.CopyFrom(stored)
    return device


def _put(work: Engine, device: Device, stored: Device) -> Device:
    made, _ = work.put(BY_NAME["device"], device, stored)
    assert isinstance(made, Device)
    return made


def _user_of(connection: sqlite3.Connection, key: tuple[str, str, str]) -> User | None:
    row = connection.execute(
        "SELECT user_id FROM subject WHERE tenant_id = ? AND issuer = ? AND subject = ?", key
    ).fetchone()
    user = engine.by_id(connection, BY_NAME["user"], row[0]) if row else None
    return user if isinstance(user, User) else None


def _user_by_email(connection: sqlite3.Connection, tenant_id: str, email: str) -> User | None:
    """A user that was made by hand for this mail address and that no subject has claimed yet; the only one, or none."""
    if not email:
        return None
    rows = connection.execute(
        "SELECT body FROM resource WHERE tenant_id = ? AND kind = ? AND id NOT IN (SELECT user_id FROM subject WHERE tenant_id = ?)",
        (tenant_id, BY_NAME["user"].number, tenant_id),
    )
    users: Iterable[User] = (User.FromString(body) for (body,) in rows)
    found = [user for user in users if user.email.lower() == email.lower()]
    return found[0] if len(found) == 1 else None


def _label(text: str) -> str:
    """A legal name of a host's or a person's (what is before @ or the first dot of a host's name); empty where nothing is left."""
    name = re.sub(r"[^a-z0-9]+", "-", text.partition("@")[0].lower()).strip("-")
    return name[:50].rstrip("-")


def _free(connection: sqlite3.Connection, kind: str, tenant: str, wanted: str) -> str:
    """The name, or the first of NAME-2, NAME-3… that nobody has."""
    for number in range(1, _TRIES):
        name = wanted if number == 1 else f"{wanted}-{number}"
        if engine.find(connection, BY_NAME[kind], tenant, name) is None:
            return name
    raise Refused(Reason.NAME_TAKEN, f"{_TRIES} {kind}s are called {wanted} or {wanted}-N; choose a name", field="name")
