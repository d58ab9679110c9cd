"""Services of a mesh over TCP, from a machine that needn't be in it.

    fingerprint ──► roots: the bundle of whom it says it is, held against the fingerprint ──► channel: TLS with these roots and nobody else's

A mesh's nodes all have one DNS name in their certificates, which has the mesh's id in it (`certificates.server_name`): that is the name that is checked,
whatever address was dialled. Only the authority's own node certificates have it.
"""

from __future__ import annotations

import hmac
import re
import socket
import ssl
from typing import Final

import grpc
from cryptography import x509

from falkirk.runtime import certificates, client
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.settings import host_port

CONNECT_SECONDS: Final = 10.0
MOST_BYTES: Final = 256 * 1024
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}\Z")
_SUBJECT: Final = re.compile(r"Falkirk ([0-9a-f]{32}) root [0-9]+\Z")


def roots(address: str, fingerprint: str) -> str:
    """The mesh's roots, PEM, as somebody at host:port gives them, one of them with this SHA-256 (64 hexadecimal digits).

    Whoever answers isn't known before: nothing is sent, and roots without the fingerprint are refused. Others beside it are left out, so that
    nobody can add one. Raises FalkirkError.
    """
    fingerprint = fingerprint.lower().replace(":", "")
    if not _FINGERPRINT.match(fingerprint):
        raise FalkirkError(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FINGERPRINT", "a fingerprint has 64 hexadecimal digits (SHA-256)"
        )
    for certificate in _split(_bundle(address)):
        try:
            (found,) = certificates.fingerprints(certificate)
        except ValueError:
            continue
        if hmac.compare_digest(found, fingerprint):
            return certificate
    raise FalkirkError(
        grpc.StatusCode.UNAUTHENTICATED,
        "FINGERPRINT_MISMATCH",
        f"{address} isn't the mesh that was meant: none of its roots has the fingerprint {fingerprint}",
    )


def channel(address: str, roots: str, credentials: tuple[str, str] | None = None) -> grpc.Channel:
    """A blocking channel to a service at host:port. `credentials` are chain and key, PEM; None comes without a certificate. Raises FalkirkError."""
    chain, key = credentials or (None, None)
    made = grpc.ssl_channel_credentials(
        roots.encode(), key.encode() if key else None, chain.encode() if chain else None
    )
    name = ("grpc.ssl_target_name_override", certificates.server_name(mesh_of(roots)))
    return grpc.secure_channel(address, made, options=(*client.OPTIONS, name))


def mesh_of(roots: str) -> str:
    """The id of the mesh whose roots these are. Raises FalkirkError."""
    try:
        (name,) = x509.load_pem_x509_certificates(roots.encode())[-1].subject.get_attributes_for_oid(
            x509.oid.NameOID.COMMON_NAME
        )
        match = _SUBJECT.match(str(name.value))
    except (ValueError, IndexError):
        match = None
    if match is None:
        raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "NOT_A_ROOT", "the certificate is no root of a mesh")
    return match[1]


def _bundle(address: str) -> str:
    """What a front answers to somebody who knows nothing yet."""
    try:
        host, port = host_port(address)
    except ValueError as error:
        raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS", str(error)) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what comes is held against the fingerprint, and nothing secret is sent
    context.set_alpn_protocols([certificates.ROOTS])
    data = b""
    try:
        with (
            socket.create_connection((host, port), CONNECT_SECONDS) as plain,
            context.wrap_socket(plain) as connection,
        ):
            while len(data) < MOST_BYTES and (chunk := connection.recv(65536)):
                data += chunk
    except OSError as error:
        raise FalkirkError(
            grpc.StatusCode.UNAVAILABLE, "SERVICE_UNREACHABLE", f"{address}: {error.strerror or error}"
        ) from error
    return data.decode("ascii", "replace")


def _split(bundle: str) -> list[str]:
    return re.findall(r"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----\n?", bundle)
