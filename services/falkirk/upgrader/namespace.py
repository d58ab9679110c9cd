"""The private namespace as the parent holds it: descriptors, and the helper that made them.

The descriptors are the namespace's life, the helper's process isn't: when the helper dies a replacement joins the
namespaces, and no stream notices. A helper that dies before it has handed over everything leaves nothing that could be used: what came is closed,
and the next one begins anew.

Limit: the parent's own end is the namespace's end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

import structlog

from falkirk.linux import namespace_messages as messages
from falkirk.runtime.workers import Child

log = structlog.get_logger()


class PrivateNamespace:
    """One namespace with every worker's devices and listeners. `ready` is set from the first complete hand-over on; `on_helper` hears of every
    helper that can be asked, the first and its successors."""

    def __init__(
        self, name: str, settings: messages.HelperSettings, on_helper: Callable[[], None] = lambda: None
    ) -> None:
        """`name` is its helper's as a process."""
        self._name = name
        self._settings = settings
        self._on_helper = on_helper
        self.helper = Child(name, self._command, self._hear, self._started, self._exited, pass_fds=self._join)
        self.made: messages.Made | None = None
        self.devices: dict[int, messages.WorkerDevices] = {}
        self.ready = asyncio.Event()
        self._namespaces: list[int] = []
        self._descriptors: dict[int, list[int]] = {}

    async def run(self) -> None:
        """Keeps a helper alive until cancelled; then closes every descriptor."""
        try:
            await self.helper.run()
        finally:
            self._close()

    def descriptors(self, worker: int) -> list[int]:
        """A worker's vnet TUN, raw TUN and, where the namespace lifts, IPv4 listener and (with IPv6) IPv6 listener; they stay the namespace's own."""
        return self._descriptors[worker]

    def _join(self) -> Sequence[int]:
        return self._namespaces if self.ready.is_set() else ()

    def _command(self, fd: int) -> list[str]:
        command, _ = messages.command(fd, self._settings, self._namespaces if self.ready.is_set() else None)
        return command

    def _started(self, generation: int) -> None:
        log.info("helper_started", helper=self._name, generation=generation, joins=self.ready.is_set())

    def _exited(self, status: int) -> None:
        log.warning("helper_exited", helper=self._name, status=status)
        if not self.ready.is_set():
            self._close()

    def _hear(self, data: bytes, fds: list[int]) -> None:
        message = messages.FROM_HELPER.decode(data)
        match message:
            case messages.Made():
                self.made, self._namespaces = message, fds
            case messages.WorkerDevices():
                self.devices[message.worker] = message
                self._descriptors[message.worker] = fds
            case messages.Ready():
                self.ready.set()
                self._on_helper()
            case messages.Joined():
                log.info("helper_joined", helper=self._name, network_namespace=message.network_namespace)
            case messages.Failed():
                log.error(
                    "helper_failed",
                    helper=self._name,
                    code=message.code,
                    message=message.message,
                    remedy=message.remedy,
                )

    def _close(self) -> None:
        for fd in (*self._namespaces, *(fd for fds in self._descriptors.values() for fd in fds)):
            os.close(fd)
        self._namespaces = []
        self._descriptors.clear()
        self.devices.clear()
        self.made = None
        self.ready.clear()
