"""Ways into a server, and what each lets pass.

A *road* is a unix socket in one of three directories: the directory says who comes in, and a method whose declared access is above the road is refused
with PERMISSION_DENIED, reason ROAD_FORBIDDEN, metadata `road` and `needs`. The *TCP gate* knows each caller by its certificate and judges by the table
of roles (`falkirk.runtime.access`, `falkirk.decide.callers`). A method that declares no access passes neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import grpc

from falkirk.decide import callers
from falkirk.decide.callers import Caller, Refusal
from falkirk.runtime import access, roads
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.settings import Road

TCP: Final = "tcp"
"""The TCP gate's name in metrics and records."""


class CallRefused(FalkirkError):
    """A gate lets a call not pass."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        gate: str,
        caller: Caller | None,
        peer: str,
        **about: str,
    ) -> None:
        super().__init__(code, reason, message, **about)
        self.gate, self.caller, self.peer = gate, caller, peer


REFUSING: Final = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})
"""Statuses that say no to who calls, whoever says it: all of them are told to the audit log."""


class Gate(Protocol):
    """A way in."""

    @property
    def name(self) -> str:
        """admin, mesh, read or tcp."""

    def enter(self, method: str, context: Any) -> Caller | None:
        """Before anything is read of a call: who calls, None where the gate doesn't know. Raises CallRefused."""

    def look(self, method: str, context: Any, caller: Caller | None, request: Any, *, first: bool) -> None:
        """Each request before its handler has it. Raises CallRefused."""

    def told(self, error: FalkirkError, context: Any, caller: Caller | None) -> CallRefused:
        """A refusal by the handler, as if the gate had said it."""


class RoadGate:
    """A socket directory."""

    def __init__(self, road: Road) -> None:
        self._road = road

    @property
    def name(self) -> str:
        """The road's."""
        return self._road

    def enter(self, method: str, context: Any) -> Caller | None:
        """Nobody is known by name."""
        needs = roads.required(method)
        if not roads.allowed(self._road, needs):
            where = f"it is served from {needs}/" if needs else "it declares no access"
            raise CallRefused(
                grpc.StatusCode.PERMISSION_DENIED,
                "ROAD_FORBIDDEN",
                f"{method.removeprefix('/')} can't be called by {self._road}/: {where}",
                gate=self.name,
                caller=None,
                peer="",
                road=self._road,
                needs=needs or "",
            )
        return None

    def look(self, method: str, context: Any, caller: Caller | None, request: Any, *, first: bool) -> None:
        """Whoever may enter the directory may ask for anything that it serves."""

    def told(self, error: FalkirkError, context: Any, caller: Caller | None) -> CallRefused:
        """A refusal by the handler."""
        return CallRefused(error.code, error.reason, error.message, gate=self.name, caller=None, peer="")


class Standing(Protocol):
    """What the TCP gate must know of the mesh."""

    @property
    def mesh(self) -> str:
        """Its id."""

    @property
    def revoked(self) -> Collection[str]:
        """Ids of principals that are no longer accepted."""


class TcpGate:
    """Certificates. `find` gives, by gRPC's name for the peer, the caller of a connection that the front holds, and its address; KeyError for any other."""

    def __init__(self, standing: Standing, find: Callable[[str], tuple[Caller | None, str]]) -> None:
        self._standing, self._find = standing, find

    @property
    def name(self) -> str:
        """As in metrics."""
        return TCP

    def enter(self, method: str, context: Any) -> Caller | None:
        """By the certificate, its time, revocation and role."""
        try:
            caller, peer = self._find(context.peer())
        except KeyError:
            # A process of this machine that has found the socket behind the front.
            refusal = Refusal("CERTIFICATE_NEEDED", "this socket is the TCP front's own", unauthenticated=True)
            raise _refused(refusal, None, context.peer()) from None
        refused = callers.admit(access.rule(method), caller, self._standing.mesh, time.time(), self._standing.revoked)
        if refused is not None:
            raise _refused(refused, caller, peer)
        return caller

    def look(self, method: str, context: Any, caller: Caller | None, request: Any, *, first: bool) -> None:
        """By the tenants that the request names, for callers who are bound to one. Of a stream, the first request must name one."""
        if caller is None or not caller.tenant_id:
            return
        rule = access.rule(method)
        if rule is None or rule.tenant in ((), access.ANY_TENANT):
            return  # `enter` has judged: refused, open to anyone, or of no tenant
        named, others = access.tenants(request, rule.tenant)
        if not first and not named:
            return
        refused = callers.in_tenant(caller, named, others)
        if refused is not None:
            raise _refused(refused, caller, self._peer(context))

    def told(self, error: FalkirkError, context: Any, caller: Caller | None) -> CallRefused:
        """A refusal by the handler."""
        peer = self._peer(context)
        return CallRefused(error.code, error.reason, error.message, gate=TCP, caller=caller, peer=peer)

    def _peer(self, context: Any) -> str:
        try:
            return self._find(context.peer())[1]
        except KeyError:
            return ""  # the connection has ended meanwhile


def _refused(refusal: Refusal, caller: Caller | None, peer: str) -> CallRefused:
    code = grpc.StatusCode.UNAUTHENTICATED if refusal.unauthenticated else grpc.StatusCode.PERMISSION_DENIED
    return CallRefused(code, refusal.reason, refusal.message, gate=TCP, caller=caller, peer=peer)
