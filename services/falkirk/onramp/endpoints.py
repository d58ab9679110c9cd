"""Where WireGuard devices were last heard from, on disk, so that whoever restarts can ask them for a handshake.

One line a device, id and endpoint. What is lost of it (a kill between two writes, the file) costs a device the time after which it asks by itself, 15 s
for one that sends.

Limit: the file is written whole, at most every `SAVE_S` seconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SAVE_S: Final = 5.0
"""How long a change may wait to be written."""


class Endpoints:
    """The file and what it says."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises OSError where it can't be read."""
        self._path = path
        self._by_device: dict[str, str] = {}
        self.dirty = False
        """Whether something isn't written yet."""
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                device_id, _, endpoint = line.partition(" ")
                # A line that was cut off names no port.
                if endpoint.rpartition(":")[2].isdecimal():
                    self._by_device[device_id] = endpoint

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._by_device.items())

    def set(self, device_id: str, endpoint: str) -> None:
        """The device was heard from there."""
        if endpoint and self._by_device.get(device_id) != endpoint:
            self._by_device[device_id] = endpoint
            self.dirty = True

    def forget(self, device_id: str) -> None:
        """There is no such device any more."""
        if self._by_device.pop(device_id, None) is not None:
            self.dirty = True

    def save(self) -> None:
        """Writes the file where it has to change. Raises OSError."""
        if not self.dirty:
            return
        draft = self._path.with_suffix(".new")
        draft.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Where somebody is, is nobody else's business.
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{device_id} {endpoint}\n" for device_id, endpoint in self._by_device.items())
        draft.replace(self._path)
        self.dirty = False
