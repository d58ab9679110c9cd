"""The mesh's authority: its roots, and what they sign. Works inside transactions of the store; times are nanoseconds of wall clock, and arguments.

A mesh gets its id and its first root when somebody first asks. A rotation makes the next root, has the one before sign it too, and destroys the private key of
that one: from then on only the newest signs. The older ones stay trusted for as long as what they signed may live (the longest life of a leaf and an
hour), and go along with each certificate as *cross* certificates, so that who knows only an old one isn't cut off.

    trusted   root 1 ────────────────┤ retired
    trusted                 root 2 ──┼───────────────►     signs from here on
                            └─ crossed by root 1

Limits: roots follow one another, they don't branch; a root can't be distrusted before its time but by rotating twice and waiting.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.decide.callers import Caller, Role
from falkirk.registry import issue
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.sealing import Locked, Seal
from falkirk.registry.settings import AuthoritySettings
from falkirk.runtime import certificates

SECOND: Final = 1_000_000_000
_HOUR: Final = 3600 * SECOND
_DAY: Final = 24 * _HOUR


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate and what goes with it, PEM; `end` in seconds since 1970."""

    chain: str
    roots: str
    mesh: str
    end: float


class Authority:
    """See the module. Every method takes the connection of a transaction that may write, but for `trust` once there is a root."""

    def __init__(self, seal: Seal, settings: AuthoritySettings) -> None:
        self._seal, self._settings = seal, settings
        self._issuer: tuple[int, issue.Issuer] | None = None

    @property
    def overlap_ns(self) -> int:
        """How long a root is trusted after the next one was made."""
        return max(self._settings.node_hours, self._settings.principal_hours) * _HOUR + _HOUR

    def ensure(self, connection: sqlite3.Connection, now_ns: int) -> str:
        """The mesh's id; makes it and the first root where there is none. Raises Refused."""
        row = connection.execute("SELECT value FROM meta WHERE key = 'mesh'").fetchone()
        if row is not None:
            return str(row[0])
        mesh = secrets.token_hex(16)
        connection.execute("INSERT INTO meta (key, value) VALUES ('mesh', ?)", (mesh,))
        self._make(connection, mesh, 1, None, now_ns)
        return mesh

    def trust(self, connection: sqlite3.Connection, now_ns: int) -> pb.Trust:
        """What is trusted now. Raises Refused."""
        trust = pb.Trust(mesh=self.ensure(connection, now_ns))
        for number, text, create_ns, retire_ns in connection.execute(
            "SELECT number, certificate, create_ns, retire_ns FROM authority_root WHERE retire_ns IS NULL OR retire_ns > ? ORDER BY number",
            (now_ns,),
        ):
            root = trust.roots.add(number=number, certificate=text)
            root.fingerprint = issue.fingerprint(x509.load_pem_x509_certificate(text.encode()))
            root.create_time.FromNanoseconds(create_ns)
            if retire_ns is not None:
                root.retire_time.FromNanoseconds(retire_ns)
        # As long as a certificate may be out that was made before.
        since = now_ns - self._settings.principal_hours * _HOUR - _HOUR
        trust.revoked.extend(
            key for (key,) in connection.execute("SELECT id FROM principal WHERE revoke_ns > ? ORDER BY id", (since,))
        )
        return trust

    def rotate(self, connection: sqlite3.Connection, now_ns: int) -> None:
        """Make the next root. Raises Refused; nothing has changed then."""
        mesh = self.ensure(connection, now_ns)
        number, before = self._signer(connection, mesh)
        self._make(connection, mesh, number + 1, before, now_ns)
        connection.execute(
            "UPDATE authority_root SET sealed = NULL, retire_ns = ? WHERE number = ?",
            (now_ns + self.overlap_ns, number),
        )

    def rotate_in_time(self, connection: sqlite3.Connection, now_ns: int) -> bool:
        """Rotate where the root is old enough. Whether it was. Raises Refused."""
        (made,) = connection.execute("SELECT max(create_ns) FROM authority_root").fetchone()
        if made is None or now_ns - made < self._settings.root_days * _DAY:
            return False
        self.rotate(connection, now_ns)
        return True

    def sign(
        self, connection: sqlite3.Connection, request: str, named: Caller, names: Sequence[str], now_ns: int
    ) -> Signed:
        """A certificate for a request's key. `named` is whom it names; mesh and times are set here. Raises Refused."""
        mesh = self.ensure(connection, now_ns)
        now = now_ns / SECOND
        hours = self._settings.node_hours if named.role is Role.NODE else self._settings.principal_hours
        end = float(int(now + hours * 3600))
        caller = Caller(
            mesh, named.role, named.id, named.name, named.tenant_id, named.tenant, now - issue.SKEW_SECONDS, end
        )
        try:
            key = certificates.requested_key(request)
        except ValueError as error:
            raise Refused(Reason.INVALID_FIELD, f"request: {error}", field="request") from error
        _, issuer = self._signer(connection, mesh)
        try:
            leaf = issue.leaf(issuer, key, caller, names)
        except ValueError as error:
            raise Refused(Reason.INVALID_FIELD, f"names: {error}", field="names") from error
        rows = connection.execute(
            "SELECT certificate, crossed FROM authority_root WHERE retire_ns IS NULL OR retire_ns > ? ORDER BY number DESC",
            (now_ns,),
        ).fetchall()
        crossed = "".join(text for _, text in rows)
        return Signed(issue.pem(leaf) + crossed, "".join(text for text, _ in reversed(rows)), mesh, end)

    def _make(
        self, connection: sqlite3.Connection, mesh: str, number: int, before: issue.Issuer | None, now_ns: int
    ) -> None:
        key = certificates.new_key()
        now = now_ns / SECOND
        # Twice its turn, so that one that nobody rotates in time (the registry was away) still signs.
        end = now + 2 * self._settings.root_days * 86400 + self.overlap_ns / SECOND
        certificate = issue.root(mesh, number, key, now - issue.SKEW_SECONDS, end)
        crossed = issue.pem(issue.cross(before, certificate)) if before is not None else ""
        secret = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            sealed = self._seal.seal(secret, _about(mesh, number))
        except Locked as locked:
            raise _locked(locked) from locked
        connection.execute(
            "INSERT INTO authority_root (number, certificate, crossed, sealed, create_ns) VALUES (?, ?, ?, ?, ?)",
            (number, issue.pem(certificate), crossed, sealed, now_ns),
        )

    def _signer(self, connection: sqlite3.Connection, mesh: str) -> tuple[int, issue.Issuer]:
        number, text, sealed = connection.execute(
            "SELECT number, certificate, sealed FROM authority_root ORDER BY number DESC LIMIT 1"
        ).fetchone()
        if self._issuer is None or self._issuer[0] != number or issue.pem(self._issuer[1].certificate) != text:
            try:
                secret = self._seal.open(sealed, _about(mesh, number))
            except Locked as locked:
                raise _locked(locked) from locked
            key = serialization.load_der_private_key(secret, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._issuer = (number, issue.Issuer(x509.load_pem_x509_certificate(text.encode()), key))
        return self._issuer


def _about(mesh: str, number: int) -> bytes:
    return f"falkirk root {mesh} {number}".encode()


def _locked(locked: Locked) -> Refused:
    return Refused(Reason.AUTHORITY_LOCKED, str(locked))
