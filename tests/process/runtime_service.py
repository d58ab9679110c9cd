"""A service as small as can be, run as a process by the tests: RegistryService with a Stats that counts, waits or fails.

Arguments as any service. Watch says synced and stays open; Stats obeys the metadata key `do`: "wait" (finish 300 ms later), "fail", "refuse", "hang".
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from falkirk.api.registry.v1 import registry_service_pb2 as pb
from falkirk.api.registry.v1 import registry_service_pb2_grpc as pb_grpc
from falkirk.runtime import settings, telemetry
from falkirk.runtime.errors import FalkirkError
from falkirk.runtime.server import Server
from falkirk.runtime.trace_context import current

NAME = "falkirk.api.registry.v1.RegistryService"


class Service(pb_grpc.RegistryServiceServicer):
    """Answers."""

    def __init__(self, server: Server) -> None:
        self.server = server

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
        return pb.StatsResponse(schema_version=7, watches=int(span is not None), processes=[self.server.process()])

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.WatchResponse]:
        yield pb.WatchResponse(synced=True)
        await asyncio.Event().wait()


def main() -> int:
    shell, own = settings.arguments("registry", settings.Section)
    assert own == settings.Section()
    telemetry.setup("registry", shell)
    server = Server("registry", shell)
    server.add(pb_grpc.add_RegistryServiceServicer_to_server, Service(server), NAME)

    async def background() -> None:
        server.set_ready(True)
        await asyncio.Event().wait()

    asyncio.run(server.run(background))
    return 0


if __name__ == "__main__":
    sys.exit(main())
