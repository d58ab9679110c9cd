"""Starts the policy service: settings, audit store, rulebook, two services."""

from __future__ import annotations

import asyncio
import sys
import time

from falkirk.api.policy.v1 import policy_service_pb2_grpc
from falkirk.policy.audit import Announcer, AuditService
from falkirk.policy.metrics import PolicyCollector
from falkirk.policy.rulebook import Rulebook
from falkirk.policy.service import PolicyService
from falkirk.policy.settings import Settings
from falkirk.policy.store import AuditLocked, AuditStore
from falkirk.runtime import telemetry
from falkirk.runtime.client import channel
from falkirk.runtime.server import Server
from falkirk.runtime.settings import Shell, arguments


async def serve(shell: Shell, store: AuditStore) -> None:
    """Serve until told to stop; ready once rules are known, from the registry or from disk."""
    loop = asyncio.get_running_loop()
    announcer = Announcer(loop)
    failed = asyncio.Event()
    store.on_stored = announcer.stored

    def writer_failed() -> None:
        loop.call_soon_threadsafe(failed.set)

    store.on_failed = writer_failed
    async with channel(shell, "registry") as registry:
        rulebook = Rulebook(shell.data("policy") / "replica", registry)
        server = Server("policy", shell)
        server.metrics.register(PolicyCollector(rulebook, store))
        server.add(
            policy_service_pb2_grpc.add_PolicyServiceServicer_to_server,
            PolicyService(rulebook, store, time.time_ns()),
            "falkirk.api.policy.v1.PolicyService",
        )
        server.add(
            policy_service_pb2_grpc.add_AuditServiceServicer_to_server,
            AuditService(store, announcer),
            "falkirk.api.policy.v1.AuditService",
        )

        async def ready() -> None:
            await rulebook.loaded.wait()
            server.set_ready(True)

        async def writing() -> None:
            await failed.wait()
            raise RuntimeError("the audit writer has ended; started again, the service recovers the log")

        await server.run(rulebook.run, ready, writing)


def main() -> int:
    """The process; its exit status."""
    shell, settings = arguments("policy", Settings)
    telemetry.setup("policy", shell)
    store = AuditStore(shell.data("policy") / "audit", settings.audit.limits())
    try:
        store.open()
    except (AuditLocked, OSError) as error:
        print(f"falkirk policy: {error}", file=sys.stderr)
        return 1
    try:
        asyncio.run(serve(shell, store))
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
