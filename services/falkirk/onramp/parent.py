"""The parent's side of the workers: keeps them running, tells them what the registry says, and knows their tunnels.

The sockets, inboxes and counters are the parent's: producers who connect while worker 0 is restarted wait in the backlog, WireGuard's datagrams and those of other workers
wait in their sockets, and counts go on. What one worker leaves behind is its own: the others' tunnels are none of its business.

Worker 0 alone has the gate: admission is rare, and one gate holds its bounds (of pending connections, of a uid's share, of a device's tunnels) exactly.

A restarted worker is told everything, and hears of its old tunnels from the flow workers; those that aren't heard of again within `LOST_AFTER_S` are taken for closed.

Limit: packing the whole state for a worker that (re)starts takes the loop about 1 µs a row.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import structlog

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import registry_service_pb2
from falkirk.linux import seqpacket, steering
from falkirk.onramp import board, control, keys, neighbours
from falkirk.onramp.control import (
    Changed,
    Close,
    Ended,
    Heard,
    Neighbour,
    Opened,
    Places,
    Setup,
    State,
    Traced,
    Update,
)
from falkirk.onramp.endpoints import SAVE_S, Endpoints
from falkirk.onramp.expiry import Expiry
from falkirk.onramp.rows import expired, rows
from falkirk.onramp.settings import Settings
from falkirk.onramp.tables import DeviceRow, Row, Tables
from falkirk.onramp.tunnel_ids import TunnelIds
from falkirk.runtime import telemetry
from falkirk.runtime.counters import Counters
from falkirk.runtime.settings import Shell
from falkirk.runtime.workers import WorkerPool
from falkirk.wire.context import TunnelContext, shared
from falkirk.wire.sharing import share

LOST_AFTER_S: Final = 5.0
EXPIRY_S: Final = 0.25
"""How often devices are looked through for those that have ended; a look at the next one only."""
PLACES: Final = 1000
"""Endpoints that the worker is told at once."""

log = structlog.get_logger()


class WorkerAway(Exception):
    """The worker isn't there, or was replaced while it was asked."""


class Parent:
    """Workers, tables and open tunnels. `on_ready` hears whether producers and devices can be admitted."""

    def __init__(self, shell: Shell, settings: Settings, on_ready: Callable[[bool], None]) -> None:
        """Raises OSError where the data directory can't be read."""
        self._shell, self._settings, self._on_ready = shell, settings, on_ready
        self._counters = [Counters.create(control.COUNTERS) for _ in range(shell.workers)]
        self._board = board.create(shell.workers)
        self.tables = Tables()
        self.loaded = False
        """True once the tables hold anything from the registry, be it from disk."""
        self.tunnels: dict[int, Opened] = {}
        self._states: list[State | None] = [None] * shell.workers
        self._expiry = Expiry()
        self._ids = TunnelIds(shell.data("onramp") / "tunnel-ids", shell.workers)
        self._revision = net_pb2.Revision()
        self._listener: socket.socket | None = None
        self._outside: list[socket.socket] = []
        """WireGuard's sockets, by worker; none where it isn't on."""
        self._inboxes = [neighbours.inbox() for _ in range(shell.workers)] if settings.wireguard.port else []
        self.wireguard = settings.wireguard
        self.wireguard_key = b""
        """The node's public key; empty where WireGuard isn't on."""
        self.heard: dict[int, Heard] = {}
        """The newest of each WireGuard device, by its tunnel."""
        self.news: set[str] = set()
        """Devices of which something has changed, for whoever tells the registry and empties it."""
        self._endpoints = Endpoints(shell.data("onramp") / "endpoints")
        self._saving: asyncio.TimerHandle | None = None
        key_file = settings.wireguard.private_key_file
        self._key_file = Path(key_file) if key_file else shell.data("onramp") / "wireguard.key"
        self._lost: dict[int, Opened] = {}
        self._closing: dict[int, asyncio.Future[bool]] = {}
        self._pool = WorkerPool(
            "onramp.worker", shell.workers, _command, self._on_message, self._on_start, self._on_exit
        )
        self.processes = self._pool.processes

    @property
    def wireguard_key_text(self) -> str:
        """The node's public key as `wg` writes it; empty where WireGuard isn't on."""
        return base64.b64encode(self.wireguard_key).decode()

    @property
    def applied(self) -> net_pb2.Revision | None:
        """What all workers admit by; a moment behind the tables here. None where one of them has nothing."""
        states = [state for state in self._states if state is not None and state.epoch == self._revision.epoch]
        if len(states) < len(self._states):
            return None
        return net_pb2.Revision(epoch=self._revision.epoch, number=min(state.number for state in states))

    def counts(self) -> dict[str, int]:
        """By the names of `control.COUNTERS`, of all workers together, since the service started."""
        counts = [counters.view for counters in self._counters]
        return dict(zip(control.COUNTERS, map(sum, zip(*counts, strict=True)), strict=True))

    async def run(self) -> None:
        """Listens on tunnel.sock and keeps the workers running, until cancelled. Raises OSError where it can't listen."""
        path = self._shell.run_dir / "tunnel.sock"
        # The lock on our name is held: whoever still listens there is the worker of a killed parent, on its way out.
        path.unlink(missing_ok=True)
        self._listener = seqpacket.listen(path, self._settings.tunnel_mode)
        try:
            self._open_outside()
            await self._pool.run()
        finally:
            self._listener.close()
            for sock in (*self._outside, *(end for ends in self._inboxes for end in ends)):
                sock.close()
            self._save_endpoints()
            path.unlink(missing_ok=True)

    def _open_outside(self) -> None:
        """Raises OSError, keys.UnusableKey."""
        wireguard = self._settings.wireguard
        if not wireguard.port:
            return
        keys.make(self._key_file)
        self.wireguard_key = keys.public(self._key_file)
        try:
            self._outside = steering.open_group(wireguard.address, wireguard.port, self._shell.workers)
        except OSError as error:
            where = f"{wireguard.address or '*'}:{wireguard.port}"
            raise OSError(error.errno, f"onramp.wireguard: can't listen at UDP {where}: {error.strerror}") from error
        log.info("wireguard_listens", port=wireguard.port, public_key=self.wireguard_key_text)

    def on_change(
        self,
        changed: Sequence[registry_service_pb2.Resource],
        removed: Sequence[registry_service_pb2.Tombstone],
        revision: net_pb2.Revision,
    ) -> None:
        """A transaction of the registry."""
        new, gone = rows(changed, time.time_ns()), [tombstone.id for tombstone in removed]
        self.tables.apply(new, gone)
        for device_id in gone:
            self._expiry.set(device_id, 0)
            self._endpoints.forget(device_id)
        for row in new:
            if isinstance(row, DeviceRow):
                self._expiry.set(row.id, 0 if row.disabled else row.ends_ns)
        self._revision = revision
        first, self.loaded = not self.loaded, True
        if first:
            self._push_all()
        else:
            self._push(new, gone, full=False)

    async def expire(self) -> None:
        """Ends devices whose time has come, within a second, until cancelled. It looks at the clock each time: that may be set."""
        while True:
            await asyncio.sleep(EXPIRY_S)
            found = (self.tables.device_by_id(device_id) for device_id in self._expiry.due(time.time_ns()))
            ended = [expired(row) for row in found if row is not None]
            if ended:
                self.tables.apply(ended)
                self._push(ended, [], full=False)
                for row in ended:
                    log.info("device_expired", tenant=row.tenant_id, device=row.name)

    async def close(self, tunnel: int, reason: str) -> bool:
        """Closes a tunnel and waits until it is; False where it isn't open. Raises WorkerAway where that can't be known."""
        if tunnel not in self.tunnels:
            return False
        if not self._pool.send(self.tunnels[tunnel].worker, control.encode(Close(tunnel, reason))):
            raise WorkerAway
        done = self._closing.setdefault(tunnel, asyncio.get_running_loop().create_future())
        if not await asyncio.shield(done):
            raise WorkerAway
        return True

    def _push_all(self, *workers: int) -> None:
        self._push(list(self.tables.rows.values()), [], *workers, full=True)

    def _push(self, changed: Sequence[Row], removed: Sequence[str], *workers: int, full: bool) -> None:
        """To some workers, or to all. They read the same memory."""
        update = Update(full, self._revision.epoch, self._revision.number)
        memory = os.memfd_create("falkirk-rows", os.MFD_CLOEXEC)
        with open(memory, "wb") as file:
            file.writelines(control.pack(changed, removed))
            file.flush()
            for worker in workers or range(self._shell.workers):
                self._pool.send(worker, control.encode(update), (memory,))

    def _on_start(self, worker: int, generation: int) -> None:
        settings, shell = self._settings, self._shell
        assert self._listener is not None
        setup = Setup(
            worker=worker,
            workers=shell.workers,
            mesh_dir=str(shell.run_dir / "mesh"),
            flow_workers=shell.workers,
            peer_uids=tuple(sorted({0, os.getuid(), *shell.mesh_uids})),
            grants=settings.grants(),
            device_uids=settings.device_uids(),
            parser=settings.context_parser,
            mtu=settings.mtu,
            first_tunnel=self._ids.first(),
            context_timeout_ms=settings.context_timeout_ms,
            adopt_timeout_ms=settings.adopt_timeout_ms,
            max_pending=settings.max_pending,
            max_pending_per_uid=settings.max_pending_per_uid,
            max_tunnels=settings.max_tunnels,
            max_tunnels_per_device=settings.max_tunnels_per_device,
            log_level=shell.log.level,
            log_format=shell.log.format,
            wireguard_key=str(self._key_file) if self._outside else "",
            wireguard_mtu=settings.wireguard.mtu,
        )
        descriptors = [self._counters[worker].fd, self._board.fd]
        if worker == 0:
            descriptors.append(self._listener.fileno())
        if self._outside:
            descriptors += (self._outside[worker].fileno(), self._inboxes[worker][0].fileno())
        self._pool.send(worker, control.encode(setup), descriptors)
        for other, (_, writing) in enumerate(self._inboxes):
            if other != worker:
                self._pool.send(worker, control.encode(Neighbour(other)), (writing.fileno(),))
        self._save_ids()
        places = iter(self._endpoints)
        while self._outside and (some := tuple(islice(places, PLACES))):
            self._pool.send(worker, control.encode(Places(some)))
        if self.loaded:
            self._push_all(worker)

    def _on_exit(self, worker: int, status: int) -> None:
        lost = {number: opened for number, opened in self.tunnels.items() if opened.worker == worker}
        log.warning("worker_ended", worker=worker, status=status, tunnels=len(lost))
        self._states[worker] = None
        self._on_ready(False)
        for number in self._closing.keys() & lost:
            self._closing.pop(number).set_result(False)
        self._lost |= lost
        asyncio.get_running_loop().call_later(LOST_AFTER_S, self._forget_lost, worker)

    def _forget_lost(self, worker: int) -> None:
        for number, opened in [item for item in self._lost.items() if item[1].worker == worker]:
            del self._lost[number]
            if self.tunnels.get(number) is opened:
                self._on_ended(Ended(number, "lost"))

    def _on_message(self, worker: int, data: bytes, descriptors: list[int]) -> None:
        message = control.TO_PARENT.decode(data)
        for descriptor in descriptors:
            os.close(descriptor)
        match message:
            case State() as state:
                self._states[worker] = state
                self._on_ready(all(one is not None and one.epoch and all(one.links) for one in self._states))
            case Opened() as opened:
                self._on_opened(opened)
            case Changed(tunnel, context):
                self._on_changed(tunnel, context)
            case Heard() as heard:
                self._on_heard(heard)
            case Ended() as ended:
                self._on_ended(ended)
            case Traced() as traced:
                self._on_traced(traced)

    def _on_opened(self, opened: Opened) -> None:
        before = self._lost.pop(opened.tunnel, None)
        if before is None:
            log.info("tunnel_opened", tunnel=opened.tunnel, tenant=opened.context.tenant, device=opened.context.device)
        # Its worker doesn't know when a resumed tunnel was admitted; we may.
        self._keep(before or opened, opened.context)
        self._ids.seen(opened.tunnel)
        self._save_ids()

    def _on_changed(self, tunnel: int, context: TunnelContext) -> None:
        opened = self.tunnels.get(tunnel)
        if opened is not None:
            self._keep(opened, context)
            log.info("tunnel_changed", tunnel=tunnel, tenant=context.tenant, device=context.device)

    def _keep(self, opened: Opened, context: TunnelContext) -> None:
        """Hold an open tunnel, of whose context only what the tables don't have already."""
        shared(context)
        row = self.tables.device_by_id(context.device_id)
        if row is not None and (row.name, row.addresses) == (context.device, context.addresses):
            context = msgspec.structs.replace(context, device_id=row.id, device=row.name, addresses=row.addresses)
        opened = msgspec.structs.replace(opened, context=context)
        share(opened, ("mtu", "pid"))
        self.tunnels[opened.tunnel] = opened
        self.news.add(context.device_id)

    def _on_heard(self, heard: Heard) -> None:
        opened = self.tunnels.get(heard.tunnel)
        if opened is None:
            return
        # The number that the tunnel has already.
        self.heard[opened.tunnel] = msgspec.structs.replace(heard, tunnel=opened.tunnel)
        self.news.add(opened.context.device_id)
        self._endpoints.set(opened.context.device_id, heard.endpoint)
        if self._endpoints.dirty and self._saving is None:
            self._saving = asyncio.get_running_loop().call_later(SAVE_S, self._save_endpoints)

    def _save_endpoints(self) -> None:
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        try:
            self._endpoints.save()
        except OSError as error:  # they are known here; only a restart of ours would miss some
            log.error("endpoints_not_written", why=str(error))

    def _save_ids(self) -> None:
        try:
            self._ids.save()
        except OSError as error:  # numbers go on in memory; only a restart of ours could repeat some
            log.error("tunnel_ids_not_written", why=str(error))

    def _on_ended(self, ended: Ended) -> None:
        opened = self.tunnels.pop(ended.tunnel, None)
        self.heard.pop(ended.tunnel, None)
        if opened is not None:
            context = opened.context
            self.news.add(context.device_id)
            log.info(
                "tunnel_closed", tunnel=ended.tunnel, tenant=context.tenant, device=context.device, reason=ended.reason
            )
        closing = self._closing.pop(ended.tunnel, None)
        if closing is not None:
            closing.set_result(True)

    def _on_traced(self, traced: Traced) -> None:
        opened = self.tunnels.get(traced.tunnel)
        if opened is None:
            return
        attributes: dict[str, str | bool | int | float] = {
            "tunnel_id": traced.tunnel,
            "tenant": opened.context.tenant,
            "device": opened.context.device,
            "virtual_network": opened.context.virtual_network,
            "uid": opened.uid,
            "admitted_at": opened.admitted_at,
        }
        # The tunnel was admitted once, for all of its flows: in a flow's trace that is an instant.
        telemetry.emit_span("admit", traced.trace_id, traced.span_id, None, traced.time, traced.time, attributes)


def _command(_: int, fd: int) -> list[str]:
    return [sys.executable, "-m", "falkirk.onramp.worker", "--control-fd", str(fd)]
