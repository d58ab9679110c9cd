"""OnrampService: proto <-> values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.onramp.v1 import onramp_service_pb2 as pb
from falkirk.api.onramp.v1 import onramp_service_pb2_grpc
from falkirk.onramp.admission import Grants, admit
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.control import PASSED, WIREGUARD, Opened
from falkirk.onramp.parent import Parent, WorkerAway
from falkirk.runtime.contexts import context_proto
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.replica import ResourceReplica
from falkirk.wire.context import Framing, Transport

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
MAX_REASON: Final = 200
_FRAMINGS: Final = {Framing.RAW: net_pb2.FRAMING_RAW, Framing.VNET: net_pb2.FRAMING_VNET}
_TRANSPORTS: Final = {
    Transport.SOCKET: net_pb2.TRANSPORT_SOCKET,
    Transport.DEVICE: net_pb2.TRANSPORT_DEVICE,
    Transport.TRUNK: net_pb2.TRANSPORT_TRUNK,
}


class OnrampService(onramp_service_pb2_grpc.OnrampServiceServicer):
    """Answers from the parent's table of tunnels and from the tables that the worker has too."""

    def __init__(
        self,
        parent: Parent,
        grants: Grants,
        replica: ResourceReplica,
        processes: Callable[[], Sequence[net_pb2.ProcessInfo]],
    ) -> None:
        self._parent, self._grants, self._replica, self._processes = parent, grants, replica, processes

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListResponse:
        """A page of open tunnels, ordered by id."""
        size = request.page_size or DEFAULT_PAGE
        if size > MAX_PAGE:
            raise _invalid("page_size", f"page_size must be at most {MAX_PAGE}")
        if request.page_token and not request.page_token.isdecimal():
            raise _invalid("page_token", "page_token must come from a previous page")
        after = int(request.page_token or 0)
        found = sorted(
            number
            for number, opened in self._parent.tunnels.items()
            if number > after and request.tenant in ("", opened.context.tenant)
        )
        return pb.ListResponse(
            tunnels=[self._tunnel(number) for number in found[:size]],
            next_page_token=str(found[size - 1]) if len(found) > size else "",
        )

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """One open tunnel."""
        if request.id not in self._parent.tunnels:
            raise _no_tunnel(request.id)
        return pb.GetResponse(tunnel=self._tunnel(request.id))

    async def Close(self, request: pb.CloseRequest, context: Any) -> pb.CloseResponse:
        """Returns when the tunnel is closed."""
        if len(request.reason) > MAX_REASON:
            raise _invalid("reason", f"reason must have at most {MAX_REASON} characters")
        try:
            found = await self._parent.close(request.id, request.reason or "closed_by_operator")
        except WorkerAway as error:
            raise FalkirkError(
                grpc.StatusCode.UNAVAILABLE, "WORKER_AWAY", "the on-ramp's worker is being restarted; try again"
            ) from error
        if not found:
            raise _no_tunnel(request.id)
        return pb.CloseResponse()

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """What a producer with this context would hear."""
        asked = ContextRequest(request.tenant, request.device, request.virtual_network)
        try:
            if request.HasField("uid"):
                self._grants.check(request.uid, asked.tenant)
            if not self._parent.loaded:
                raise Refusal(Code.NOT_READY, "the on-ramp knows no devices yet; is the registry running?")
            admitted = admit(self._parent.tables, asked)
        except Refusal as refusal:
            return pb.ExplainResponse(code=refusal.code, message=refusal.message, replica=self._replica.status())
        return pb.ExplainResponse(
            admitted=True, context=context_proto(admitted.context), replica=self._replica.status(), message="admitted"
        )

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        """Counts since the service started."""
        counts = self._parent.counts()
        return pb.StatsResponse(
            open=len(self._parent.tunnels),
            admitted=counts["admitted"],
            refused=[net_pb2.Counter(name=code, value=counts[code]) for code in Code],
            replicas=[self._replica.status(), self._admission()],
            processes=self._processes(),
            wireguard=self._wireguard(counts),
        )

    def _tunnel(self, number: int) -> pb.Tunnel:
        tunnel, heard = _tunnel(self._parent.tunnels[number]), self._parent.heard.get(number)
        if heard is not None:
            tunnel.wireguard.endpoint = heard.endpoint
            tunnel.wireguard.received_bytes, tunnel.wireguard.sent_bytes = heard.received_bytes, heard.sent_bytes
            tunnel.wireguard.last_handshake.FromNanoseconds(heard.handshake)
        return tunnel

    def _wireguard(self, counts: Mapping[str, int]) -> pb.WireGuardStatus | None:
        if not self._parent.wireguard_key:
            return None
        return pb.WireGuardStatus(
            public_key=self._parent.wireguard_key_text,
            port=self._parent.wireguard.port,
            endpoints=self._parent.wireguard.endpoints,
            devices=len(self._parent.heard),
            passed_on=counts[PASSED],
            dropped=[
                net_pb2.Counter(name=name.removeprefix(WIREGUARD), value=count)
                for name, count in counts.items()
                if name.startswith(WIREGUARD)
            ],
        )

    def _admission(self) -> net_pb2.ReplicaStatus:
        """The workers' tables, whose revision may be a moment behind the replica's."""
        resources = self._replica.status()
        return net_pb2.ReplicaStatus(
            name="admission",
            revision=self._parent.applied,
            live=resources.live,
            source=resources.source,
            items=len(self._parent.tables),
        )


def _invalid(field: str, message: str) -> FalkirkError:
    return FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, field=field)


def _no_tunnel(number: int) -> FalkirkError:
    return FalkirkError(grpc.StatusCode.NOT_FOUND, "TUNNEL_NOT_FOUND", f"tunnel {number} isn't open", id=number)


def _tunnel(opened: Opened) -> pb.Tunnel:
    tunnel = pb.Tunnel(
        id=opened.tunnel,
        context=context_proto(opened.context),
        framing=_FRAMINGS[opened.framing],
        transport=_TRANSPORTS[opened.transport],
        mtu=opened.mtu,
        flow_worker=opened.flow_worker,
        peer_uid=opened.uid,
        peer_pid=opened.pid,
    )
    tunnel.admitted_at.FromNanoseconds(opened.admitted_at)
    return tunnel
