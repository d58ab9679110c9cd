"""UpgraderService: protos from what the parent holds."""

from __future__ import annotations

import ipaddress
import os
from typing import Any

import grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.upgrader.v1 import upgrader_service_pb2 as pb
from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc
from falkirk.linux.namespace_messages import Made, WorkerDevices
from falkirk.runtime import supervised
from falkirk.runtime.errors import FalkirkError
from falkirk.upgrader.control import GAUGES
from falkirk.upgrader.parent import Lock
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan

HOST = 1
"""A device's own host number in its slot prefixes."""


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
        processes = [self._parent, *self._lock.namespace.helper.processes(), *self._lock.pool.processes()]
        return pb.StatsResponse(workers=workers, processes=processes)

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """The private namespace; UNAVAILABLE (NOT_READY) until it is made."""
        namespace = self._lock.namespace
        if namespace.made is None or not namespace.ready.is_set():
            raise FalkirkError(
                grpc.StatusCode.UNAVAILABLE,
                "NOT_READY",
                "the private namespace isn't made yet; falkirk doctor says why",
            )
        return describe(namespace.made, namespace.devices, self._workers)


def describe(made: Made, devices: dict[int, WorkerDevices], workers: int) -> pb.GetResponse:
    """The namespace as the helper announced it."""
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
        listener4=f"{ipaddress.ip_address(plan.address4(worker, own))}:{devices.port}",
        mtu=devices.vnet_mtu if vnet else devices.raw_mtu,
    )
    if ipv6:
        device.slots6 = f"{ipaddress.ip_address(plan.address6(worker, base))}/{plan.prefix_length6()}"
        device.listener6 = f"[{ipaddress.ip_address(plan.address6(worker, own))}]:{devices.port}"
    return device
