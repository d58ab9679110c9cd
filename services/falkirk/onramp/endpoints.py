"""Where WireGuard devices were last heard from, on disk, so that whoever restarts can ask them for a handshake.

One line a device, id and endpoint, and another one behind it when it was heard from elsewhere: the last one holds. What is lost of it (a kill before a write,
the file) costs a device the time after which it asks by itself, 15 s for one that sends. So a change is written at once, for which it is appended.

Limit: half the file may be old lines, and `SLACK` more; then it is written anew, whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SAVE_S: Final = 0.05
"""How long a change may wait to be written, with others."""
SLACK: Final = 1000


class Endpoints:
    """The file and what it says."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises OSError where it can't be read."""
        self._path = path
        self._by_device: dict[str, str] = {}
        self._changed: dict[str, str] = {}
        """What isn't written yet."""
        self._lines = 0
        """Of the file."""
        self._whole = False
        """Whether it must be written anew."""
        try:
            text = path.read_text()
        except FileNotFoundError:
            return
        # Nothing can be put behind a line that was cut off.
        self._whole = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            self._lines += 1
            device_id, _, endpoint = line.partition(" ")
            # A line that was cut off names no port.
            if endpoint.rpartition(":")[2].isdecimal():
                self._by_device[device_id] = endpoint

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._by_device.items())

    @property
    def dirty(self) -> bool:
        """Whether something isn't written yet."""
        return self._whole or bool(self._changed)

    def set(self, device_id: str, endpoint: str) -> None:
        """The device was heard from there."""
        if endpoint and self._by_device.get(device_id) != endpoint:
            self._by_device[device_id] = self._changed[device_id] = endpoint

    def forget(self, device_id: str) -> None:
        """There is no such device any more."""
        self._changed.pop(device_id, None)
        if self._by_device.pop(device_id, None) is not None:
            self._whole = True

    def save(self) -> None:
        """Writes to the file what has changed. Raises OSError."""
        if not self.dirty:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._whole or self._lines + len(self._changed) > 2 * len(self._by_device) + SLACK:
            draft = self._path.with_suffix(".new")
            _write(draft, os.O_TRUNC, self._by_device)
            draft.replace(self._path)
            self._lines = len(self._by_device)
        else:
            # Half a line of a write that fails would spoil the next one.
            self._whole = True
            _write(self._path, os.O_APPEND, self._changed)
            self._lines += len(self._changed)
        self._whole = False
        self._changed.clear()


def _write(path: Path, how: int, endpoints: dict[str, str]) -> None:
    # Where somebody is, is nobody else's business.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "w") as file:
        file.writelines(f"{device_id} {endpoint}\n" for device_id, endpoint in endpoints.items())
