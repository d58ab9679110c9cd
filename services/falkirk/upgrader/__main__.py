"""Starts the upgrader: settings, namespace, workers, one service."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from falkirk.api.upgrader.v1 import upgrader_service_pb2_grpc
from falkirk.runtime import telemetry
from falkirk.runtime.server import Server
from falkirk.runtime.settings import Shell, arguments
from falkirk.upgrader.metrics import UpgraderCollector
from falkirk.upgrader.parent import Lock
from falkirk.upgrader.service import UpgraderService
from falkirk.upgrader.settings import Settings


async def serve(shell: Shell, settings: Settings) -> None:
    """Serve until told to stop; ready once the namespaces are made and every worker listens."""
    server = Server("upgrader", shell)
    uids = frozenset({os.geteuid(), 0, *shell.mesh_uids})
    lock = Lock(shell, settings, uids, server.set_ready)
    server.metrics.register(UpgraderCollector(lock.counters))
    server.add(
        upgrader_service_pb2_grpc.add_UpgraderServiceServicer_to_server,
        UpgraderService(lock, shell.workers, time.time_ns()),
        "falkirk.api.upgrader.v1.UpgraderService",
    )
    await server.run(lock.namespace.run, lock.lowering.run, lock.run)


def main() -> int:
    """Reads settings and serves; the exit status."""
    shell, settings = arguments("upgrader", Settings)
    telemetry.setup("upgrader", shell)
    asyncio.run(serve(shell, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
