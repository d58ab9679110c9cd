"""Logins on this machine: a file for each mesh that somebody has logged in to, and channels with it.

`$XDG_CONFIG_HOME/falkirk/logins/<host>_<port>.json` (0600, its directory 0700) has the private key, the certificate, the roots and where the other services
listen. `FALKIRK_ADDRESS` (or `falkirk --address`) chooses one by the registry's address; without it commands use this machine's sockets. A certificate is
renewed by the command that finds half of its life gone; one that has ended needs a new login.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final

import grpc
import msgspec

from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
from falkirk.cli.connection import ADDRESS
from falkirk.decide.callers import NotAnIdentity
from falkirk.runtime import certificates, remote
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.settings import host_port

SECONDS: Final = 15.0


class Login(msgspec.Struct, kw_only=True):
    """What a file has."""

    address: str
    """The registry's, as it was given at login."""
    services: dict[str, str]
    chain: str
    key: str
    roots: str
    renewable: bool = True
    tenant: str = ""
    """The principal's, empty for one of the whole mesh."""


def log_in(address: str, roots: str, *, secret: str = "", oidc_token: str = "", tenant: str = "") -> pb.Principal:
    """Turn a login token's secret, or an issuer's ID token, into a login, and keep it. Raises FalkirkError, grpc.RpcError."""
    key = certificates.new_key()
    with remote.channel(address, roots) as channel:
        stub: Any = pb_grpc.AuthorityServiceStub(channel)
        request = pb.AuthorityServiceLoginRequest(
            secret=secret, oidc_token=oidc_token, tenant=tenant, request=certificates.request(key)
        )
        made: pb.Credentials = stub.Login(request, timeout=SECONDS).credentials
    _keep(address, made, certificates.key_pem(key))
    return made.principal


def log_out(address: str) -> bool:
    """Forget a login; whether there was one."""
    path = _path(address)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def channel(service: str) -> grpc.Channel:
    """A channel to a service of the mesh that was chosen. Raises FalkirkError."""
    login = _current(os.environ.get(ADDRESS, ""))
    where = _where(login, service)
    return remote.channel(where, login.roots, (login.chain, login.key))


def _where(login: Login, service: str) -> str:
    if service == "registry":
        return login.address
    listed = login.services.get(service)
    if listed is None:
        raise FalkirkError(
            grpc.StatusCode.UNAVAILABLE,
            "NOT_ON_TCP",
            f"{service} takes no calls over TCP in that mesh: its settings name no listen_tcp.{service}",
        )
    host, port = host_port(listed)
    if host in ("", "0.0.0.0", "::"):
        host = host_port(login.address)[0]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _current(address: str) -> Login:
    """The login, renewed where that is due."""
    try:
        login = msgspec.json.decode(_path(address).read_bytes(), type=Login)
        caller = certificates.caller_of_pem(login.chain)
    except (OSError, msgspec.DecodeError, NotAnIdentity) as error:
        raise FalkirkError(
            grpc.StatusCode.UNAUTHENTICATED, "NOT_LOGGED_IN", f"there is no login for {address}"
        ) from error
    now = time.time()
    if now >= caller.end:
        raise FalkirkError(grpc.StatusCode.UNAUTHENTICATED, "LOGIN_EXPIRED", f"the login for {address} has expired")
    if not login.renewable or now < (caller.begin + caller.end) / 2:
        return login
    key = certificates.new_key()
    try:
        with remote.channel(login.address, login.roots, (login.chain, login.key)) as connected:
            stub: Any = pb_grpc.AuthorityServiceStub(connected)
            request = pb.AuthorityServiceRenewRequest(request=certificates.request(key), tenant=login.tenant)
            made = stub.Renew(request, timeout=SECONDS).credentials
    except grpc.RpcError:
        return login  # it is still good; the registry may be away, and whatever else it is the call itself will tell
    return _keep(login.address, made, certificates.key_pem(key))


def _keep(address: str, made: pb.Credentials, key: str) -> Login:
    login = Login(
        address=address,
        services=dict(made.services),
        chain=made.chain,
        key=key,
        roots=made.roots,
        renewable=made.renewable,
        tenant=made.principal.tenant_id,
    )
    path = _path(address)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, msgspec.json.encode(login))
    finally:
        os.close(descriptor)
    draft.rename(path)
    return login


def _path(address: str) -> Path:
    try:
        host, port = host_port(address)
    except ValueError as error:
        raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS", str(error)) from error
    config = os.environ.get("XDG_CONFIG_HOME")
    base = Path(config) if config else Path.home() / ".config"
    return base / "falkirk" / "logins" / f"{host.replace('/', '_')}_{port}.json"
