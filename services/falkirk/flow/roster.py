"""The parent's part in flows between tunnels: it makes the pairs between workers, and tells each of them whose tunnels the others read.

A worker that starts gets a pair with every one that runs, and each of those the other end; then the tunnels that are open elsewhere.
From then on it hears of each that opens or closes. When a worker ends its tunnels are closed for the others, until its
successor has adopted them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Final

from falkirk.flow import control
from falkirk.linux import seqpacket
from falkirk.wire.handover import Message, batches, encode

BUFFER: Final = 4 * 1024 * 1024
"""Bytes asked of the kernel for a pair, which gives at most net.core.wmem_max."""


class Roster:
    """Of all workers of the node. `send(worker, data, fds)` is False where no process is there to take it; `alive(worker)`."""

    def __init__(
        self, workers: int, send: Callable[[int, bytes, Sequence[int]], bool], alive: Callable[[int], bool]
    ) -> None:
        self._workers = workers
        self._send = send
        self._alive = alive
        self._open: list[dict[int, control.Attached]] = [{} for _ in range(workers)]

    def started(self, worker: int) -> None:
        """A worker's process has started and has got its `Start`."""
        for other in range(self._workers):
            if other == worker or not self._alive(other):
                continue
            ours, theirs = seqpacket.pair()
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._send(worker, encode([control.Sibling(other)]), [ours.fileno()])
            self._send(other, encode([control.Sibling(worker)]), [theirs.fileno()])
            ours.close()
            theirs.close()
        known: list[Message] = [attached for others in self._open for attached in others.values()]
        for data in batches(known):
            self._send(worker, data, ())

    def opened(self, worker: int, message: control.TunnelOpened) -> None:
        """A worker reads a tunnel."""
        context = message.context
        attached = control.Attached(
            message.tunnel,
            worker,
            context.tenant_id,
            context.device_id,
            context.virtual_network_id,
            message.framing,
            message.mtu,
        )
        self._open[worker][message.tunnel] = attached
        self._tell(worker, [attached])

    def ended(self, worker: int, tunnel: int) -> None:
        """A worker's tunnel is over."""
        if self._open[worker].pop(tunnel, None) is not None:
            self._tell(worker, [control.Detached(tunnel)])

    def exited(self, worker: int) -> None:
        """A worker's process has ended."""
        tunnels = list(self._open[worker])
        self._open[worker].clear()
        self._tell(worker, [control.Detached(tunnel) for tunnel in tunnels])

    def of(self, tunnel: int) -> control.Attached | None:
        """An open tunnel, by its number."""
        return next((tunnels[tunnel] for tunnels in self._open if tunnel in tunnels), None)

    def find(self, tenant_id: str, device_id: str, virtual_network_id: str = "") -> control.Attached | None:
        """The tunnel that a worker would take for a device (see `falkirk.flow.directory`)."""
        found = [
            attached
            for tunnels in self._open
            for attached in tunnels.values()
            if (attached.tenant_id, attached.device_id) == (tenant_id, device_id)
            and virtual_network_id in ("", attached.virtual_network_id)
        ]
        return max(found, key=lambda attached: attached.tunnel, default=None)

    def _tell(self, worker: int, messages: list[Message]) -> None:
        """Everyone but the worker itself."""
        for data in batches(messages):
            for other in range(self._workers):
                if other != worker:
                    self._send(other, data, ())
