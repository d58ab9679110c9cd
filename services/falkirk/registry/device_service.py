"""DeviceService and DeviceTokenService: the messages of enrolment to values and back.

A device's own calls carry their authority in the message (a token, a sign-in, a proof by its key), so they mean the same by whichever road they come.
An unknown token or a bad proof costs a read and nothing of the store's one writer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import structlog

from falkirk.api.registry.v1 import device_service_pb2 as pb
from falkirk.api.registry.v1 import device_token_service_pb2 as token_pb
from falkirk.decide.callers import Role
from falkirk.registry import enrolment, tokens, tunnel
from falkirk.registry.engine import Engine
from falkirk.registry.enrolment import Machine, Person
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.service import Desk, ResourceService, reached, refusal
from falkirk.registry.settings import OidcIssuer
from falkirk.runtime import oidc
from falkirk.runtime.errors import FalkirkError
from falkirk.wireguard import proof

log = structlog.get_logger()


class DeviceService(ResourceService):
    """Devices as resources, and as machines that enrol and speak for themselves."""

    def __init__(
        self,
        desk: Desk,
        private_key: bytes,
        issuers: Sequence[OidcIssuer],
        verifier: oidc.Verifier,
        alive: Callable[[str], bool],
        node_addresses: Sequence[str] = (),
    ) -> None:
        super().__init__(BY_NAME["device"], desk)
        self._private_key, self._issuers, self._verifier, self._alive = private_key, issuers, verifier, alive
        self._node_addresses = tuple(node_addresses)
        self._public_key = proof.text_of(proof.public_of(private_key))

    async def Enroll(self, request: pb.DeviceServiceEnrollRequest, context: Any) -> pb.DeviceServiceEnrollResponse:
        """See the proto."""
        machine = Machine(request.name, request.public_key, dict(request.posture))
        match request.WhichOneof("authority"):
            case "token":
                await self._desk.read(lambda connection: _known(connection, request.token))
                device = await self._desk.write(lambda work: enrolment.by_token(work, request.token, machine))
            case "oidc_token":
                person = await self.person(request.oidc_token, request.tenant)
                device = await self._desk.write(lambda work: enrolment.by_person(work, person, machine))
            case _:
                raise refusal(
                    Refused(Reason.INVALID_FIELD, "authority: needs a token or an oidc_token", field="authority")
                )
        log.info(
            "device_enrolled",
            tenant=device.metadata.tenant,
            device=device.metadata.name,
            user=device.user,
            pending=device.pending,
        )
        return pb.DeviceServiceEnrollResponse(device=device, tunnel=await self._tunnel(device))

    async def Describe(
        self, request: pb.DeviceServiceDescribeRequest, context: Any
    ) -> pb.DeviceServiceDescribeResponse:
        """See the proto."""
        await self._looked_at(request.proof, proof.DESCRIBE)
        device = await self._desk.write(
            lambda work: enrolment.proved(work, request.proof, self._private_key, proof.DESCRIBE)
        )
        return pb.DeviceServiceDescribeResponse(device=device, tunnel=await self._tunnel(device))

    async def ReportPosture(
        self, request: pb.DeviceServiceReportPostureRequest, context: Any
    ) -> pb.DeviceServiceReportPostureResponse:
        """See the proto."""
        said = proof.posture(request.posture)
        await self._looked_at(request.proof, proof.POSTURE, said)

        def work(work: Engine) -> tuple[pb.Device, int]:
            stored = enrolment.proved(work, request.proof, self._private_key, proof.POSTURE, said)
            return enrolment.report_posture(work, stored, request.posture), reached(work)

        device, revision = await self._desk.write(work)
        return pb.DeviceServiceReportPostureResponse(device=device, revision=self._desk.revision(revision))

    async def RotateKey(
        self, request: pb.DeviceServiceRotateKeyRequest, context: Any
    ) -> pb.DeviceServiceRotateKeyResponse:
        """See the proto."""
        said = b""
        with suppress(ValueError):  # what isn't a key is refused as one once the proof has failed to say it
            said = proof.key_of(request.public_key)
        await self._looked_at(request.proof, proof.ROTATE, said)

        def work(work: Engine) -> tuple[pb.Device, int]:
            stored = enrolment.proved(work, request.proof, self._private_key, proof.ROTATE, said)
            return enrolment.rotate_key(work, stored, request.public_key), reached(work)

        device, revision = await self._desk.write(work)
        log.info("device_key_rotated", tenant=device.metadata.tenant, device=device.metadata.name)
        return pb.DeviceServiceRotateKeyResponse(device=device, revision=self._desk.revision(revision))

    async def Approve(self, request: pb.DeviceServiceApproveRequest, context: Any) -> pb.DeviceServiceApproveResponse:
        """See the proto."""
        device, revision = await self._desk.write(
            lambda work: (enrolment.approve(work, request.tenant, request.name), reached(work))
        )
        return pb.DeviceServiceApproveResponse(device=device, revision=self._desk.revision(revision))

    async def GetTunnel(
        self, request: pb.DeviceServiceGetTunnelRequest, context: Any
    ) -> pb.DeviceServiceGetTunnelResponse:
        """See the proto."""
        found = await self.Get(pb.DeviceServiceGetRequest(tenant=request.tenant, name=request.name), context)
        return pb.DeviceServiceGetTunnelResponse(device=found.device, tunnel=await self._tunnel(found.device))

    async def _looked_at(self, given: pb.DeviceProof, purpose: str, said: bytes = b"") -> None:
        """Refuse a bad proof before it costs the one writer anything."""
        now_ns = self._desk.now_ns()
        await self._desk.read(
            lambda connection: enrolment.check_proof(connection, now_ns, given, self._private_key, purpose, said)
        )

    async def _tunnel(self, device: pb.Device) -> pb.TunnelConfig:
        return await self._desk.read(
            lambda connection: tunnel.describe(connection, device, self._public_key, self._alive, self._node_addresses)
        )

    async def person(self, token: str, tenant: str) -> Person:
        """Whom an ID token is about. Raises FalkirkError."""
        try:
            identity = await self._verifier.verify(token)
        except oidc.Unavailable as error:
            raise FalkirkError(grpc.StatusCode.UNAVAILABLE, "ISSUER_UNAVAILABLE", str(error)) from error
        except oidc.NotAccepted as error:
            raise refusal(Refused(Reason.SIGN_IN_REFUSED, str(error), field="oidc_token")) from error
        try:
            return person_of(self._issuers, identity, tenant)
        except Refused as refused:
            raise refusal(refused) from refused


class DeviceTokenService:
    """Enrolment tokens; the generated base class has the same methods."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Create(
        self, request: token_pb.DeviceTokenServiceCreateRequest, context: Any
    ) -> token_pb.DeviceTokenServiceCreateResponse:
        """See the proto."""
        token, secret = await self._desk.write(lambda work: tokens.create(work, request.token))
        log.info("device_token_created", tenant=token.tenant, id=token.id, reusable=token.reusable)
        return token_pb.DeviceTokenServiceCreateResponse(token=token, secret=secret)

    async def List(
        self, request: token_pb.DeviceTokenServiceListRequest, context: Any
    ) -> token_pb.DeviceTokenServiceListResponse:
        """See the proto."""
        tenant = await self._desk.tenant(request.tenant)
        found = await self._desk.read(lambda connection: tokens.of_tenant(connection, tenant.metadata.id))
        return token_pb.DeviceTokenServiceListResponse(tokens=found)

    async def Revoke(
        self, request: token_pb.DeviceTokenServiceRevokeRequest, context: Any
    ) -> token_pb.DeviceTokenServiceRevokeResponse:
        """See the proto."""
        tenant = await self._desk.tenant(request.tenant)
        token = await self._desk.write(lambda work: tokens.revoke(work, tenant.metadata.id, request.id))
        log.info("device_token_revoked", tenant=token.tenant, id=token.id)
        return token_pb.DeviceTokenServiceRevokeResponse(token=token)


def person_of(issuers: Sequence[OidcIssuer], identity: oidc.Identity, tenant: str) -> Person:
    """Whom an identity is in a tenant, by the settings. Raises `Refused`."""
    serving = [
        issuer for issuer in issuers if issuer.issuer == identity.issuer and issuer.audience in identity.audiences
    ]
    chosen = [issuer for issuer in serving if tenant in ("", issuer.tenant)]
    if not chosen:
        raise Refused(Reason.SIGN_IN_REFUSED, "that issuer's users don't belong to that tenant", field="tenant")
    if len({issuer.tenant for issuer in chosen}) > 1:
        names = ", ".join(sorted({issuer.tenant for issuer in chosen}))
        raise Refused(Reason.INVALID_FIELD, f"tenant: the issuer serves several; choose one of {names}", field="tenant")
    issuer = chosen[0]
    groups = identity.words(issuer.groups_claim) if issuer.groups_claim else ()
    if issuer.required_groups and not set(issuer.required_groups) & set(groups):
        raise Refused(
            Reason.SIGN_IN_REFUSED, "the sign-in is in none of the groups that may enrol devices", field="oidc_token"
        )
    email = identity.text("email") if identity.claims.get("email_verified") is True else ""
    return Person(
        tenant=issuer.tenant,
        issuer=identity.issuer,
        subject=identity.subject,
        username=identity.text(issuer.name_claim) or email or identity.subject,
        email=email,
        groups=groups if issuer.groups_claim else None,
        needs_approval=issuer.needs_approval,
        device_lifetime_s=issuer.device_lifetime_s,
        role=Role.ADMINISTRATOR
        if set(issuer.administrator_groups) & set(groups)
        else Role.AUDITOR
        if set(issuer.auditor_groups) & set(groups)
        else Role.OWNER,
    )


def private_key(path: Path) -> bytes:
    """The registry's key for proofs of devices: read, or made where there is none yet (mode 0600). Raises OSError, and ValueError for what isn't a key."""
    try:
        return proof.key_of(path.read_text().strip())
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{path}: isn't a key (32 bytes in base64)") from error
    key = os.urandom(32)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(proof.text_of(key) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    return key


def _known(connection: Any, secret: str) -> None:
    if tokens.by_secret(connection, secret) is None:
        tokens.check_usable(None, 0)
