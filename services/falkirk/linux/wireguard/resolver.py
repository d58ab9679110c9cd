"""DNS of this machine while an interface is up: systemd-resolved or resolvconf where they rule, else /etc/resolv.conf itself.

/etc/resolv.conf is written in place (it may be a mount), and what it was is kept beside the interface's state; whoever finds such a copy
of one that was killed puts it back first.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

RESOLV_CONF: Final = Path("/etc/resolv.conf")
_RESOLVED: Final = Path("/run/systemd/resolve/io.systemd.Resolve")
_HEAD: Final = "# Written by falkirk for the interface {}; what was here comes back when it ends.\n"
_SECONDS: Final = 10


class Resolver:
    """The DNS of one interface."""

    def __init__(self, device: str, keep: Path, path: Path = RESOLV_CONF, resolved: Path = _RESOLVED) -> None:
        """`keep`: where the copy of `path` lies meanwhile."""
        self._device = device
        self._keep = keep
        self._path = path
        self._resolved = resolved

    def set_up(self, servers: Sequence[str], search: Sequence[str]) -> str:
        """Have names resolved by `servers`; what was changed, for people. Raises OSError."""
        if self._resolved.exists() and shutil.which("resolvectl"):
            self._run("resolvectl", "dns", self._device, *servers)
            self._run("resolvectl", "domain", self._device, *search, "~.")
            return "systemd-resolved"
        text = "".join(f"nameserver {server}\n" for server in servers)
        if search:
            text = f"search {' '.join(search)}\n{text}"
        if shutil.which("resolvconf"):
            self._run("resolvconf", "-a", self._device, text=text)
            return "resolvconf"
        self.restore()
        self._keep.write_text(self._path.read_text() if self._path.exists() else "")
        self._path.write_text(_HEAD.format(self._device) + text)
        return str(self._path)

    def tear_down(self) -> None:
        """As it was. Never raises: the interface is going anyway."""
        with contextlib.suppress(OSError):
            if not self._keep.exists() and shutil.which("resolvconf") and not self._resolved.exists():
                self._run("resolvconf", "-d", self._device)
            self.restore()

    def restore(self) -> None:
        """Put back the copy, where there is one. Raises OSError."""
        if self._keep.exists():
            self._path.write_text(self._keep.read_text())
            self._keep.unlink()

    @staticmethod
    def _run(*command: str, text: str = "") -> None:
        done = subprocess.run(command, input=text, text=True, capture_output=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
