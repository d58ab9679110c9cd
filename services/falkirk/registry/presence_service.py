"""PresenceService: what nodes report, held in memory under leases, and who asks for it.

Names of devices and tenants are the registry's own; they are filled in as a report comes and kept right by every commit that the feed tells of, so
a removed device is gone at once and a renamed one shows its new name.

They are kept encoded: a message of a report holds on to the whole of it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from falkirk.api.registry.v1 import presence_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2 as registry_pb2
from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.registry import engine, fields
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.node_service import check_own
from falkirk.registry.presence import Presences
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.service import Desk, refusal
from falkirk.registry.store import Transaction

MOST: Final = 10_000
"""Devices in one report."""
PAGE: Final = 1000
_LEASE_MS: Final = 15_000
_SHORTEST_MS: Final = 1000
_LONGEST_MS: Final = 300_000


class PresenceService:
    """Report, List and Watch; the generated base class has the same methods."""

    def __init__(self, desk: Desk, now: Callable[[], float] = time.monotonic) -> None:
        self._desk, self._now = desk, now
        self.table: Presences[bytes] = Presences()
        """Who is where, as encoded `Presence`s."""
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Ends leases, until cancelled."""
        while True:
            changed, deadline = self._changed, self.table.next_deadline()
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._now())):
                    await changed.wait()
            except TimeoutError:
                if self.table.expire(self._now()):
                    self._wake()

    def on_commit(self, transaction: Transaction) -> None:
        """Hears of every commit, in order."""
        for change in transaction.changes:
            if change.kind != registry_pb2.KIND_DEVICE:
                continue
            nodes = self.table.nodes_of(change.id)
            if not nodes:
                continue
            if change.body is None:
                self.table.replace(change.id, None)
            else:
                device = Device.FromString(change.body)
                self.table.replace(change.id, {node: self._renamed(node, device) for node in nodes})
            self._wake()

    async def Report(self, request: pb.PresenceServiceReportRequest, context: Any) -> pb.PresenceServiceReportResponse:
        """See the proto."""
        check_own(request.node)
        lease_ms = request.lease_ms or _LEASE_MS
        try:
            fields.label(request.node, "node")
            fields.at_most(len(request.present), "present", MOST)
            if not _SHORTEST_MS <= lease_ms <= _LONGEST_MS:
                raise Refused(Reason.INVALID_FIELD, "lease_ms: must lie between 1000 and 300000", field="lease_ms")
        except Refused as refused:
            raise refusal(refused) from refused
        known = await self._desk.read(lambda connection: _devices(connection, request.present))
        present = {
            sys.intern(item.device_id): _named(item, known[item.device_id], request.node)
            for item in request.present
            if item.device_id in known
        }
        taken = self.table.report(
            request.node,
            present,
            request.gone_device_ids,
            complete=request.complete,
            lease_s=lease_ms / 1000,
            now=self._now(),
        )
        self._wake()
        return pb.PresenceServiceReportResponse(resync=not taken, lease_ms=lease_ms)

    async def List(self, request: pb.PresenceServiceListRequest, context: Any) -> pb.PresenceServiceListResponse:
        """See the proto."""
        size = request.page_size or PAGE
        try:
            fields.at_most(size, "page_size", PAGE)
            after = _decode(request.page_token)
            if request.device and not request.tenant:
                raise Refused(Reason.INVALID_FIELD, "tenant: a device lives in a tenant", field="tenant")
        except Refused as refused:
            raise refusal(refused) from refused
        tenant_id = (await self._desk.tenant(request.tenant)).metadata.id if request.tenant else ""
        found = sorted(
            (
                item
                for item in (pb.Presence.FromString(held) for _, held in self.table.all())
                if tenant_id in ("", item.tenant_id) and request.device in ("", item.device, item.device_id)
            ),
            key=_place,
        )
        found = [item for item in found if _place(item) > after]
        token = _encode(_place(found[size - 1])) if len(found) > size else ""
        return pb.PresenceServiceListResponse(presences=found[:size], next_page_token=token)

    async def Watch(
        self, request: pb.PresenceServiceWatchRequest, context: Any
    ) -> AsyncIterator[pb.PresenceServiceWatchResponse]:
        """See the proto."""
        tenant_id = (await self._desk.tenant(request.tenant)).metadata.id if request.tenant else ""
        watcher, synced = self.table.watch(), False
        told: set[tuple[str, str]] = set()
        try:
            while True:
                changed = self._changed
                response = pb.PresenceServiceWatchResponse(synced=not synced)
                places, watcher.changed = watcher.changed, {}
                for place in places:
                    held = self.table.get(place)
                    item = pb.Presence.FromString(held) if held is not None else None
                    if item is None:
                        # Of another tenant's devices nothing shows, not even that they went.
                        if place in told:
                            told.discard(place)
                            response.absent.add(node=place[0], device_id=place[1])
                    elif tenant_id in ("", item.tenant_id):
                        told.add(place)
                        response.present.append(item)
                if not synced or response.present or response.absent:
                    synced = True
                    yield response
                if not watcher.changed:
                    await changed.wait()
        finally:
            self.table.unwatch(watcher)

    def _renamed(self, node: str, device: Device) -> bytes:
        held = self.table.get((node, device.metadata.id))
        assert held is not None
        return _named(pb.Presence.FromString(held), device, node)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _devices(connection: sqlite3.Connection, present: Any) -> dict[str, Device]:
    found = ((item.device_id, engine.by_id(connection, BY_NAME["device"], item.device_id)) for item in present)
    return {key: device for key, device in found if isinstance(device, Device)}


def _named(item: pb.Presence, device: Device, node: str) -> bytes:
    item.device, item.node = device.metadata.name, node
    item.tenant, item.tenant_id = device.metadata.tenant, device.metadata.tenant_id
    return item.SerializeToString(deterministic=True)


def _place(item: pb.Presence) -> tuple[str, str, str]:
    return item.tenant, item.device, item.node


def _encode(place: tuple[str, str, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _decode(token: str) -> tuple[str, str, str]:
    if not token:
        return "", "", ""
    try:
        match json.loads(base64.urlsafe_b64decode(token)):
            case [str(tenant), str(device), str(node)]:
                return tenant, device, node
    except (binascii.Error, ValueError):
        pass
    raise Refused(Reason.INVALID_FIELD, "page_token: isn't one of a previous page of this list", field="page_token")
