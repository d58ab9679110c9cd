"""Messages to values and back: AuthorityService, and what it does by itself: the next root in time, old ones retired."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import structlog

from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
from falkirk.decide.callers import NAME, Caller, Role
from falkirk.registry import enrolment, principals
from falkirk.registry.authority import SECOND, Authority, Signed
from falkirk.registry.engine import Engine, Surroundings
from falkirk.registry.enrolment import Person
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.service import Desk, refusal
from falkirk.registry.store import Writing
from falkirk.runtime import access, callers
from falkirk.runtime.errors import FalkirkError

T = TypeVar("T")

VALID_SECONDS: Final = 86_400
MOST_SECONDS: Final = 7 * 86_400
LOOK_SECONDS: Final = 60.0
"""How often roots are looked at."""
SECRET_BYTES: Final = 32

log = structlog.get_logger()


class AuthorityService(pb_grpc.AuthorityServiceServicer):
    """See the proto. `services` are the addresses of TCP ports, as the settings have them; `person` says whom an OIDC token is about."""

    def __init__(
        self,
        authority: Authority,
        desk: Desk,
        surroundings: Surroundings,
        services: Mapping[str, str],
        person: Callable[[str, str], Awaitable[Person]],
    ) -> None:
        self._person = person
        self._authority, self._desk, self._surroundings = authority, desk, surroundings
        self._services = services
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Looks at the roots now and then, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if await self._write(self._authority.rotate_in_time):
                    log.info("root_rotated")
            except FalkirkError as error:
                log.error("root_not_rotated", why=error.message)
            self._announce()  # a root may have retired

    async def Show(self, request: pb.AuthorityServiceShowRequest, context: Any) -> pb.AuthorityServiceShowResponse:
        """See the proto."""
        return pb.AuthorityServiceShowResponse(trust=await self._write(self._authority.trust))

    async def WatchTrust(
        self, request: pb.AuthorityServiceWatchTrustRequest, context: Any
    ) -> AsyncIterator[pb.AuthorityServiceWatchTrustResponse]:
        """See the proto."""
        last = None
        while True:
            changed = self._changed
            trust = await self._write(self._authority.trust)
            if trust != last:
                last = trust
                yield pb.AuthorityServiceWatchTrustResponse(trust=trust)
            else:
                await changed.wait()

    async def SignNode(
        self, request: pb.AuthorityServiceSignNodeRequest, context: Any
    ) -> pb.AuthorityServiceSignNodeResponse:
        """See the proto."""
        caller = callers.current.get()
        if caller is not None and caller.name != request.node:
            raise refusal(Refused(Reason.NODE_FORBIDDEN, f"{caller} gets certificates for itself only"))
        if not NAME.match(request.node):
            raise refusal(
                Refused(Reason.INVALID_FIELD, "node: must have 1 to 64 letters, digits and ._@+-", field="node")
            )
        if caller is not None and request.names:
            raise refusal(
                Refused(Reason.NODE_FORBIDDEN, "names: are given on the registry's own machine only", field="names")
            )
        named = Caller("", Role.NODE, request.node, request.node)
        signed = await self._write(
            lambda connection, now: self._authority.sign(connection, request.request, named, request.names, now)
        )
        principal = pb.Principal(id=named.id, name=named.name, role=principals.number(Role.NODE))
        return pb.AuthorityServiceSignNodeResponse(credentials=self._credentials(signed, principal))

    async def Login(self, request: pb.AuthorityServiceLoginRequest, context: Any) -> pb.AuthorityServiceLoginResponse:
        """See the proto. What refuses the login is stored all the same: a token that was tried with a bad request is used up."""

        if request.oidc_token:
            outcome: Any = await self._signed_in(request)
            return pb.AuthorityServiceLoginResponse(credentials=self._credentials(*outcome))

        def work(connection: Any, now: int) -> tuple[Signed, pb.Principal] | Refused:
            try:
                named = principals.admit(connection, request.secret, now)
                signed = self._authority.sign(connection, request.request, named, (), now)
            except Refused as refused:
                return refused
            return signed, principals.get(connection, named.id)

        outcome = await self._write(work)
        if isinstance(outcome, Refused):
            raise refusal(outcome)
        log.info("logged_in", principal=outcome[1].name, tenant=outcome[1].tenant)
        return pb.AuthorityServiceLoginResponse(credentials=self._credentials(*outcome))

    async def _signed_in(self, request: pb.AuthorityServiceLoginRequest) -> tuple[Signed, pb.Principal, bool]:
        person = await self._person(request.oidc_token, request.tenant)

        def work(engine: Engine) -> tuple[Signed, pb.Principal, bool]:
            user = enrolment.sign_in(engine, person)
            now = time.time_ns()
            named = principals.sign_in(engine.connection, self._surroundings.new_id(), user, person.role, now)
            signed = self._authority.sign(engine.connection, request.request, named, (), now)
            return signed, principals.get(engine.connection, named.id), False

        outcome = await self._desk.write(work)
        log.info("logged_in", principal=outcome[1].name, tenant=outcome[1].tenant, issuer=person.issuer)
        return outcome

    async def Renew(self, request: pb.AuthorityServiceRenewRequest, context: Any) -> pb.AuthorityServiceRenewResponse:
        """See the proto."""
        caller = callers.current.get()
        if caller is None:
            raise refusal(Refused(Reason.NO_CERTIFICATE, "there is no certificate to renew: call over TCP with one"))

        def work(connection: Any, now: int) -> tuple[Signed, pb.Principal]:
            named = principals.renew(connection, caller.id, now)
            signed = self._authority.sign(connection, request.request, named, (), now)
            return signed, principals.get(connection, named.id)

        return pb.AuthorityServiceRenewResponse(credentials=self._credentials(*await self._write(work)))

    async def CreateLogin(
        self, request: pb.AuthorityServiceCreateLoginRequest, context: Any
    ) -> pb.AuthorityServiceCreateLoginResponse:
        """See the proto."""
        try:
            role = access.role(request.role)
        except ValueError:
            raise refusal(Refused(Reason.INVALID_FIELD, "role: must be given", field="role")) from None
        seconds = request.valid_seconds or VALID_SECONDS
        if seconds > MOST_SECONDS:
            most = f"valid_seconds: {MOST_SECONDS} at most"
            raise refusal(Refused(Reason.INVALID_FIELD, most, field="valid_seconds"))
        tenant_id = await self._tenant(request.tenant)
        secret = self._surroundings.random(SECRET_BYTES)

        def work(connection: Any, now: int) -> pb.AuthorityServiceCreateLoginResponse:
            if request.first and principals.ever(connection):
                raise Refused(Reason.NOT_FIRST, "the first administrator has been made already")
            made = principals.make(connection, self._surroundings.new_id(), tenant_id, request.name, role, now)
            end = now + seconds * SECOND
            principals.offer(connection, made.id, secret, end)
            root = self._authority.trust(connection, now).roots[-1]
            answer = pb.AuthorityServiceCreateLoginResponse(
                token=principals.token(secret, root.fingerprint), principal=made
            )
            answer.expire_time.FromNanoseconds(end)
            return answer

        return await self._write(work)

    async def ListPrincipals(
        self, request: pb.AuthorityServiceListPrincipalsRequest, context: Any
    ) -> pb.AuthorityServiceListPrincipalsResponse:
        """See the proto."""
        tenant_id = await self._tenant(request.tenant)
        found = await self._desk.read(lambda connection: principals.every(connection, tenant_id))
        return pb.AuthorityServiceListPrincipalsResponse(principals=found)

    async def Revoke(
        self, request: pb.AuthorityServiceRevokeRequest, context: Any
    ) -> pb.AuthorityServiceRevokeResponse:
        """See the proto."""
        tenant_id = await self._tenant(request.tenant)
        revoked = await self._write(lambda connection, now: principals.revoke(connection, tenant_id, request.name, now))
        self._announce()
        return pb.AuthorityServiceRevokeResponse(principal=revoked)

    async def Rotate(
        self, request: pb.AuthorityServiceRotateRequest, context: Any
    ) -> pb.AuthorityServiceRotateResponse:
        """See the proto."""

        def work(connection: Any, now: int) -> pb.Trust:
            self._authority.rotate(connection, now)
            return self._authority.trust(connection, now)

        trust = await self._write(work)
        log.info("root_rotated")
        self._announce()
        return pb.AuthorityServiceRotateResponse(trust=trust)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _tenant(self, given: str) -> str:
        """The id of a tenant given by name or id; "" where none is."""
        return str((await self._desk.tenant(given)).metadata.id) if given else ""

    async def _write(self, work: Callable[[Any, int], T]) -> T:
        def inside(writing: Writing) -> T:
            return work(writing.connection, time.time_ns())

        return await self._desk.transaction(inside)

    def _credentials(self, signed: Signed, principal: pb.Principal, renewable: bool = True) -> pb.Credentials:
        made = pb.Credentials(
            chain=signed.chain,
            roots=signed.roots,
            mesh=signed.mesh,
            principal=principal,
            services=self._services,
            renewable=renewable,
        )
        made.expire_time.FromNanoseconds(int(signed.end) * SECOND)
        return made
