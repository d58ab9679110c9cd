"""What a device asks the registry: to become one, and then, proving each time that it holds its key, how its tunnel is now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import msgspec

from falkirk.api.registry.v1 import device_service_pb2 as pb
from falkirk.api.registry.v1.device_service_pb2_grpc import DeviceServiceStub
from falkirk.cli import posture
from falkirk.cli.device_state import BadState, Enrolled, Place, State, Tunnel
from falkirk.linux.wireguard.request import PeerRequest
from falkirk.runtime import remote
from falkirk.runtime.client import sync_channel
from falkirk.runtime.errors import FalkirkError, from_rpc
from falkirk.wireguard import proof

ASK_SECONDS: Final = 3.0
"""How long a device that is known already waits for an answer."""


class Unreachable(Exception):
    """The registry can't be reached; the text is a reason."""


class MayNotConnect(Exception):
    """The registry knows the device, and doesn't let it connect."""

    def __init__(self, message: str, reason: str, remedy: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.remedy = remedy


@contextmanager
def stub(place: Place) -> Iterator[DeviceServiceStub]:
    """A stub of the registry's DeviceService. Raises FalkirkError where no road leads there."""
    if not place.address:
        with sync_channel(Path(place.run_dir), "registry") as channel:
            yield DeviceServiceStub(channel)
        return
    with remote.channel(place.address, place.roots) as channel:
        yield DeviceServiceStub(channel)


def taken(enrolled: Enrolled, device: pb.Device, tunnel: pb.TunnelConfig) -> Enrolled:
    """With what the registry said."""
    peers = tuple(
        PeerRequest(
            public_key=_key(peer.public_key),
            endpoints=tuple(peer.endpoints),
            allowed=tuple(peer.allowed_prefixes),
            keepalive_s=float(peer.keepalive_s),
        )
        for peer in tunnel.peers
    )
    return msgspec.structs.replace(
        enrolled,
        device_id=device.metadata.id,
        tenant=device.metadata.tenant,
        name=device.metadata.name,
        registry_key=_key(tunnel.registry_key) if tunnel.registry_key else enrolled.registry_key,
        tunnel=Tunnel(
            addresses=tuple(tunnel.addresses),
            mtu=tunnel.mtu,
            dns=tuple(tunnel.dns_servers),
            search=tuple(tunnel.search_domains),
            peers=peers,
        ),
    )


def _key(text: str) -> bytes:
    try:
        return proof.key_of(text)
    except ValueError:
        raise BadState(f"the registry answered with a key that isn't one: {text!r}") from None


def _prove(enrolled: Enrolled, purpose: str, said: bytes = b"") -> pb.DeviceProof:
    moment = time.time_ns()
    made = proof.make(enrolled.private_key, enrolled.registry_key, purpose, moment, said)
    return pb.DeviceProof(device_id=enrolled.device_id, time_ns=moment, mac=made)


def refresh(kept: State, enrolled: Enrolled) -> Enrolled:
    """As the registry says it is now, stored; and the facts reported, where they have changed.

    Raises Unreachable, MayNotConnect, BadState; FalkirkError where it refuses.
    """
    try:
        with stub(enrolled.place) as registry:
            request = pb.DeviceServiceDescribeRequest(proof=_prove(enrolled, proof.DESCRIBE))
            answer = registry.Describe(request, timeout=ASK_SECONDS)
            _admitted(enrolled, answer.device)
            enrolled = taken(enrolled, answer.device, answer.tunnel)
            # Facts of one's own (--fact) stay until they are given anew.
            facts = enrolled.posture | posture.collect()
            if facts != enrolled.posture:
                shown = _prove(enrolled, proof.POSTURE, proof.posture(facts))
                registry.ReportPosture(
                    pb.DeviceServiceReportPostureRequest(proof=shown, posture=facts), timeout=ASK_SECONDS
                )
                enrolled = msgspec.structs.replace(enrolled, posture=facts)
    except (grpc.RpcError, FalkirkError) as error:
        told = error if isinstance(error, FalkirkError) else from_rpc(error)
        if told.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise Unreachable(told.reason) from None
        raise told from None
    kept.write(enrolled)
    return enrolled


def _admitted(enrolled: Enrolled, device: pb.Device) -> None:
    if device.pending:
        raise MayNotConnect(
            f"{enrolled.name} waits for an administrator's approval",
            "PENDING",
            f"`falkirk device approve --tenant {enrolled.tenant} {enrolled.name}`",
        )
    if device.disabled:
        raise MayNotConnect(f"{enrolled.name} is disabled by an administrator", "DEVICE_DISABLED")
