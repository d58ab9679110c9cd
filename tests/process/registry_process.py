"""A registry as a process, for tests: started, reached on its unix sockets, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from falkirk.api.registry.v1 import (
    device_service_pb2_grpc,
    device_token_service_pb2_grpc,
    node_service_pb2_grpc,
    policy_document_service_pb2_grpc,
    presence_service_pb2_grpc,
    registry_service_pb2_grpc,
    route_service_pb2_grpc,
    tenant_service_pb2_grpc,
    user_service_pb2_grpc,
    virtual_network_service_pb2_grpc,
    zone_service_pb2_grpc,
)
from falkirk.runtime import client
from falkirk.runtime.errors import FalkirkError, from_rpc

DEADLINE_S = 20.0


class Registry:
    """A running registry and stubs on one of its roads."""

    def __init__(self, base: Path, settings: str = "") -> None:
        self.run_dir, self.data_dir = base / "run", base / "data"
        self.config = base / "falkirk.yaml"
        self.config.write_text(f"apiVersion: falkirk.dev/v1alpha1\nkind: Settings\n{settings}")
        self._process: subprocess.Popen[str] | None = None
        self._channels: list[grpc.Channel] = []

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start and wait for SERVING."""
        command = [sys.executable, "-m", "falkirk.registry", "--config", str(self.config)]
        command += ["--run-dir", str(self.run_dir), "--data-dir", str(self.data_dir)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        stub = health_pb2_grpc.HealthStub(self.channel("read"))
        deadline = time.monotonic() + DEADLINE_S
        try:
            request = health_pb2.HealthCheckRequest(service="falkirk.api.registry.v1.RegistryService")
            answer = stub.Check(request, timeout=deadline - time.monotonic(), wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        except BaseException:
            self._process.kill()
            print(self._process.communicate()[1])
            raise

    def stop(self, *, kill: bool = False) -> int:
        """SIGTERM, or SIGKILL; the exit status."""
        assert self._process is not None
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        _, errors = self._process.communicate(timeout=DEADLINE_S)
        print(errors)
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        return self._process.returncode

    def channel(self, road: str = "admin") -> grpc.Channel:
        """A channel on a road, closed by `stop`."""
        made = grpc.insecure_channel(f"unix:{self.run_dir}/{road}/registry.sock", options=client.OPTIONS)
        self._channels.append(made)
        return made

    def stubs(self, road: str = "admin") -> Stubs:
        """All stubs on a road."""
        return Stubs(self.channel(road))


class Stubs:
    """A stub for each service."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.registry: Any = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self.tenant: Any = tenant_service_pb2_grpc.TenantServiceStub(channel)
        self.user: Any = user_service_pb2_grpc.UserServiceStub(channel)
        self.device: Any = device_service_pb2_grpc.DeviceServiceStub(channel)
        self.virtual_network: Any = virtual_network_service_pb2_grpc.VirtualNetworkServiceStub(channel)
        self.route: Any = route_service_pb2_grpc.RouteServiceStub(channel)
        self.policy: Any = policy_document_service_pb2_grpc.PolicyServiceStub(channel)
        self.node: Any = node_service_pb2_grpc.NodeServiceStub(channel)
        self.token: Any = device_token_service_pb2_grpc.DeviceTokenServiceStub(channel)
        self.presence: Any = presence_service_pb2_grpc.PresenceServiceStub(channel)
        self.zone: Any = zone_service_pb2_grpc.ZoneServiceStub(channel)


@contextmanager
def running(base: Path, settings: str = "") -> Iterator[Registry]:
    """A registry for the length of a block."""
    registry = Registry(base, settings)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


def refused(call: Callable[[], Any]) -> FalkirkError:
    """What a call is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc(caught.value)
