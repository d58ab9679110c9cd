"""The handshake with the on-ramp: the first datagram each way on a connected tunnel.

We send who we speak for, as JSON; the answer is one JSON object with `admitted` or `error`. Both start with `{`, which
no IP packet does. Limits: the answer must come within `TIMEOUT_S` and be at most 16 KiB.
"""

from __future__ import annotations

import ipaddress
import select
import socket
from typing import Final

import msgspec

from falkirk.linux import seqpacket
from falkirk.linux.lower.request import Exit, LowerRequest, Stopped
from falkirk.wire.context import Framing, Transport

TIMEOUT_S: Final = 10.0
MAX_ANSWER: Final = 16 * 1024
FORBIDDEN: Final = "TRANSPORT_FORBIDDEN"
"""The on-ramp's code for a uid that may not hand a device over."""


class Admitted(msgspec.Struct, frozen=True):
    """What the on-ramp grants."""

    tunnel_id: str | int
    addresses: tuple[str, ...]
    """The only ones that the tunnel may speak from."""
    mtu: int
    framing: Framing
    transport: Transport = Transport.SOCKET

    def packed(self) -> list[bytes]:
        """The addresses as 4 or 16 bytes each. Raises ValueError."""
        return [ipaddress.ip_interface(address).ip.packed for address in self.addresses]


class Refusal(msgspec.Struct, frozen=True):
    """Why the on-ramp doesn't."""

    code: str
    message: str


class Answer(msgspec.Struct, frozen=True):
    """The on-ramp's datagram: one of the two."""

    admitted: Admitted | None = None
    error: Refusal | None = None


def context(request: LowerRequest, transport: Transport = Transport.SOCKET) -> bytes:
    """The first datagram."""
    fields: dict[str, object] = {
        "v": 1,
        "tenant": request.tenant,
        "device": request.device,
        "framing": request.framing.value,
    }
    if transport is not Transport.SOCKET:
        fields["transport"] = transport
    if request.virtual_network:
        fields["virtual_network"] = request.virtual_network
    if request.packed and request.framing is Framing.RAW and transport is Transport.SOCKET:
        fields["packed"] = True
    if request.attributes:
        fields["attributes"] = request.attributes
    return msgspec.json.encode(fields)


def read_answer(data: bytes, framing: Framing) -> Admitted:
    """What the on-ramp grants. Raises Stopped for a refusal, and for an answer that isn't one."""
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except msgspec.DecodeError as error:
        raise Stopped(Exit.REFUSED, "BAD_ANSWER", f"the on-ramp's answer can't be read ({error})") from error
    if answer.error is not None:
        raise Stopped(Exit.REFUSED, answer.error.code, answer.error.message)
    admitted = answer.admitted
    if admitted is None:
        raise Stopped(Exit.REFUSED, "BAD_ANSWER", "the on-ramp neither admitted nor refused")
    if admitted.framing is not framing:
        raise Stopped(Exit.REFUSED, "BAD_ANSWER", f"the on-ramp frames {admitted.framing}, we asked for {framing}")
    try:
        admitted.packed()
    except ValueError as error:
        raise Stopped(Exit.REFUSED, "BAD_ANSWER", f"the on-ramp's addresses can't be read ({error})") from error
    return admitted


def admit(request: LowerRequest) -> tuple[socket.socket, Admitted]:
    """Connect and be admitted; the tunnel from now on carries packets. Raises Stopped."""
    if request.transport is not None:
        return _admit(request, request.transport)
    try:
        return _admit(request, Transport.DEVICE)
    except Stopped as stopped:
        if stopped.code != FORBIDDEN:
            raise
    return _admit(request, Transport.SOCKET)


def _admit(request: LowerRequest, transport: Transport) -> tuple[socket.socket, Admitted]:
    try:
        tunnel = seqpacket.connect(request.tunnel)
    except OSError as error:
        reason = f"no on-ramp answers at {request.tunnel} ({error.strerror or error})"
        raise Stopped(Exit.REFUSED, "TUNNEL_UNAVAILABLE", reason) from error
    try:
        return tunnel, _exchange(tunnel, request, transport)
    except OSError as error:
        tunnel.close()
        raise Stopped(Exit.REFUSED, "TUNNEL_UNAVAILABLE", f"the on-ramp hung up ({error.strerror})") from error
    except Stopped:
        tunnel.close()
        raise


def _exchange(tunnel: socket.socket, request: LowerRequest, transport: Transport) -> Admitted:
    seqpacket.send(tunnel, context(request, transport))
    if not select.select([tunnel], [], [], TIMEOUT_S)[0]:
        raise Stopped(Exit.REFUSED, "TIMEOUT", f"the on-ramp didn't answer within {TIMEOUT_S:g} s")
    received = seqpacket.receive(tunnel, MAX_ANSWER, max_descriptors=0)
    if received is None or not received[0]:
        raise Stopped(Exit.REFUSED, "TUNNEL_UNAVAILABLE", "the on-ramp closed the tunnel without an answer")
    return read_answer(received[0], request.framing)
