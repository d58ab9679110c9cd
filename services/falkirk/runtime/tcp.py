"""A service's TCP port: the front, the gate behind it, and the certificate that the front shows.

The certificate is the node's, made by the registry's authority for a key that this process makes, and renewed after two thirds of its life, as soon as
there is a new root. It lies, with its key, in `<data_dir>/<service>/tls.pem` (0600), and what is trusted beside it in
`trust.pb`, so that a service that starts while the registry is away serves TCP all the same. What is trusted, and who is revoked, follows
`AuthorityService.WatchTrust`; while that is away the last word stands.

Limit: without a registry, TCP ends when the certificate does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from pathlib import Path
from typing import Final

import grpc
import structlog
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry

from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
from falkirk.decide.callers import NotAnIdentity
from falkirk.runtime import certificates, client
from falkirk.runtime.front import SWEEP_SECONDS, Front
from falkirk.runtime.gates import TcpGate
from falkirk.runtime.refusals import Refusals
from falkirk.runtime.settings import Shell, host_port

RETRY_SECONDS: Final = 0.5
LOOK_SECONDS: Final = 5.0
"""How often the certificate's age is looked at."""
CALL_SECONDS: Final = 10.0

log = structlog.get_logger()


class Port:
    """One service's, bound at once; `run` serves until cancelled. Raises SettingsError where it can't be bound."""

    def __init__(self, service: str, shell: Shell, metrics: CollectorRegistry, refusals: Refusals) -> None:
        self.backend = shell.run_dir / "admin" / f"{service}.tcp.sock"
        self._service, self._shell = service, shell
        self._front = Front(shell.listen_tcp[service], self.backend, metrics, refusals.connection)
        self.gate = TcpGate(self, self._front.find)
        self._files = _Files(shell.data(service))
        self._trust = pb.Trust()
        self._changed = asyncio.Event()
        self._signed_by = 0
        """Number of the root at the last signing; 0 before the first of this process."""

    @property
    def mesh(self) -> str:
        """The mesh's id; empty before the first trust."""
        return self._trust.mesh

    @property
    def revoked(self) -> frozenset[str]:
        """Ids of principals that are no longer accepted."""
        return self._revoked

    _revoked: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Serve, follow, renew."""
        trust = self._files.trust()
        if trust is not None:
            self._take(trust)
            self._show()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._front.run())
            tasks.create_task(self._sweep())
            async with client.channel(self._shell, "registry") as channel:
                stub = pb_grpc.AuthorityServiceStub(channel)
                tasks.create_task(self._follow(stub))
                await self._renew(stub)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._front.sweep(self._revoked)

    async def _follow(self, stub: pb_grpc.AuthorityServiceStub) -> None:
        while True:
            try:
                async for response in stub.WatchTrust(pb.AuthorityServiceWatchTrustRequest(), wait_for_ready=True):
                    self._take(response.trust)
                    self._files.keep_trust(response.trust)
                    self._show()
                    self._front.sweep(self._revoked)
                    self._changed.set()
            except grpc.aio.AioRpcError as error:
                log.debug("trust_waits", code=error.code().name)
            except OSError as error:
                log.error("trust_not_kept", why=str(error))
            await asyncio.sleep(RETRY_SECONDS)

    async def _renew(self, stub: pb_grpc.AuthorityServiceStub) -> None:
        while True:
            self._changed.clear()
            if self._trust.roots and self._is_due(time.time()):
                try:
                    await self._sign(stub)
                except grpc.aio.AioRpcError as error:
                    log.warning("certificate_waits", code=error.code().name, why=error.details())
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                except OSError as error:
                    log.error("certificate_not_kept", why=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_SECONDS)

    def _is_due(self, now: float) -> bool:
        """Whether it is time for the next certificate."""
        if self._signed_by and self._signed_by < self._trust.roots[-1].number:
            return True
        held = self._files.certificate()
        if held is None:
            return True
        try:
            caller = certificates.caller_of_pem(held)
        except NotAnIdentity:
            return True
        late = now >= caller.begin + (caller.end - caller.begin) * 2 / 3
        return late or caller.mesh != self._trust.mesh or caller.name != self._shell.node

    async def _sign(self, stub: pb_grpc.AuthorityServiceStub) -> None:
        key = certificates.new_key()
        response = await stub.SignNode(
            pb.AuthorityServiceSignNodeRequest(
                node=self._shell.node, request=certificates.request(key), names=self._names()
            ),
            timeout=CALL_SECONDS,
            wait_for_ready=True,
        )
        self._files.keep_certificate(response.credentials.chain + certificates.key_pem(key))
        self._signed_by = self._trust.roots[-1].number
        log.info("certificate_renewed", until=response.credentials.expire_time.ToJsonString())
        self._show()

    def _names(self) -> list[str]:
        host, _ = host_port(self._shell.listen_tcp[self._service])
        return [*self._shell.tcp_names, *([host] if host not in ("", "0.0.0.0", "::") else [])]

    def _take(self, trust: pb.Trust) -> None:
        self._trust = trust
        self._revoked = frozenset(trust.revoked)

    def _show(self) -> None:
        """Give the front what there is; nothing as long as either half is missing."""
        roots = "".join(root.certificate for root in self._trust.roots)
        if not roots or self._files.certificate() is None:
            return
        try:
            self._front.renew(certificates.server_context(str(self._files.tls), roots), roots)
        except (ssl.SSLError, OSError) as error:
            log.error("certificate_unusable", file=str(self._files.tls), why=str(error))


class _Files:
    """What a port keeps in its service's data directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.tls, self._trust = directory / "tls.pem", directory / "trust.pb"

    def certificate(self) -> str | None:
        """Chain and key, PEM; None where there is none."""
        try:
            return self.tls.read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def keep_certificate(self, text: str) -> None:
        """Whole or not at all, for its owner only."""
        _write(self.tls, text.encode())

    def trust(self) -> pb.Trust | None:
        """What was trusted last; None where nothing is known."""
        try:
            return pb.Trust.FromString(self._trust.read_bytes())
        except (OSError, DecodeError):
            return None

    def keep_trust(self, trust: pb.Trust) -> None:
        """As `keep_certificate`."""
        _write(self._trust, trust.SerializeToString())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    draft.rename(path)
