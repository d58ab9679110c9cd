"""User and network namespaces of one's own, and the kernel settings inside them.

An ordinary user may make a network namespace only inside a user namespace of his own, where he is root. Root maps
itself (and, where `wide` is asked for, everybody whom it knows) to the same numbers; others map their own uid and gid
to 0. A process that makes or joins a user namespace must have one thread: do it right after exec.

A namespace lives while a process or a descriptor of it does; `self_descriptor` pins one. Settings below /proc/sys/net
are those of the caller's namespace; where they can't be written (a read-only /proc/sys, an older kernel) the report
says so and the caller decides whether that matters.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
_RTF_LOCAL: Final = 0x80000000
_CAP_SETGID: Final = 6
_CAP_SETUID: Final = 7
_PROC_SYS: Final = Path("/proc/sys")

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceUnavailable(Exception):
    """Namespaces can't be made or joined here; `remedy` is what an administrator can do about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


class Settings(NamedTuple):
    """What came of writing kernel settings."""

    took: dict[str, str]
    """Setting -> its value now."""
    refused: dict[str, str]
    """Setting -> why it couldn't be set."""


def unshare_user_and_network(wide: bool = False) -> None:
    """Move this process into a new user and a new network namespace, as root of both.

    `wide` keeps all uids and gids that the caller may map, so that a command inside sees other users' files as they
    are; it takes CAP_SETUID and CAP_SETGID and is ignored without. Root on a machine without user namespaces gets a
    network namespace alone. Raises NamespaceUnavailable.
    """
    uid, gid = os.geteuid(), os.getegid()
    ranges = _known_ranges() if wide and _capable(_CAP_SETUID) and _capable(_CAP_SETGID) else None
    writer = _fork_map_writer(ranges) if ranges else None
    try:
        _call(_libc.unshare, CLONE_NEWUSER)
    except OSError as error:
        if writer:
            writer.abandon()
        if uid != 0:
            raise _refused("a user namespace", error) from error
    else:
        if writer:
            writer.write()
        else:
            _map_self(uid, gid)
    unshare_network()


def join(user_namespace: int, network_namespace: int) -> None:
    """Move this process into existing namespaces, given by descriptor. Raises NamespaceUnavailable."""
    own = self_descriptor("user")
    try:
        # Joining the namespace that one is in already is an error (EINVAL), though nothing is wrong.
        if not os.path.sameopenfile(user_namespace, own):
            _call(_libc.setns, user_namespace, CLONE_NEWUSER)
        join_network(network_namespace)
    except OSError as error:
        raise NamespaceUnavailable(
            f"joining the namespaces failed ({error.strerror})",
            "the joining process must have one thread and its maker's uid",
        ) from error
    finally:
        os.close(own)


def unshare_network() -> None:
    """Move this thread into a new network namespace of its own user namespace; takes CAP_SYS_ADMIN.

    Raises NamespaceUnavailable.
    """
    try:
        _call(_libc.unshare, CLONE_NEWNET)
    except OSError as error:
        raise _refused("a network namespace", error) from error


def join_network(network_namespace: int) -> None:
    """Move this thread into a network namespace of its own user namespace; takes CAP_SYS_ADMIN. Raises OSError."""
    _call(_libc.setns, network_namespace, CLONE_NEWNET)


def self_descriptor(kind: str) -> int:
    """A descriptor of the caller's own namespace ("user" or "net"), close-on-exec; it keeps the namespace alive."""
    return os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def inode(kind: str) -> int:
    """The number that tells the caller's namespace ("user" or "net") from others on this machine."""
    return Path(f"/proc/thread-self/ns/{kind}").stat().st_ino


def has_ipv6() -> bool:
    """Does the kernel speak IPv6 in the caller's namespace?"""
    return Path("/proc/thread-self/net/if_inet6").exists()


def local6() -> set[str]:
    """IPv6 addresses (32 hex digits) at which the caller's namespace takes packets."""
    routes = (line.split() for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines())
    return {route[0] for route in routes if route[1] == "80" and int(route[8], 16) & _RTF_LOCAL}


def write_settings(wanted: Mapping[str, str]) -> Settings:
    """Write settings by their sysctl name ("net.ipv4.tcp_no_metrics_save"); never raises for one that can't be."""
    result = Settings({}, {})
    for name, value in wanted.items():
        path = _PROC_SYS / name.replace(".", "/")
        try:
            path.write_text(value)
            result.took[name] = " ".join(path.read_text().split())
        except OSError as error:
            result.refused[name] = error.strerror or str(error)
    return result


def choose_congestion(*names: str) -> str | None:
    """Make the first of these that the kernel grants the namespace's TCP congestion control; None: none could be."""
    for name in names:
        if write_settings({"net.ipv4.tcp_congestion_control": name}).took:
            return name
    return None


class _MapWriter(NamedTuple):
    """A child that stayed outside the new user namespace, where it may write maps of more than one uid."""

    pid: int
    go: int

    def write(self) -> None:
        """Let it write, and wait for it. Raises NamespaceUnavailable."""
        os.write(self.go, b"g")
        if self.abandon() != 0:
            raise NamespaceUnavailable(
                "the user namespace's uid and gid maps can't be written", "give the process CAP_SETUID and CAP_SETGID"
            )

    def abandon(self) -> int:
        """Let it go; its exit status."""
        os.close(self.go)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _fork_map_writer(ranges: dict[str, str]) -> _MapWriter:
    target = os.getpid()
    wait, go = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(wait)
        return _MapWriter(pid, go)
    os.close(go)
    status = 1
    try:
        if os.read(wait, 1):
            for name, content in ranges.items():
                Path(f"/proc/{target}/{name}").write_text(content)
            status = 0
    except OSError:
        status = 1
    finally:
        os._exit(status)


def _known_ranges() -> dict[str, str]:
    """Maps that give every id that exists in this namespace the same number in the next."""
    result = {}
    for name in ("gid_map", "uid_map"):
        lines = [line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines()]
        result[name] = "".join(f"{inside} {inside} {count}\n" for inside, _, count in lines)
    return result


def _map_self(uid: int, gid: int) -> None:
    """Map one's own ids to 0. setgroups goes first: user_namespaces(7), without it gid_map is refused."""
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1\n")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1\n")
    except OSError as error:
        raise _refused("the user namespace's uid map", error) from error


def _capable(capability: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def _call(function: ctypes._FuncPointer, *arguments: int) -> None:
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _refused(what: str, error: OSError) -> NamespaceUnavailable:
    remedies = {
        errno.ENOSPC: "as root: sysctl -w user.max_user_namespaces=10000 user.max_net_namespaces=10000",
        errno.EINVAL: "the process must have one thread: start it by exec, before anything else",
    }
    remedy = "as root: allow unprivileged user namespaces (kernel.apparmor_restrict_unprivileged_userns=0, "
    remedy += "kernel.unprivileged_userns_clone=1), or give the container CAP_SYS_ADMIN"
    return NamespaceUnavailable(f"{what} can't be made ({error.strerror})", remedies.get(error.errno or 0, remedy))
