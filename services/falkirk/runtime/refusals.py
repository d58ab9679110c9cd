"""Refused calls and connections, for the audit log.

Each server writes what its gates refuse to a spool of its own (`falkirk.runtime.spool`) below its data directory, and delivers it to `policy` as packet
processes do theirs. A record has event `call_refused` or `connection_refused`, and: service, gate (admin, mesh, read, tcp), method, peer (address and
port), caller, principal_id, tenant (the caller's, as its certificate says), reason, why, count.

The same refusal (method, host, caller, reason) within `WINDOW_SECONDS` is told once, then with how often it came: nobody fills the log by knocking.
Limits: a record that the disk doesn't take is logged and lost; what a server couldn't deliver when it stopped is delivered after its next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import msgspec
import structlog

from falkirk.api.policy.v1 import policy_service_pb2_grpc
from falkirk.runtime import client
from falkirk.runtime.collapse import Collapse
from falkirk.runtime.delivery import Delivery
from falkirk.runtime.gates import TCP, CallRefused
from falkirk.runtime.settings import SERVICES, Shell
from falkirk.runtime.spool import SpoolWriter, last_epoch, repair, segments

WINDOW_SECONDS: Final = 10.0
MOST: Final = 1024
FIRST_WORKER: Final = 1000
"""Added to the service's place in SERVICES it is the `worker` of its records; packet workers count from 0."""

log = structlog.get_logger()
_encoder: Final = msgspec.json.Encoder()


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is told of one; the key by which repetitions are known, but for the peer's port."""

    event: str
    gate: str
    reason: str
    method: str = ""
    peer: str = ""
    caller: str = ""
    principal_id: str = ""
    tenant: str = ""
    tenant_id: str = ""
    why: str = ""


class Refusals:
    """Those of one server. Nothing is opened before the first one."""

    def __init__(self, service: str, shell: Shell) -> None:
        self._service, self._shell = service, shell
        self._directory = shell.data(service) / "refusals"
        self._worker = FIRST_WORKER + (SERVICES.index(service) if service in SERVICES else len(SERVICES))
        self._collapse: Collapse[Refusal] = Collapse(WINDOW_SECONDS, MOST)
        self._writer: SpoolWriter | None = None
        self._delivery: Delivery | None = None
        self._some = asyncio.Event()

    def call(self, method: str, refused: CallRefused) -> None:
        """A gate refuses a call."""
        caller = refused.caller
        self._add(
            Refusal(
                "call_refused",
                refused.gate,
                refused.reason,
                method=method.removeprefix("/")[:200],
                peer=refused.peer,
                caller=str(caller) if caller else "",
                principal_id=caller.id if caller else "",
                tenant=caller.tenant if caller else "",
                tenant_id=caller.tenant_id if caller else "",
                why=refused.message,
            )
        )

    def connection(self, reason: str, message: str, peer: str) -> None:
        """The TCP front refuses a connection."""
        self._add(Refusal("connection_refused", TCP, reason, peer=peer, why=message))

    async def run(self) -> None:
        """Tells repetitions, and delivers, until cancelled."""
        if self._directory.is_dir() and segments(self._directory):
            self._some.set()
        await self._some.wait()
        with contextlib.suppress(OSError):
            self._delivery = Delivery(self._directory, lambda lines: None)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repetitions())
            if self._delivery is not None:
                channel = client.channel(self._shell, "policy")
                tasks.create_task(self._deliver(channel, self._delivery))

    async def _deliver(self, channel: object, delivery: Delivery) -> None:
        async with channel as connected:  # type: ignore[attr-defined]  # grpc.aio.Channel
            await delivery.run(policy_service_pb2_grpc.AuditServiceStub(connected))

    async def _repetitions(self) -> None:
        try:
            while True:
                await asyncio.sleep(1.0)
                self._again(time.monotonic())
        finally:
            self._again(time.monotonic() + WINDOW_SECONDS)

    def _again(self, now: float) -> None:
        for key, count in self._collapse.due(now):
            self._write(key or Refusal("call_refused", TCP, "MANY", why="many different calls were refused"), count)

    def _add(self, refusal: Refusal) -> None:
        host = refusal.peer.rpartition(":")[0]
        if self._collapse.first(msgspec.structs.replace(refusal, peer=host), time.monotonic()):
            self._write(refusal, 1)

    def _write(self, refusal: Refusal, count: int) -> None:
        try:
            if self._writer is None:
                self._directory.parent.mkdir(parents=True, exist_ok=True)
                self._directory.mkdir(mode=0o700, exist_ok=True)
                repair(self._directory)
                epoch = max(time.time_ns(), last_epoch(self._directory) + 1)
                self._writer = SpoolWriter(self._directory, epoch)
            writer = self._writer
            fields = msgspec.to_builtins(refusal) | {
                "service": self._service,
                "time": _wall(time.time_ns()),
                "node": self._shell.node,
                "worker": self._worker,
                "epoch": writer.epoch,
                "sequence": writer.next(),
                "count": count,
            }
            writer.add(_encoder.encode(fields).decode())
            stuck = not writer.flush()
        except OSError as error:
            log.error("refusal_not_recorded", why=str(error), reason=refusal.reason, method=refusal.method)
            return
        if stuck:
            log.error("refusal_waits", why=writer.error, reason=refusal.reason, method=refusal.method)
        self._some.set()
        if self._delivery is not None:
            self._delivery.grown()


def _wall(nanoseconds: int) -> str:
    """RFC 3339 in UTC with nanoseconds, always 30 characters."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"
