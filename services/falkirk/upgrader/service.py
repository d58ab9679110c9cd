"""UpgraderService: protos from what the parent holds."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb
from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc
from falkirk.linux.namespace_messages import Made, WorkerDevices
from falkirk.runtime import callers, supervised
from falkirk.runtime.errors import FalkirkError
from falkirk.upgrader.control import GAUGES
from falkirk.upgrader.errands import Errand, ended
from falkirk.upgrader.parent import Lock
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan

HOST = 1
"""A device's own host number in its slot prefixes."""
CHUNK: Final = 64 * 1024
"""Bytes of one response at most."""
MAX_ACTOR: Final = 200
WORD_S: Final = 5.0
"""How long a worker may take to say why a stream broke off."""


class UpgraderService(upgrader_service_pb2_grpc.UpgraderServiceServicer):
    """Answers for the lock. `started_ns`: wall-clock nanoseconds at which the parent began."""

    def __init__(self, lock: Lock, workers: int, started_ns: int) -> None:
        self._lock = lock
        self._workers = workers
        self._parent = net_pb2.ProcessInfo(name="upgrader", pid=os.getpid(), generation=supervised.generation())
        self._parent.start_time.FromNanoseconds(started_ns)

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        """Counts by worker, and the processes."""
        workers = []
        for worker, counters in enumerate(self._lock.counters):
            counts = counters.values()
            workers.append(
                pb.WorkerStats(
                    worker=worker,
                    streams=counts["streams"],
                    dialling=counts["dialling"],
                    paired=bool(counts["paired"]),
                    counters=[
                        net_pb2.Counter(name=name, value=value) for name, value in counts.items() if name not in GAUGES
                    ],
                )
            )
        helpers = (*self._lock.namespace.helper.processes(), *self._lock.lowering.helper.processes())
        processes = [self._parent, *helpers, *self._lock.pool.processes()]
        return pb.StatsResponse(workers=workers, processes=processes)

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """The private namespaces; UNAVAILABLE (NOT_READY) until they are made."""
        namespace, lowering = self._lock.namespace, self._lock.lowering
        if (
            namespace.made is None
            or lowering.made is None
            or not (namespace.ready.is_set() and lowering.ready.is_set())
        ):
            raise FalkirkError(
                grpc.StatusCode.UNAVAILABLE,
                "NOT_READY",
                "the private namespaces aren't made yet; falkirk doctor says why",
            )
        described = describe(namespace.made, namespace.devices, self._workers)
        lower = describe(lowering.made, lowering.devices, self._workers)
        described.lower_namespace_inode = lower.namespace_inode
        described.lower_devices.extend(lower.devices)
        return described

    async def Lower(self, requests: AsyncIterator[pb.LowerRequest], context: Any) -> AsyncIterator[pb.LowerResponse]:
        """A stream to a device, until both sides have ended it."""
        first = await anext(requests, None)
        if first is None or not first.HasField("open"):
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "OPEN_FIRST", "the first request must open")
        target = first.open
        if not 1 <= target.port <= 65535:
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_PORT", f"{target.port} isn't a port")
        if target.ip_version not in (0, 4, 6):
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_IP_VERSION", "ip_version must be 4, 6 or 0")
        if len(target.actor.encode()) > MAX_ACTOR:
            raise FalkirkError(grpc.StatusCode.INVALID_ARGUMENT, "BAD_ACTOR", f"actor exceeds {MAX_ACTOR} bytes")
        errand = self._lock.errands.run(
            target.tenant,
            target.device,
            target.ip_version,
            target.port,
            callers.actor(target.actor, MAX_ACTOR) or "(unnamed)",
        )
        async with errand as (stream, flow_id):
            yield pb.LowerResponse(opened=pb.LowerOpened(flow_id=flow_id.hex()))
            async for response in carry(stream, requests):
                yield response


async def carry(errand: Errand, requests: AsyncIterator[pb.LowerRequest]) -> AsyncIterator[pb.LowerResponse]:
    """Bytes both ways; ends once the stream is over in order, else raises FalkirkError."""
    loop = asyncio.get_running_loop()
    sock = errand.sock
    # A reset is told by the reader.
    up = loop.create_task(_up(sock, requests))
    try:
        try:
            while data := await loop.sock_recv(sock, CHUNK):
                yield pb.LowerResponse(data=data)
            yield pb.LowerResponse(end=pb.LowerEnd())
            await asyncio.wait((up, errand.over), return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            # A reset: why, the worker is about to say.
            async with asyncio.timeout(WORD_S):
                await errand.over
        failed = ended(await errand.over)
        if failed is not None:
            raise failed
    finally:
        up.cancel()


async def _up(sock: socket.socket, requests: AsyncIterator[pb.LowerRequest]) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        async for request in requests:
            if request.HasField("end"):
                sock.shutdown(socket.SHUT_WR)
            elif request.data:
                await loop.sock_sendall(sock, request.data)


def describe(made: Made, devices: dict[int, WorkerDevices], workers: int) -> pb.GetResponse:
    """A namespace as its helper announced it."""
    plan = SlotPlan(workers)
    settings = dict(made.took) | {name: f"refused: {why}" for name, why in made.refused.items()}
    settings["congestion"] = made.congestion
    return pb.GetResponse(
        namespace_inode=made.network_namespace,
        settings=settings,
        devices=[
            _device(plan, worker, framing, devices[worker], made.ipv6)
            for worker in sorted(devices)
            for framing in Framing
        ],
    )


def _device(plan: SlotPlan, worker: int, framing: Framing, devices: WorkerDevices, ipv6: bool) -> pb.Device:
    vnet = framing is Framing.VNET
    base, own = plan.slot(framing, 0), plan.slot(framing, HOST)
    device = pb.Device(
        name=devices.vnet_device if vnet else devices.raw_device,
        worker=worker,
        framing=net_pb2.FRAMING_VNET if vnet else net_pb2.FRAMING_RAW,
        slots4=f"{ipaddress.ip_address(plan.address4(worker, base))}/{plan.prefix_length4()}",
        listener4=f"{ipaddress.ip_address(plan.address4(worker, own))}:{devices.port}" if devices.port else "",
        mtu=devices.vnet_mtu if vnet else devices.raw_mtu,
    )
    if ipv6:
        device.slots6 = f"{ipaddress.ip_address(plan.address6(worker, base))}/{plan.prefix_length6()}"
        if devices.port:
            device.listener6 = f"[{ipaddress.ip_address(plan.address6(worker, own))}]:{devices.port}"
    return device
