"""Prometheus metrics of one process, over a unix socket and, where asked, TCP.

`curl --unix-socket R/read/flow.metrics.sock http://metrics/metrics`. Each `Server` has its own registry (`server.metrics`); services add
collectors to it. `CountersCollector` exposes the shared memory that packet workers count in (`falkirk.runtime.counters`).

Limits: HTTP/1.0 GET of /metrics only, one request a connection, five seconds for its head of at most 8 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from falkirk.runtime import roads
from falkirk.runtime.settings import Shell, host_port

HEAD_SECONDS = 5.0
HEAD_BYTES = 8192


class CountersCollector(Collector):
    """One counter family whose samples are read when it is scraped.

    `samples` gives (labels, count) pairs; names of the labels are fixed at construction.
    """

    def __init__(
        self,
        name: str,
        help: str,
        labels: tuple[str, ...],
        samples: Callable[[], Iterable[tuple[Mapping[str, str], int]]],
    ) -> None:
        self._name, self._help, self._labels, self._samples = name, help, labels, samples

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Reads all samples."""
        family = CounterMetricFamily(self._name, self._help, labels=self._labels)
        for labels, count in self._samples():
            family.add_metric([labels[label] for label in self._labels], count)
        yield family


@contextlib.asynccontextmanager
async def serving(shell: Shell, service: str, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Serves the registry for as long as the block runs."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, registry)

    path = shell.run_dir / "read" / f"{service}.metrics.sock"
    path.unlink(missing_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        with roads.binding("read"):
            unix = await asyncio.start_unix_server(answer, path, limit=HEAD_BYTES)
        stack.callback(path.unlink, missing_ok=True)
        stack.callback(unix.close)
        roads.own(path, shell.roads.read)
        address = shell.metrics.get(service)
        if address is not None:
            host, port = host_port(address)
            tcp = await asyncio.start_server(answer, host, port, limit=HEAD_BYTES)
            stack.callback(tcp.close)
        yield


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, registry: CollectorRegistry) -> None:
    with contextlib.closing(writer):
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or words[0] != b"GET":
            status, kind, body = "405 Method Not Allowed", "text/plain", b"GET only\n"
        elif words[1].split(b"?", 1)[0] != b"/metrics":
            status, kind, body = "404 Not Found", "text/plain", b"/metrics only\n"
        else:
            status, kind, body = "200 OK", CONTENT_TYPE_LATEST, generate_latest(registry)
        header = (
            f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            writer.write(header.encode() + body)
            await writer.drain()
