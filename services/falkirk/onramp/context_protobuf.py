"""The `protobuf` context format: a serialised `falkirk.api.net.v1.TunnelRequest`.

Limit: protobuf can't tell a missing `v` from 0; both are an unsupported version.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from falkirk.api.net.v1 import net_pb2
from falkirk.onramp.context import VERSION, Code, ContextRequest, Refusal, checked
from falkirk.wire.context import Framing, Transport

_FRAMINGS: Final = {
    net_pb2.FRAMING_UNSPECIFIED: Framing.RAW,
    net_pb2.FRAMING_RAW: Framing.RAW,
    net_pb2.FRAMING_VNET: Framing.VNET,
}
_TRANSPORTS: Final = {
    net_pb2.TRANSPORT_UNSPECIFIED: Transport.SOCKET,
    net_pb2.TRANSPORT_SOCKET: Transport.SOCKET,
    net_pb2.TRANSPORT_DEVICE: Transport.DEVICE,
}


def parse(data: bytes) -> ContextRequest:
    """The request in a first datagram. Raises Refusal."""
    try:
        message = net_pb2.TunnelRequest.FromString(data)
    except DecodeError as error:
        raise Refusal(Code.INVALID_CONTEXT, "not a TunnelRequest") from error
    if message.v != VERSION:
        raise Refusal(Code.UNSUPPORTED_VERSION, f"v must be {VERSION}, not {message.v}")
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise Refusal(Code.UNKNOWN_KEY, f"unknown field {unknown[0].field_number}")
    framing = _FRAMINGS.get(message.framing)
    if framing is None:
        raise Refusal(Code.INVALID_CONTEXT, f"unknown framing {message.framing}")
    transport = _TRANSPORTS.get(message.transport)
    if transport is None:
        raise Refusal(Code.INVALID_CONTEXT, f"unknown transport {message.transport}")
    return checked(
        ContextRequest(
            tenant=message.tenant,
            device=message.device,
            virtual_network=message.virtual_network,
            framing=framing,
            transport=transport,
            attributes=dict(message.attributes),
            packed=message.packed,
        )
    )
