"""A policy process with a registry of the test's own making beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from falkirk.api.net.v1 import net_pb2
from falkirk.api.policy.v1 import policy_service_pb2_grpc
from falkirk.api.registry.v1 import policy_document_service_pb2 as documents
from falkirk.api.registry.v1 import registry_service_pb2 as registry_pb2
from falkirk.api.registry.v1 import registry_service_pb2_grpc, resource_pb2, tenant_service_pb2

DEADLINE = 15.0
EPOCH = "e-1"
SERVICES = Path(__file__).resolve().parents[2] / "services"
T = TypeVar("T")


def until(what: Callable[[], T]) -> T:
    """Asks again until the answer is true; an RpcError counts as no."""
    deadline = time.monotonic() + DEADLINE
    while True:
        with contextlib.suppress(grpc.RpcError):
            answer = what()
            if answer:
                return answer
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)  # a poll with a deadline


def tenant(name: str) -> registry_pb2.Resource:
    metadata = resource_pb2.Metadata(id=f"t-{name}", name=name)
    return registry_pb2.Resource(tenant=tenant_service_pb2.Tenant(metadata=metadata))


def policy(
    name: str, rules: Sequence[tuple[str, str, str]], *, tenant: str = "acme", priority: int = 0, disabled: bool = False
) -> registry_pb2.Resource:
    """Rules as (name, when, action)."""
    return registry_pb2.Resource(
        policy=documents.Policy(
            metadata=resource_pb2.Metadata(id=f"p-{tenant}-{name}", name=name, tenant=tenant, tenant_id=f"t-{tenant}"),
            priority=priority,
            disabled=disabled,
            rules=[
                documents.PolicyRule(name=rule, when=when, action=f"RULE_ACTION_{action.upper()}")
                for rule, when, action in rules
            ],
        )
    )


class Registry(registry_service_pb2_grpc.RegistryServiceServicer):
    """Resources and transactions of a test; serves them at mesh/registry.sock until `stop`."""

    def __init__(self, run_dir: Path) -> None:
        self._changed = threading.Condition()
        self._transactions: list[registry_pb2.WatchResponse] = []
        self._ended = False
        (run_dir / "mesh").mkdir(mode=0o750, parents=True, exist_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(4))
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{run_dir}/mesh/registry.sock")
        self._server.start()

    def apply(self, *changed: registry_pb2.Resource, removed: Sequence[str] = ()) -> int:
        """One transaction; its revision number."""
        with self._changed:
            number = len(self._transactions) + 1
            tombstones = [registry_pb2.Tombstone(kind="KIND_POLICY", id=identity) for identity in removed]
            self._transactions.append(
                registry_pb2.WatchResponse(
                    revision=net_pb2.Revision(epoch=EPOCH, number=number), changed=changed, removed=tombstones
                )
            )
            self._changed.notify_all()
        return number

    def Watch(self, request: Any, context: Any) -> Iterator[registry_pb2.WatchResponse]:
        """The whole state as its transactions squeezed into one, SYNCED, then each."""
        at = request.resume_after.number
        with self._changed:
            if not at:
                at = len(self._transactions)
                state = registry_pb2.WatchResponse(revision=net_pb2.Revision(epoch=EPOCH, number=at))
                for transaction in self._transactions:
                    state.changed.extend(transaction.changed)
            else:
                state = registry_pb2.WatchResponse(revision=net_pb2.Revision(epoch=EPOCH, number=at))
        if state.changed:
            yield state
        yield registry_pb2.WatchResponse(revision=state.revision, synced=True)
        while context.is_active():
            with self._changed:
                if len(self._transactions) == at and not self._ended:
                    self._changed.wait(1.0)
                if self._ended:
                    return
                fresh = self._transactions[at:]
            yield from fresh
            at += len(fresh)

    def stop(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._server.stop(0).wait()


class Policy:
    """A policy process on a directory."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory
        self.data_dir = directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._channels: list[grpc.Channel] = []

    def start(self, config: Path | None = None) -> None:
        command = [
            sys.executable,
            "-m",
            "falkirk.policy",
            "--run-dir",
            str(self.run_dir),
            "--data-dir",
            str(self.data_dir),
        ]
        if config is not None:
            command += ["--config", str(config)]
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SERVICES)})

    def signal(self, number: signal.Signals) -> int:
        """Sends a signal, waits for the process's end; its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(DEADLINE)
        self._process = None
        return status

    def stop(self) -> None:
        for channel in self._channels:
            channel.close()
        if self._process is not None:
            self.signal(signal.SIGKILL)

    def channel(self, road: str = "mesh") -> grpc.Channel:
        options = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 50)]
        self._channels.append(grpc.insecure_channel(f"unix:{self.run_dir}/{road}/policy.sock", options=options))
        return self._channels[-1]

    def policy(self, road: str = "mesh") -> Any:
        return policy_service_pb2_grpc.PolicyServiceStub(self.channel(road))

    def audit(self, road: str = "mesh") -> Any:
        return policy_service_pb2_grpc.AuditServiceStub(self.channel(road))

    def serving(self) -> bool:
        """What health says; False while nobody answers."""
        stub = health_pb2_grpc.HealthStub(self.channel("read"))
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
