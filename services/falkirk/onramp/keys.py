"""The node's WireGuard key: one line of base64 in a file of its own, as `wg genkey` prints it, made at the first start."""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from falkirk.wireguard.messages import KEY_SIZE
from falkirk.wireguard.primitives import public_key

_MODE: Final = 0o600


class UnusableKey(Exception):
    """The file can't be used as it is; says which, why, and what to do. The key isn't in it."""


def make(path: Path) -> None:
    """A new key, where there is no file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        with open(descriptor, "wb") as file:
            file.write(base64.b64encode(os.urandom(KEY_SIZE)) + b"\n")
            file.flush()
            os.fsync(descriptor)


def read(path: Path) -> bytes:
    """The private key, 32 bytes. Raises OSError, UnusableKey."""
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise UnusableKey(f"{path}: others than its owner may read it; chmod 600 it, and better make another key")
        text = file.read(1024)
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE:
        raise UnusableKey(f"{path}: isn't a WireGuard private key, one line of base64 as `wg genkey` prints it")
    return key


def public(path: Path) -> bytes:
    """The public key of the private one in a file, 32 bytes. Raises OSError, UnusableKey."""
    return public_key(read(path))
