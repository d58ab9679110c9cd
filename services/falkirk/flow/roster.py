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
from falkirk.wire.context import shared
from falkirk.wire.handover import Message, batches, encode
from falkirk.wire.sharing import share

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
        self.open: Final[list[dict[int, control.TunnelOpened]]] = [{} for _ in range(workers)]
        """Each worker's open tunnels, by number, and whom they speak for."""

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
        known: list[Message] = [
            _attached(other, opened) for other, tunnels in enumerate(self.open) for opened in tunnels.values()
        ]
        for data in batches(known):
            self._send(worker, data, ())

    def opened(self, worker: int, message: control.TunnelOpened) -> None:
        """A worker reads a tunnel."""
        shared(message.context)
        share(message, ("mtu",))
        self.open[worker][message.tunnel] = message
        self._tell(worker, [_attached(worker, message)])

    def ended(self, worker: int, tunnel: int) -> None:
        """A worker's tunnel is over."""
        if self.open[worker].pop(tunnel, None) is not None:
            self._tell(worker, [control.Detached(tunnel)])

    def exited(self, worker: int) -> None:
        """A worker's process has ended."""
        tunnels = list(self.open[worker])
        self.open[worker].clear()
        self._tell(worker, [control.Detached(tunnel) for tunnel in tunnels])

    def of(self, tunnel: int) -> control.Attached | None:
        """An open tunnel, by its number."""
        found = ((worker, tunnels[tunnel]) for worker, tunnels in enumerate(self.open) if tunnel in tunnels)
        return next((_attached(*one) for one in found), None)

    def find(self, tenant_id: str, device_id: str, virtual_network_id: str = "") -> control.Attached | None:
        """The tunnel that a worker would take for a device (see `falkirk.flow.directory`)."""
        found = [
            (number, worker)
            for worker, tunnels in enumerate(self.open)
            for number, opened in tunnels.items()
            if opened.context.device_id == device_id
            and opened.context.tenant_id == tenant_id
            and virtual_network_id in ("", opened.context.virtual_network_id)
        ]
        if not found:
            return None
        number, worker = max(found)
        return _attached(worker, self.open[worker][number])

    def _tell(self, worker: int, messages: list[Message]) -> None:
        """Everyone but the worker itself."""
        for data in batches(messages):
            for other in range(self._workers):
                if other != worker:
                    self._send(other, data, ())


def _attached(worker: int, opened: control.TunnelOpened) -> control.Attached:
    """What other workers are told of a tunnel."""
    context = opened.context
    return control.Attached(
        opened.tunnel,
        worker,
        context.tenant_id,
        context.device_id,
        context.virtual_network_id,
        opened.framing,
        opened.mtu,
    )
