"""Run a command as an ordinary user would: `python ordinary_user.py [--no-tun] COMMAND...`.

The command gets uid 1000 in a user namespace of its own and no capability, but can read whatever the test can, wherever
Python is installed. With `--no-tun` /dev/net/tun is covered by a device that it may not open.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

from falkirk.linux import netns, tun

CLONE_NEWNS = 0x20000
MS_BIND = 0x1000
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def enter(uid: int, flags: int = 0) -> None:
    outside, group = os.geteuid(), os.getegid()
    call("unshare", netns.CLONE_NEWUSER | flags)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"{uid} {group} 1\n")
    Path("/proc/self/uid_map").write_text(f"{uid} {outside} 1\n")


command = sys.argv[1:]
if command[0] == "--no-tun":
    command = command[1:]
    with tempfile.NamedTemporaryFile() as cover:
        Path(cover.name).chmod(0)
        # Somebody else's, else root of the tool's own namespace may override its permissions.
        os.chown(cover.name, 65534, 65534)
        enter(0, CLONE_NEWNS)
        call("mount", cover.name.encode(), str(tun.DEVICE).encode(), None, MS_BIND, None)
enter(1000)
os.execvp(command[0], command)
