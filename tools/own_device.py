"""A device with our own client, in a namespace: `falkirk device enroll`, `up` and `down`, as a user would type them.

Used by the demo and by tools/soak. Names stay as they are (`--no-dns`). Its agent and its interface are nobody's children, so the lab ends them by `down`.
Limit: needs root.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from falkirk.cli.device_state import State
from falkirk.linux.wireguard import control
from tools.mesh import Mesh
from tools.netlab import Lab, LabError

COMMAND_S: Final = 60.0
ANOTHER_S: Final = 0.5
"""Two moments of a handshake that are closer are of one: its age is told by the millisecond, and asking takes a while."""


class OwnDevice:
    """A device of a mesh's registry that is about to be enrolled."""

    def __init__(self, lab: Lab, name: str, directory: Path, mesh: Mesh) -> None:
        self.namespace = lab.namespace(name)
        self.name = name
        self._lab, self._mesh = lab, mesh
        self._state = State(directory / name)
        self._token = directory / f"{name}.token"
        self._handshake = 0.0

    def enroll(self, *options: str) -> list[str]:
        """By a token of a device that these options describe (`falkirk device token create`). The commands. Raises LabError."""
        create = ("device", "token", "create", *options)
        self._token.touch(mode=0o600)
        self._token.write_text(str(self._mesh.ask_json("tokens", *create)[0]["secret"]))
        return [
            " ".join(("falkirk", *create)),
            self._falkirk("enroll", "--token-file", str(self._token), "--name", self.name),
        ]

    def up(self) -> str:
        """Connect. The command. Raises LabError."""
        self._lab.on_exit(self.down)
        return self._falkirk("up", "--no-dns")

    def down(self) -> None:
        """Disconnect, where it is connected."""
        if self.status():
            self._falkirk("down")

    def status(self) -> dict[str, Any]:
        """What `falkirk device status --json` is made of; nothing where it isn't up."""
        try:
            return control.ask(self._state.socket, "status")
        except control.NotRunning:
            return {}

    def handshake(self) -> int:
        """When the last one was, seconds of wall time; 0: never."""
        ages = [peer["handshake_age_s"] for peer in self.status().get("peers", ())]
        last = max((time.time() - age for age in ages if age is not None), default=0.0)
        if last > self._handshake + ANOTHER_S:
            self._handshake = last
        return int(self._handshake)

    def ping(self, address: str, *, seconds: int = 2) -> bool:
        """Whether an echo comes back in time."""
        return self.namespace.ping(address, seconds=seconds)

    def _falkirk(self, *words: str) -> str:
        """`falkirk device` there; what was typed, without where its state is."""
        typed: Sequence[str] = ("-m", "falkirk.cli.main", "device", *words, "--state", str(self._state.folder))
        done = subprocess.run(
            self.namespace.command(sys.executable, *typed),
            env=self._mesh.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode:
            raise LabError(f"falkirk device {words[0]} at {self.name}: {done.stderr.strip()}")
        return " ".join(("falkirk", "device", *words))
