"""An interface's unix socket: one line of JSON in, one out. It is for whoever may open it, which is root (mode 0600)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

_SECONDS: Final = 5.0
_LINE: Final = 1 << 20


class NotRunning(Exception):
    """Nothing answers at the socket."""


def listen(path: Path) -> socket.socket:
    """The socket, non-blocking; one that a killed process left is replaced. Raises OSError, EADDRINUSE where one answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(NotRunning):
            ask(path, "status")
            raise OSError(98, f"an interface is up already at {path}")
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(8)
    except BaseException:
        sock.close()
        raise
    return sock


def answer(connection: socket.socket, state: Any) -> str:
    """Serve one connection: the command that was asked, empty where none was. `state` is a function that makes the answer."""
    with connection:
        connection.settimeout(_SECONDS)
        try:
            with connection.makefile("rwb") as stream:
                command = json.loads(stream.readline(_LINE) or b"{}").get("command", "")
                stream.write(json.dumps(state()).encode() + b"\n")
        except (OSError, ValueError, AttributeError):
            return ""
        return str(command)


def ask(path: Path, command: str) -> dict[str, Any]:
    """Ask the interface at `path`: "status", or "down" which ends it. Raises NotRunning."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_SECONDS)
            sock.connect(str(path))
            with sock.makefile("rwb") as stream:
                stream.write(json.dumps({"command": command}).encode() + b"\n")
                stream.flush()
                line = stream.readline(_LINE)
    except (FileNotFoundError, ConnectionError):
        raise NotRunning(f"nothing answers at {path}") from None
    if not line:
        raise NotRunning(f"{path} answered nothing")
    answered: dict[str, Any] = json.loads(line)
    return answered
