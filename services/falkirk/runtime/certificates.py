"""Keys and certificates of the mesh: ECDSA on P-256 with SHA-256, the one pair that every TLS library takes. Times are arguments.

A private key is made by who uses it and leaves its process only for a file of mode 0600; the authority sees a PKCS #10 request, whose signature
shows that the key is there.
"""

from __future__ import annotations

import hashlib
import ssl
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from falkirk.decide.callers import Caller, NotAnIdentity, parse

NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: time is judged at each call, where it can be told and recorded, and where long connections meet it too."""
ROOTS: Final = "falkirk-roots/1"
"""The protocol, by ALPN, of a front's answer to who has only a fingerprint (`falkirk.runtime.front`)."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """PKCS #8, PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def request(key: ec.EllipticCurvePrivateKey) -> str:
    """A PKCS #10 request for the key, PEM. Its subject says nothing: the authority knows who asks."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def requested_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The key of a request whose signature is right. Raises ValueError with what is wrong."""
    try:
        found = x509.load_pem_x509_csr(pem.encode())
        key = found.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("the key must be on P-256")
        if not found.is_signature_valid:
            raise ValueError("the request isn't signed by its key")
    except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion) as error:
        raise ValueError(f"no PKCS #10 request: {error}") from error
    return key


@lru_cache(maxsize=1024)
def caller_of(der: bytes) -> Caller:
    """Whom a certificate names that TLS has verified. Raises NotAnIdentity."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise NotAnIdentity("the certificate has no identity of a mesh") from error
    if len(uris) != 1:
        raise NotAnIdentity("the certificate has not exactly one identity")
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return parse(uris[0], begin.timestamp(), end.timestamp())


def caller_of_pem(pem: str) -> Caller:
    """The same of a PEM chain's first certificate. Raises NotAnIdentity."""
    try:
        certificate = x509.load_pem_x509_certificates(pem.encode())[0]
    except (ValueError, IndexError) as error:
        raise NotAnIdentity("there is no certificate") from error
    return caller_of(certificate.public_bytes(serialization.Encoding.DER))


def fingerprints(pem: str) -> list[str]:
    """SHA-256 of each certificate of a PEM bundle, 64 hexadecimal digits. Raises ValueError."""
    found = x509.load_pem_x509_certificates(pem.encode())
    return [hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest() for certificate in found]


def server_name(mesh: str) -> str:
    """The DNS name that every node's certificate has, and nobody else's: what clients of the mesh ask for instead of a host's name."""
    return f"node.{mesh}.falkirk.internal"


def server_context(certificate_file: str, roots: str) -> ssl.SSLContext:
    """What a TCP front speaks: TLS 1.3, HTTP/2, client certificates asked for and verified where given. `certificate_file` holds chain and key, PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a session that is resumed would keep what was verified before a root was retired
    context.load_cert_chain(certificate_file)
    context.load_verify_locations(cadata=roots)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
    return context
