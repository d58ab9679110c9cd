"""The run directory: who may reach which socket, and who runs here.

gRPC can't see the uid of a peer, so each service serves three sockets in three directories, and a directory's owner, group and mode
decide who comes in (`admin/` 0700, `mesh/` 0750, `read/` 0755 unless set otherwise). The road that a call came in by bounds what it may ask:
each method carries `(falkirk.api.net.v1.access)`, and `allowed` compares the two. Sockets are bound under a umask that repeats the
directory's idea (0600, 0660, 0666), so a directory that is opened by mistake doesn't open the sockets.

An exclusive flock on `R/.<name>.lock` marks the one process that serves a name; the kernel drops it however the process ends.

Limit: the umask belongs to the process, so sockets are bound before threads that create files start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from falkirk.api.net.v1 import access_pb2
from falkirk.runtime import access
from falkirk.runtime.settings import ROADS, Road, RoadSettings, SettingsError, Shell

SOCKET_MODES: Final[dict[Road, int]] = {"admin": 0o600, "mesh": 0o660, "read": 0o666}
_LEVEL: Final[dict[Road, int]] = {
    "read": access_pb2.ACCESS_READ,
    "mesh": access_pb2.ACCESS_MESH,
    "admin": access_pb2.ACCESS_ADMIN,
}
_ROAD_OF: Final[dict[int, Road]] = {level: road for road, level in _LEVEL.items()}


def required(method: str) -> Road | None:
    """The least privileged road of a full method name ("/package.Service/Method"); None where none was declared: refuse it."""
    if method.startswith(access.OPEN):
        return "read"
    found = access.method(method)
    if found is None:
        return None
    options: Any = found.GetOptions()
    return _ROAD_OF.get(options.Extensions[access_pb2.access])


def allowed(road: Road, needs: Road | None) -> bool:
    """True where a method that needs one road may be called by another."""
    return needs is not None and _LEVEL[road] >= _LEVEL[needs]


def prepare(shell: Shell) -> None:
    """Makes the run directory and its three roads with their owners and modes. Raises SettingsError with what to do."""
    try:
        shell.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        for road in ROADS:
            _prepare_road(shell.run_dir / road, shell.roads.get(road))
    except (OSError, KeyError) as error:
        raise SettingsError(
            f"run_dir {shell.run_dir}: {error}; choose another with --run-dir, or mend its owner and mode"
        ) from error


def _prepare_road(path: Path, settings: RoadSettings) -> None:
    path.mkdir(mode=settings.mode, exist_ok=True)
    status = path.stat()
    uid, gid = _ids(settings)
    if (uid not in (-1, status.st_uid)) or (gid not in (-1, status.st_gid)):
        os.chown(path, uid, gid)
    if status.st_mode & 0o7777 != settings.mode:
        path.chmod(settings.mode)


def _ids(settings: RoadSettings) -> tuple[int, int]:
    """Numbers of owner and group, -1 where they stay as they are. KeyError for a name that nobody has."""
    owner, group = settings.owner, settings.group
    uid = -1 if not owner else int(owner) if owner.isdecimal() else pwd.getpwnam(owner).pw_uid
    gid = -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    return uid, gid


@contextlib.contextmanager
def binding(road: Road) -> Iterator[None]:
    """The umask under which sockets of a road are bound."""
    before = os.umask(0o777 & ~SOCKET_MODES[road])
    try:
        yield
    finally:
        os.umask(before)


def own(path: Path, settings: RoadSettings) -> None:
    """Gives a bound socket to its road's owner and group."""
    uid, gid = _ids(settings)
    if (uid, gid) != (-1, -1):
        os.chown(path, uid, gid)


class AlreadyRunning(Exception):
    """Another live process holds the name in this run directory."""


@contextlib.contextmanager
def sole(run_dir: Path, name: str) -> Iterator[None]:
    """Holds the lock of a name for as long as the block runs. Raises AlreadyRunning, SettingsError where it isn't ours to lock."""
    path = run_dir / f".{name}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; choose a directory of your own with --run-dir") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise AlreadyRunning(f"{name} already runs in {run_dir} (pid {holder})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
