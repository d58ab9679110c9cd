"""Values of the flow tracker as protos."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from falkirk.api.flow.v1 import flow_service_pb2 as pb
from falkirk.api.net.v1 import net_pb2
from falkirk.flow.live import LiveRecord
from falkirk.flow.text import address_text
from falkirk.runtime.contexts import context_proto

if TYPE_CHECKING:
    from falkirk.flow.fleet import Fleet

PROTOCOLS = {6: net_pb2.PROTOCOL_TCP, 17: net_pb2.PROTOCOL_UDP, 1: net_pb2.PROTOCOL_ICMP, 58: net_pb2.PROTOCOL_ICMP}
TREATMENTS = {
    "l3": net_pb2.TREATMENT_L3,
    "l4": net_pb2.TREATMENT_L4,
    "http": net_pb2.TREATMENT_HTTP,
    "ssh": net_pb2.TREATMENT_SSH,
}


def flow_of_live(record: LiveRecord, worker: int, fleet: Fleet) -> pb.Flow | None:
    """A flow out of the live table; None where its tunnel is gone already."""
    context = fleet.context(worker, record.tunnel)
    if context is None:
        return None
    flow = pb.Flow(
        id=record.flow_id.hex(),
        key=net_pb2.FlowKey(
            source_address=address_text(record.source),
            source_port=record.source_port,
            destination_address=address_text(record.destination),
            destination_port=record.destination_port,
            protocol=PROTOCOLS.get(record.protocol, net_pb2.PROTOCOL_OTHER),
            protocol_number=record.protocol,
        ),
        state=pb.FlowState.Name(record.state),
        tunnel_id=record.tunnel,
        context=context_proto(context),
        treatment=net_pb2.TREATMENT_L3 if record.forwarded else net_pb2.TREATMENT_L4,
        rule=record.rule,
        route_id=str(uuid.UUID(bytes=record.route_id)) if any(record.route_id) else "",
        worker=worker,
        slot_address=fleet.slot_address(worker, record),
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        packets_up=record.packets_up,
        packets_down=record.packets_down,
    )
    if record.forwarded or record.lower_slot:
        route = fleet.routes.lookup(context.virtual_network_id, record.destination)
        if route is not None and route.device is not None:
            flow.destination_device = route.device.device
            flow.destination_user = route.device.user
            flow.destination_groups.extend(route.device.groups)
    flow.start_time.FromNanoseconds(record.start)
    flow.last_time.FromNanoseconds(record.last)
    return flow
