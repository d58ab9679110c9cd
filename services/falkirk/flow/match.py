"""Which flows a filter takes."""

from __future__ import annotations

import ipaddress

from falkirk.api.flow.v1 import flow_service_pb2 as pb


class FlowMatch:
    """A FlowFilter, made ready. Raises ValueError where its destination is neither an address nor a prefix."""

    def __init__(self, chosen: pb.FlowFilter) -> None:
        self._chosen = chosen
        self._network = ipaddress.ip_network(chosen.destination, strict=False) if chosen.destination else None

    def flow(self, flow: pb.Flow) -> bool:
        """Whether every set field holds."""
        chosen = self._chosen
        return (
            (not chosen.tenant or chosen.tenant == flow.context.tenant)
            and (not chosen.device or chosen.device == flow.context.device)
            and (not chosen.user or chosen.user == flow.context.user)
            and (not chosen.destination_port or chosen.destination_port == flow.key.destination_port)
            and (not chosen.protocol or chosen.protocol == flow.key.protocol)
            and (self._network is None or self._covers(self._network, flow.key.destination_address))
        )

    @staticmethod
    def _covers(network: ipaddress.IPv4Network | ipaddress.IPv6Network, address: str) -> bool:
        # A record of refusals that were only counted has no address.
        return bool(address) and ipaddress.ip_address(address) in network
