"""What a producer asks for, and how it is refused. PURE.

A context parser is a function `bytes -> ContextRequest` that raises `Refusal`. `json` is the default, `protobuf` is
built in, others are found by name in the entry-point group `falkirk.context_parsers`.

Limit: a parser sees one datagram of at most `MAX_CONTEXT` bytes, from a peer that nothing is known of but its uid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from falkirk.wire.context import Framing, Transport

MAX_CONTEXT: Final = 16 * 1024
VERSION: Final = 1
PRODUCERS: Final = (Transport.SOCKET, Transport.DEVICE)
"""Transports that a producer may ask for."""
_SHOWN: Final = 80


class Code(StrEnum):
    """Why a producer isn't admitted; part of the tunnel protocol: may be added to, never renamed."""

    INVALID_CONTEXT = "INVALID_CONTEXT"
    """The first datagram can't be read: its shape, a type, an empty datagram, descriptors beside it."""
    UNKNOWN_KEY = "UNKNOWN_KEY"
    """The context says something that this version doesn't know."""
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    """`v` isn't 1."""
    TOO_LARGE = "TOO_LARGE"
    """The first datagram has more than 16 KiB."""
    UID_FORBIDDEN = "UID_FORBIDDEN"
    """The peer's uid may not connect at all."""
    TENANT_FORBIDDEN = "TENANT_FORBIDDEN"
    """The peer's uid may not speak for this tenant, whether there is one of that name or not."""
    TRANSPORT_FORBIDDEN = "TRANSPORT_FORBIDDEN"
    """The peer's uid may not hand a device over."""
    UNKNOWN_TENANT = "UNKNOWN_TENANT"
    UNKNOWN_DEVICE = "UNKNOWN_DEVICE"
    DEVICE_DISABLED = "DEVICE_DISABLED"
    USER_DISABLED = "USER_DISABLED"
    UNKNOWN_VIRTUAL_NETWORK = "UNKNOWN_VIRTUAL_NETWORK"
    NOT_READY = "NOT_READY"
    """The on-ramp knows no devices yet, or the flow worker isn't there; try again."""
    TIMEOUT = "TIMEOUT"
    """No context came in time."""
    LIMIT = "LIMIT"
    """Too many connections or tunnels."""
    ADOPT_REFUSED = "ADOPT_REFUSED"
    """The flow worker didn't take the tunnel."""
    GONE = "GONE"
    """The producer closed before it got an answer; only counted."""


class Refusal(Exception):
    """A producer's context isn't accepted; the peer's fault unless the code says otherwise."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def answer(self) -> bytes:
        """The datagram that tells the producer."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


class ContextRequest(msgspec.Struct, frozen=True):
    """A context as asked for: names, not ids."""

    tenant: str
    device: str
    virtual_network: str = ""
    """Empty takes the device's selected one, else the tenant's default."""
    framing: Framing = Framing.RAW
    attributes: Mapping[str, str] = {}
    packed: bool = False
    """Several packets in one datagram are welcome; with raw framing only."""
    transport: Transport = Transport.SOCKET


def shown(name: object) -> str:
    """A peer's words for a message: quoted, escaped, and cut."""
    text = json.dumps(str(name))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + '..."'


def checked(request: ContextRequest) -> ContextRequest:
    """What every parser's result must satisfy, third-party ones too. Raises Refusal."""
    for name, value in (("tenant", request.tenant), ("device", request.device)):
        if not value:
            raise Refusal(Code.INVALID_CONTEXT, f"{name} is missing")
    if not isinstance(request.framing, Framing):
        raise Refusal(Code.INVALID_CONTEXT, "framing must be raw or vnet")
    if request.transport not in PRODUCERS:
        raise Refusal(Code.INVALID_CONTEXT, "transport must be socket or device")
    if request.packed and (request.framing is not Framing.RAW or request.transport is not Transport.SOCKET):
        raise Refusal(Code.INVALID_CONTEXT, "packed is for raw framing over the socket")
    try:
        for text in (request.tenant, request.device, request.virtual_network):
            text.encode()
        for key, value in request.attributes.items():
            key.encode()
            value.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        # A lone surrogate can be written in JSON, but in nothing that we would send on.
        raise Refusal(Code.INVALID_CONTEXT, "names and attributes must be text that UTF-8 can carry") from error
    return request
