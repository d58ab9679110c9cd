"""What this node tells the registry: that it is there (`NodeService.Announce`), and which devices are (`PresenceService.Report`).

A report every two seconds renews the node's lease and says what has changed; the whole is said where the registry asks for it, as it does when it was restarted.
A device with several tunnels is told once, by the one that WireGuard heard last, else the newest. While the registry is away nothing is lost: presence is what is
now, and the next report says it.

Limit: presence is up to two seconds old, and a node that dies is gone from it when its lease ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping
from typing import Final

import grpc
import structlog

import falkirk
from falkirk.api.registry.v1 import node_service_pb2 as node_pb
from falkirk.api.registry.v1 import node_service_pb2_grpc, presence_service_pb2_grpc
from falkirk.api.registry.v1 import presence_service_pb2 as pb
from falkirk.onramp.control import Heard, Opened
from falkirk.onramp.parent import Parent

REPORT_S: Final = 2.0
LEASE_MS: Final = 15_000
ANNOUNCE_S: Final = 60.0
"""How often the node says again that it is there, for a registry whose store was replaced."""
TIMEOUT_S: Final = 5.0
MOST: Final = 10_000
"""Devices of one report."""

log = structlog.get_logger()


class Reporter:
    """Tells one registry, by a channel that is its caller's."""

    def __init__(self, node: str, parent: Parent, channel: grpc.aio.Channel) -> None:
        self._node, self._parent = node, parent
        self._nodes = node_service_pb2_grpc.NodeServiceStub(channel)
        self._presence = presence_service_pb2_grpc.PresenceServiceStub(channel)
        self._whole = True
        self._complained = ""

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        announce_at = 0.0
        while True:
            try:
                if self._parent.wireguard_key and loop.time() >= announce_at:
                    await self._announce()
                    announce_at = loop.time() + ANNOUNCE_S
                await self._report()
                self._complained = ""
            except grpc.aio.AioRpcError as error:
                self._whole = True
                if error.code().name != self._complained:
                    self._complained = error.code().name
                    log.warning("registry_not_told", code=error.code().name, why=error.details())
            await asyncio.sleep(REPORT_S)

    async def _announce(self) -> None:
        wireguard = self._parent.wireguard
        node = node_pb.Node(
            public_key=self._parent.wireguard_key_text,
            endpoints=wireguard.endpoints,
            mtu=wireguard.mtu,
            version=falkirk.__version__,
        )
        node.metadata.name = self._node
        await self._nodes.Announce(node_pb.NodeServiceAnnounceRequest(node=node), timeout=TIMEOUT_S)

    async def _report(self) -> None:
        news, self._parent.news = self._parent.news, set()
        whole, self._whole = self._whole, False
        for request in requests(self._node, self._parent.tunnels, self._parent.heard, news, whole=whole):
            answer = await self._presence.Report(request, timeout=TIMEOUT_S)
            if answer.resync:
                self._whole = True
                break


def requests(
    node: str, tunnels: Mapping[int, Opened], heard: Mapping[int, Heard], news: Collection[str], *, whole: bool
) -> Iterator[pb.PresenceServiceReportRequest]:
    """What is to be said of the devices that are `news`, or of all; always something, as it renews the lease.

    What changes while one report is on its way is told as it is when its own is made.
    """
    best: dict[str, tuple[int, int]] = {}
    for number, opened in tunnels.items() if whole or news else ():
        device = opened.context.device_id
        if whole or device in news:
            last = heard[number].handshake if number in heard else 0
            best[device] = max(best.get(device, (0, 0)), (last, number))
    gone = [] if whole else [device for device in news if device not in best]
    places = [number for _, number in best.values()]
    for at in range(0, max(len(places), 1), MOST):
        request = pb.PresenceServiceReportRequest(
            node=node, lease_ms=LEASE_MS, complete=whole and at == 0, gone_device_ids=gone if at == 0 else ()
        )
        for number in places[at : at + MOST]:
            # One that has gone meanwhile is among the next news.
            if number in tunnels:
                _fill(request.present.add(), tunnels[number], heard.get(number))
        yield request


def _fill(presence: pb.Presence, opened: Opened, heard: Heard | None) -> None:
    """In its place in the report: messages that are copied there take four times the memory meanwhile."""
    presence.device_id, presence.path = opened.context.device_id, pb.PRESENCE_PATH_TUNNEL
    presence.since.FromNanoseconds(opened.admitted_at)
    if heard is not None:
        presence.path = pb.PRESENCE_PATH_WIREGUARD
        presence.endpoint = heard.endpoint
        presence.received_bytes, presence.sent_bytes = heard.received_bytes, heard.sent_bytes
        if heard.handshake:
            presence.last_handshake.FromNanoseconds(heard.handshake)
