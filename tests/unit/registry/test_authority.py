"""The authority without gRPC: keys at rest, roots that overlap, principals and their tokens, with a clock of its own."""

from __future__ import annotations

import datetime
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.decide.callers import Caller, Role
from falkirk.registry import principals
from falkirk.registry.authority import SECOND, Authority, Signed
from falkirk.registry.kinds import BY_NAME, serialise
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.sealing import Locked, Seal
from falkirk.registry.settings import AuthoritySettings
from falkirk.registry.store import migrate, open_database
from falkirk.runtime import certificates

HOUR = 3600 * SECOND
DAY = 24 * HOUR
NOW = 1_800_000_000 * SECOND
TENANT, USER = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    made = open_database(tmp_path / "falkirk.db")
    migrate(made)
    made.execute(
        "INSERT INTO resource (id, kind, tenant_id, tenant, name, body) VALUES (?, ?, '', '', 'acme', x'')",
        (TENANT, BY_NAME["tenant"].number),
    )
    yield made
    made.close()


def put_user(connection: sqlite3.Connection, name: str, *, disabled: bool = False) -> None:
    """User alice, under this name."""
    user = User(disabled=disabled)
    user.metadata.id, user.metadata.name, user.metadata.tenant, user.metadata.tenant_id = USER, name, "acme", TENANT
    connection.execute("DELETE FROM resource WHERE id = ?", (USER,))
    connection.execute(
        "INSERT INTO resource (id, kind, tenant_id, tenant, name, body) VALUES (?, ?, ?, 'acme', ?, ?)",
        (USER, BY_NAME["user"].number, TENANT, name, serialise(user)),
    )


def authority(directory: Path, root_days: int = 365) -> Authority:
    return Authority(Seal(directory / "authority.key", None), AuthoritySettings(root_days=root_days))


def sign(made: Authority, connection: sqlite3.Connection, now: int, role: Role = Role.NODE) -> Signed:
    named = Caller("", role, "n1", "n1")
    return made.sign(connection, certificates.request(certificates.new_key()), named, ("10.0.0.1", "n1.example"), now)


def leads_to(chain: str, root: str, now: int) -> bool:
    """Whether a client that trusts one root believes a server with this chain: cryptography's verifier as an independent judge."""
    leaf, *others = x509.load_pem_x509_certificates(chain.encode())
    name = certificates.server_name(certificates.caller_of_pem(chain).mesh)
    builder = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(root.encode())))
    moment = datetime.datetime.fromtimestamp(now / SECOND, datetime.UTC)
    try:
        builder.time(moment).build_server_verifier(x509.DNSName(name)).verify(leaf, others)
    except VerificationError:
        return False
    return True


def refused(connection: sqlite3.Connection, secret: str, now: int) -> Reason:
    with pytest.raises(Refused) as caught:
        principals.admit(connection, secret, now)
    return caught.value.reason


# keys at rest


def test_a_sealed_key_opens_with_its_file_only(tmp_path: Path) -> None:
    seal = Seal(tmp_path / "key", None)
    sealed = seal.seal(b"secret", b"root 1")
    assert b"secret" not in sealed
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert seal.open(sealed, b"root 1") == b"secret"
    with pytest.raises(Locked):
        seal.open(sealed, b"root 2")
    for position in range(len(sealed)):
        with pytest.raises(Locked):
            seal.open(sealed[:position] + bytes((sealed[position] ^ 1,)) + sealed[position + 1 :], b"root 1")
    (tmp_path / "key").unlink()
    with pytest.raises(Locked, match="No such file"):
        seal.open(sealed, b"root 1")
    Seal(tmp_path / "key", None).seal(b"another", b"")
    with pytest.raises(Locked, match="put back the file"):
        seal.open(sealed, b"root 1")


def test_a_passphrase(tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text("correct horse battery\n")
    phrase.chmod(0o600)
    sealed = Seal(tmp_path / "key", phrase).seal(b"secret", b"")
    assert not (tmp_path / "key").exists()
    assert Seal(tmp_path / "key", phrase).open(sealed, b"") == b"secret"
    with pytest.raises(Locked, match="passphrase_file"):
        Seal(tmp_path / "key", None).open(sealed, b"")
    phrase.write_text("incorrect horse battery\n")
    with pytest.raises(Locked, match="put back"):
        Seal(tmp_path / "key", phrase).open(sealed, b"")
    phrase.write_text("short\n")
    with pytest.raises(Locked, match="at least 12"):
        Seal(tmp_path / "key", phrase).open(sealed, b"")


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    seal = Seal(tmp_path / "key", None)
    sealed = seal.seal(b"secret", b"")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(Locked, match="chmod 600"):
        seal.open(sealed, b"")


# roots


def test_what_a_certificate_says(connection: sqlite3.Connection, tmp_path: Path) -> None:
    made = authority(tmp_path)
    signed = sign(made, connection, NOW)
    caller = certificates.caller_of_pem(signed.chain)
    assert (caller.role, caller.name, caller.mesh) == (Role.NODE, "n1", signed.mesh)
    assert caller.end == signed.end == NOW // SECOND + 24 * 3600
    assert leads_to(signed.chain, signed.roots, NOW)
    person = sign(made, connection, NOW, Role.AUDITOR)
    assert certificates.caller_of_pem(person.chain).end == NOW // SECOND + 12 * 3600
    # A person's certificate is for no server, whatever names were asked for.
    leaf = x509.load_pem_x509_certificate(person.chain.encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == []
    assert not leads_to(person.chain, person.roots, NOW)


def test_a_request_that_isnt_signed_by_its_key(connection: sqlite3.Connection, tmp_path: Path) -> None:
    request = x509.load_pem_x509_csr(certificates.request(certificates.new_key()).encode())
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    for text in (broken, "", "nonsense"):
        with pytest.raises(Refused) as caught:
            authority(tmp_path).sign(connection, text, Caller("", Role.AUDITOR, "x", "x"), (), NOW)
        assert caught.value.about == {"field": "request"}


def test_roots_overlap(connection: sqlite3.Connection, tmp_path: Path) -> None:
    made = authority(tmp_path)
    first = sign(made, connection, NOW)
    made.rotate(connection, NOW + HOUR)
    second = sign(made, connection, NOW + HOUR)
    # Who knows the old root verifies the new certificate, who knows both verifies the old one; the new root alone doesn't.
    assert leads_to(second.chain, first.roots, NOW + HOUR)
    assert leads_to(first.chain, second.roots, NOW + HOUR)
    (_, newest) = x509.load_pem_x509_certificates(second.roots.encode())
    alone = newest.public_bytes(serialization.Encoding.PEM).decode()
    assert leads_to(second.chain, alone, NOW + HOUR)
    assert not leads_to(first.chain, alone, NOW + HOUR)
    made.rotate(connection, NOW + 2 * HOUR)
    assert leads_to(sign(made, connection, NOW + 2 * HOUR).chain, first.roots, NOW + 2 * HOUR)
    numbers = [root.number for root in made.trust(connection, NOW + 2 * HOUR).roots]
    assert numbers == [1, 2, 3]
    # Each is trusted until everything that it has signed has ended.
    assert [root.number for root in made.trust(connection, NOW + HOUR + 25 * HOUR - 1).roots] == [1, 2, 3]
    assert [root.number for root in made.trust(connection, NOW + HOUR + 25 * HOUR).roots] == [2, 3]
    assert [root.number for root in made.trust(connection, NOW + 2 * HOUR + 25 * HOUR).roots] == [3]


def test_the_older_key_is_destroyed(connection: sqlite3.Connection, tmp_path: Path) -> None:
    made = authority(tmp_path)
    made.ensure(connection, NOW)
    made.rotate(connection, NOW)
    rows = connection.execute("SELECT number FROM authority_root WHERE sealed IS NOT NULL").fetchall()
    assert rows == [(2,)]


def test_roots_follow_one_another_by_themselves(connection: sqlite3.Connection, tmp_path: Path) -> None:
    made = authority(tmp_path, root_days=2)
    assert not made.rotate_in_time(connection, NOW)
    made.ensure(connection, NOW)
    assert not made.rotate_in_time(connection, NOW + 2 * DAY - 1)
    assert made.rotate_in_time(connection, NOW + 2 * DAY)
    assert not made.rotate_in_time(connection, NOW + 2 * DAY)


def test_a_restart_signs_on(connection: sqlite3.Connection, tmp_path: Path) -> None:
    roots = sign(authority(tmp_path), connection, NOW).roots
    assert leads_to(sign(authority(tmp_path), connection, NOW).chain, roots, NOW)
    os.truncate(tmp_path / "authority.key", 0)
    with pytest.raises(Refused) as caught:
        sign(authority(tmp_path), connection, NOW)
    assert caught.value.reason is Reason.AUTHORITY_LOCKED


# principals


def offer(connection: sqlite3.Connection, key: str, secret: bytes, end: int) -> str:
    principals.offer(connection, key, secret, end)
    return principals.text(secret)


def test_a_token_is_good_once_and_for_its_time(connection: sqlite3.Connection) -> None:
    assert not principals.ever(connection)
    made = principals.make(connection, "p1", "", "root", Role.ADMINISTRATOR, NOW)
    assert principals.ever(connection)
    secret = offer(connection, made.id, b"a" * 32, NOW + HOUR)
    assert principals.admit(connection, secret, NOW + HOUR - 1) == Caller("", Role.ADMINISTRATOR, "p1", "root")
    assert refused(connection, secret, NOW) is Reason.LOGIN_REFUSED
    late = offer(connection, made.id, b"b" * 32, NOW + HOUR)
    assert refused(connection, late, NOW + HOUR) is Reason.LOGIN_REFUSED
    assert refused(connection, "", NOW) is Reason.LOGIN_REFUSED
    stored = connection.execute("SELECT * FROM login").fetchall()
    assert stored == []


def test_the_secret_isnt_stored(connection: sqlite3.Connection) -> None:
    made = principals.make(connection, "p1", "", "root", Role.ADMINISTRATOR, NOW)
    secret = offer(connection, made.id, b"a" * 32, NOW + HOUR)
    dump = "\n".join(connection.iterdump())
    assert secret not in dump
    assert (b"a" * 32).hex() not in dump.lower()


def test_revoked_is_revoked(connection: sqlite3.Connection, tmp_path: Path) -> None:
    made = principals.make(connection, "p1", TENANT, "eve", Role.AUDITOR, NOW)
    secret = offer(connection, made.id, b"a" * 32, NOW + HOUR)
    with pytest.raises(Refused):
        principals.revoke(connection, "", "eve", NOW)  # not of the whole mesh
    principals.revoke(connection, TENANT, "eve", NOW)
    assert refused(connection, secret, NOW) is Reason.LOGIN_REFUSED
    with pytest.raises(Refused):
        principals.renew(connection, "p1", NOW)
    trusted = authority(tmp_path)
    assert list(trusted.trust(connection, NOW).revoked) == ["p1"]
    assert list(trusted.trust(connection, NOW + 13 * HOUR).revoked) == []  # no certificate of it is left
    again = principals.make(connection, "p2", TENANT, "eve", Role.AUDITOR, NOW)
    assert again.id == "p2"


@pytest.mark.parametrize(
    ("tenant", "name", "role", "reason"),
    [
        ("", "x", Role.NODE, Reason.INVALID_FIELD),
        ("", "x", Role.ANYONE, Reason.INVALID_FIELD),
        ("", "x", Role.OWNER, Reason.INVALID_FIELD),
        ("", "x", Role.CONNECTOR, Reason.INVALID_FIELD),
        (TENANT, "", Role.AUDITOR, Reason.INVALID_FIELD),
        (TENANT, "a/b", Role.AUDITOR, Reason.INVALID_FIELD),
        (TENANT, "nobody", Role.OWNER, Reason.NOT_FOUND),
        (TENANT, "taken", Role.ADMINISTRATOR, Reason.NAME_TAKEN),
    ],
)
def test_who_cannot_be_made(connection: sqlite3.Connection, tenant: str, name: str, role: Role, reason: Reason) -> None:
    principals.make(connection, "p1", TENANT, "taken", Role.AUDITOR, NOW)
    with pytest.raises(Refused) as caught:
        principals.make(connection, "p2", tenant, name, role, NOW)
    assert caught.value.reason is reason


def test_an_owner_is_the_user_of_the_moment(connection: sqlite3.Connection) -> None:
    put_user(connection, "alice")
    made = principals.make(connection, "p1", TENANT, "alice", Role.OWNER, NOW)
    assert principals.renew(connection, made.id, NOW).name == "alice"
    put_user(connection, "alison")
    assert principals.renew(connection, made.id, NOW) == Caller("", Role.OWNER, "p1", "alison", TENANT, "acme")
    put_user(connection, "alison", disabled=True)
    with pytest.raises(Refused):
        principals.renew(connection, made.id, NOW)
    connection.execute("DELETE FROM resource WHERE id = ?", (USER,))
    with pytest.raises(Refused):
        principals.renew(connection, made.id, NOW)


def test_a_sign_in_takes_another_one(connection: sqlite3.Connection) -> None:
    put_user(connection, "alice")
    user = User()
    user.metadata.id, user.metadata.name, user.metadata.tenant_id = USER, "alice", TENANT
    first = principals.sign_in(connection, "p1", user, Role.ADMINISTRATOR, NOW)
    assert first == Caller("", Role.ADMINISTRATOR, "p1", "alice", TENANT, "acme")
    with pytest.raises(Refused) as caught:
        principals.renew(connection, "p1", NOW)
    assert caught.value.reason is Reason.LOGIN_REFUSED
    # The role is what the issuer says now.
    assert principals.sign_in(connection, "p2", user, Role.OWNER, NOW).role is Role.OWNER
    principals.revoke(connection, TENANT, "alice", NOW)
    principals.make(connection, "p3", TENANT, "alice", Role.AUDITOR, NOW)
    with pytest.raises(Refused) as caught:
        principals.sign_in(connection, "p4", user, Role.OWNER, NOW)
    assert caught.value.reason is Reason.NAME_TAKEN
