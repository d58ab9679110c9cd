"""The certificates that the authority makes. Times are seconds since 1970, wall clock, and arguments.

    root n+1 ◄── root n signs it too (a *cross* certificate), so that who trusts only n can verify what n+1 signs
       │
       └──► leaf: one URI (`falkirk.decide.callers`); a node's also the DNS names that clients of the mesh ask for, and is for servers too

A leaf's extensions follow RFC 5280 4.2: the key is for signatures, the certificate no authority.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from falkirk.decide.callers import Caller, Role
from falkirk.runtime.certificates import server_name

SKEW_SECONDS: Final = 300
"""A certificate begins so long before it is made: clocks differ."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """A root that can sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def root(mesh: str, number: int, key: ec.EllipticCurvePrivateKey, begin: float, end: float) -> x509.Certificate:
    """A self-signed root."""
    return _authority(
        _subject(mesh, number), _subject(mesh, number), key.public_key(), key, key.public_key(), begin, end
    )


def cross(issuer: Issuer, of: x509.Certificate) -> x509.Certificate:
    """Another root's name and key, signed by this one; it ends with the earlier of the two."""
    key = of.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    end = min(of.not_valid_after_utc, issuer.certificate.not_valid_after_utc)
    begin = of.not_valid_before_utc.timestamp()
    signer = issuer.key.public_key()
    return _authority(of.subject, issuer.certificate.subject, key, issuer.key, signer, begin, end.timestamp())


def leaf(issuer: Issuer, key: ec.EllipticCurvePublicKey, caller: Caller, names: Sequence[str]) -> x509.Certificate:
    """A caller's certificate, for its `begin` and `end`. `names` are DNS names and addresses of a node. Raises ValueError for one that is neither."""
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(caller.uri)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if caller.role is Role.NODE:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        alternatives += [_name(name) for name in dict.fromkeys((server_name(caller.mesh), *names))]
    builder = _builder(_common(caller.name), issuer.certificate.subject, key, caller.begin, caller.end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return builder.add_extension(authority, critical=False).sign(issuer.key, hashes.SHA256())


def pem(certificate: x509.Certificate) -> str:
    """As text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, 64 hexadecimal digits."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    signing_key: ec.EllipticCurvePublicKey,
    begin: float,
    end: float,
) -> x509.Certificate:
    builder = _builder(subject, issuer, key, begin, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key)
    return builder.add_extension(authority, critical=False).sign(signer, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: float, end: float
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(_moment(begin)).not_valid_after(_moment(end))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _subject(mesh: str, number: int) -> x509.Name:
    return _common(f"Falkirk {mesh} root {number}")


def _common(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not name.isascii() or not 0 < len(name) <= 253:
            raise ValueError(f"{name!r} is no DNS name and no address") from None
        return x509.DNSName(name)


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
