"""What `falkirk explain` asks of the services about a packet: as whom, which way, by which rule, and all of it stage by stage.

Services are asked one after the other, since each question needs the answers before it. Modules of gRPC are imported when something is asked: `--help` is
quick.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple

from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse
from falkirk.wire.protocol import ICMP, ICMPV6, TCP, UDP

SECONDS: Final = 5.0
NAMES: Final = {TCP: "TCP", UDP: "UDP", ICMP: "ICMP", ICMPV6: "ICMP"}

Answers = dict[str, Any]
"""By service: its response, the FalkirkError that came instead, or None where it wasn't asked."""


class Flow(NamedTuple):
    """What routes and rules look at."""

    destination: str
    port: int
    protocol: int

    @property
    def name(self) -> str:
        """The protocol as the API has it."""
        return f"PROTOCOL_{NAMES.get(self.protocol, 'OTHER')}"


def flow_of(data: bytes) -> Flow | None:
    """The flow that a packet would begin; None where it can't begin one: it isn't whole, or says something of another packet."""
    try:
        packet = parse(data, 0, len(data))
    except MalformedPacket:
        return None
    if packet.is_icmp_error:
        return None
    return Flow(str(ip_address(packet.destination)), packet.destination_port, packet.protocol)


class Questions:
    """About packets of one device."""

    def __init__(self, run_dir: Path, tenant: str, device: str, virtual_network: str) -> None:
        from falkirk.api.net.v1 import net_pb2
        from falkirk.api.onramp.v1 import onramp_service_pb2, onramp_service_pb2_grpc

        self._run_dir, self._tenant, self._device, self._network = run_dir, tenant, device, virtual_network
        self.admission = self._ask(
            "onramp",
            lambda channel: onramp_service_pb2_grpc.OnrampServiceStub(channel).Explain,
            onramp_service_pb2.ExplainRequest(tenant=tenant, device=device, virtual_network=virtual_network),
        )
        """The on-ramp's answer."""
        self.refused = getattr(self.admission, "admitted", True) is False
        self._known = not self.refused and not isinstance(self.admission, Exception)
        self._context = self.admission.context if self._known else net_pb2.TunnelContext(tenant=tenant, device=device)

    def address(self, version: int) -> bytes:
        """An address of the device; empty where it has none of this version, or isn't known."""
        for text in self._context.addresses:
            address = ip_address(text)
            if address.version == version:
                return address.packed
        return b""

    def about(self, flow: Flow | None, packet: bytes = b"") -> Answers:
        """Everybody's answer. Without a packet the flow tracker takes the first one that the flow would have."""
        router = self._route(flow) if flow is not None else None
        policy = self._rules(flow, router) if flow is not None and self._known else None
        return {
            "onramp": self.admission,
            "router": router,
            "policy": policy,
            "flow": None if self.refused else self._stages(flow, packet),
        }

    def _route(self, flow: Flow) -> Any:
        from falkirk.api.router.v1 import router_service_pb2, router_service_pb2_grpc

        return self._ask(
            "router",
            lambda channel: router_service_pb2_grpc.RouterServiceStub(channel).Explain,
            router_service_pb2.ExplainRequest(
                tenant=self._tenant,
                virtual_network=self._context.virtual_network or self._network,
                destination_address=flow.destination,
            ),
        )

    def _rules(self, flow: Flow, router: Any) -> Any:
        from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc

        routes = getattr(router, "routes", ())
        return self._ask(
            "policy",
            lambda channel: policy_service_pb2_grpc.PolicyServiceStub(channel).Explain,
            policy_service_pb2.ExplainRequest(
                question=policy_service_pb2.Question(
                    context=self._context,
                    destination_address=flow.destination,
                    destination_port=flow.port,
                    protocol=flow.name,
                    destination_device=routes[0].device if routes else None,
                )
            ),
        )

    def _stages(self, flow: Flow | None, packet: bytes) -> Any:
        from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc

        # Without the on-ramp's answer the flow tracker still knows whom an open tunnel speaks for.
        request = flow_service_pb2.ExplainRequest(
            tenant=self._tenant,
            device=self._device,
            context=self._context if self._known else None,
            packet=packet,
            destination_address=flow.destination if flow is not None else "",
            destination_port=flow.port if flow is not None else 0,
            protocol=flow.name if flow is not None else None,
        )
        return self._ask("flow", lambda channel: flow_service_pb2_grpc.FlowServiceStub(channel).Explain, request)

    def _ask(self, service: str, method: Callable[[Any], Any], request: Any) -> Any:
        import grpc

        from falkirk.cli.connection import reach
        from falkirk.runtime.errors import FalkirkError, from_rpc

        try:
            with reach(self._run_dir, service) as channel:
                return method(channel)(request, timeout=SECONDS)
        except grpc.RpcError as error:
            return from_rpc(error)
        except FalkirkError as error:
            return error
