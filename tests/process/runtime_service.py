"""A service as small as can be, run as a process by the tests: RegistryService with a Stats that counts, waits or fails.

Watch sends one message a 10 ms; Stats obeys the metadata key `do`: "wait" (finish 300 ms later), "fail", "refuse", "hang".
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import msgspec

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from falkirk.runtime import settings, telemetry
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.server import Server
from falkirk.runtime.trace_context import current

NAME = "falkirk.api.registry.v1.RegistryService"


class Service(pb_grpc.RegistryServiceServicer):
    """Answers."""

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        do = dict(context.invocation_metadata()).get("do", "")
        if do == "wait":
            print("waiting", flush=True)
            await asyncio.sleep(0.3)
        elif do == "fail":
            raise ZeroDivisionError("a secret")
        elif do == "refuse":
            raise FalkirkError(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "no such thing", thing="x")
        elif do == "hang":
            await asyncio.Event().wait()
        span = current.get()
        return pb.StatsResponse(schema_version=7, watches=int(span is not None))

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        yield pb.WatchResponse(synced=True)
        await asyncio.Event().wait()


def main() -> None:
    shell = settings.Shell(run_dir=Path(sys.argv[1]), data_dir=Path(sys.argv[1]))
    if len(sys.argv) > 2:
        shell = msgspec.structs.replace(
            shell, telemetry=settings.TelemetrySettings(otlp_endpoint=sys.argv[2], sample_ratio=1.0)
        )
    telemetry.setup("registry", shell)
    server = Server("registry", shell)
    server.add(pb_grpc.add_RegistryServiceServicer_to_server, Service(), NAME)

    async def background() -> None:
        server.set_ready(True)
        await asyncio.Event().wait()

    asyncio.run(server.run(background))


if __name__ == "__main__":
    main()
