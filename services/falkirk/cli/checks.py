"""What must be so on a machine before a mesh can run; asked by `falkirk up` (which refuses) and `falkirk doctor` (which tells all).

Each check gives a detail, and a remedy where it failed: one thing to do, preferably a command. A `warning` doesn't keep a mesh from running.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import resource
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from falkirk.cli import probe
from falkirk.linux import datagrams
from falkirk.runtime import settings
from falkirk.runtime.settings import SERVICES, SettingsError, Shell, host_port

NOFILE_WANTED: Final = 65536
"""Descriptors per process for about 15,000 streams at once."""
NOFILE_NEEDED: Final = 1024


class Check(msgspec.Struct, frozen=True):
    """What one check found."""

    name: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""


def load(config: Path | None, run_dir: Path | None, data_dir: Path | None) -> Shell:
    """The shell, with every service's section judged. Raises SettingsError."""
    path = settings.config_path(config)
    document = settings.read(path)
    shell = settings.shell_of(document, path, run_dir=run_dir, data_dir=data_dir)
    for service in SERVICES:
        settings.section_of(document, path, service, section_kind(service))
    return shell


def section_kind(service: str) -> type[msgspec.Struct]:
    """The struct of a service's section: `Settings` or `<Service>Settings` in its settings module."""
    module = importlib.import_module(f"falkirk.{service}.settings")
    for name in (f"{service.capitalize()}Settings", "Settings"):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return kind
    raise SettingsError(f"falkirk.{service}.settings has no Settings")


def machine() -> Iterator[Check]:
    """TUN, namespaces, limits."""
    for answer in probe.run():
        yield Check(answer.name, "ok" if answer.ok else "failed", answer.detail, answer.remedy)
    yield nofile(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield echo(datagrams.echo_kind(socket.AF_INET))
    yield interpreter()


def nofile(hard: int) -> Check:
    """The hard limit of descriptors; services raise their soft limit to it."""
    if hard == resource.RLIM_INFINITY or hard >= NOFILE_WANTED:
        return Check("nofile", "ok", f"{hard} descriptors per process")
    return Check(
        "nofile",
        "warning" if hard >= NOFILE_NEEDED else "failed",
        f"{hard} descriptors per process bound the streams at once",
        f"ulimit -Hn {NOFILE_WANTED} as root, LimitNOFILE={NOFILE_WANTED} in the unit, or --ulimit nofile={NOFILE_WANTED} of the container",
    )


def echo(kind: str) -> Check:
    """How ICMP echo leaves, as `datagrams.echo_kind` tells it; nothing else needs it."""
    if kind:
        return Check("echo", "ok", "ICMP echo leaves by " + {"ping": "ping sockets", "raw": "raw sockets"}[kind])
    return Check(
        "echo",
        "warning",
        "net.ipv4.ping_group_range lets this process have no ping socket, and it hasn't CAP_NET_RAW: echo ends as echo_not_permitted",
        'as root: sysctl -w net.ipv4.ping_group_range="0 2147483647", or a range with a group of the mesh',
    )


def optimised(variables: Mapping[str, object], base_prefix: str) -> bool:
    """Whether an interpreter was built with profile-guided optimisation, by its sysconfig variables. Distributions do (theirs lives in /usr), but
    Debian's says nothing of it in its variables."""
    if base_prefix == "/usr":
        return True
    said = " ".join(str(variables.get(name) or "") for name in ("CONFIG_ARGS", "PY_CORE_CFLAGS", "PY_CFLAGS_NODIST"))
    return any(flag in said for flag in ("--enable-optimizations", "-fprofile-use", "-fprofile-instr-use"))


def interpreter(variables: Mapping[str, object] | None = None, base_prefix: str = sys.base_prefix) -> Check:
    """Packets are moved by Python, and one that was compiled by default settings (pyenv's) moves half as many."""
    version = f"Python {platform.python_version()} of {base_prefix}"
    if optimised(sysconfig.get_config_vars() if variables is None else variables, base_prefix):
        return Check("python", "ok", version)
    return Check(
        "python",
        "warning",
        f"{version} was built without optimisation: it moves packets at half the speed",
        "use the distribution's (make the venv with /usr/bin/python3), or build with --enable-optimizations"
        " (PYTHON_CONFIGURE_OPTS='--enable-optimizations --with-lto' pyenv install ...)",
    )


def directories(shell: Shell) -> Iterator[Check]:
    """Could the run and the data directory be used, or made? Nothing is made."""
    for name, path in (("run_dir", shell.run_dir), ("data_dir", shell.data_dir)):
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            yield Check(name, "ok", f"{path} can be {'written' if there == path else 'made'}")
        else:
            why = f"uid {os.geteuid()} may not write in {there}" if there.is_dir() else f"{there} is not a directory"
            yield Check(name, "failed", f"{path}: {why}", _remedy(name))


def data_directory(shell: Shell) -> Check:
    """The data directory, made where missing and written to."""
    try:
        shell.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        test = shell.data_dir / f".write-test.{os.getpid()}"
        test.touch()
        test.unlink()
    except OSError as error:
        return Check("data_dir", "failed", f"{shell.data_dir}: {error.strerror}", _remedy("data_dir"))
    return Check("data_dir", "ok", f"{shell.data_dir} can be written")


def _remedy(name: str) -> str:
    return f"choose a directory of your own with --{name.replace('_', '-')}"


def permissions(shell: Shell) -> Iterator[Check]:
    """Who may enter the roads as they are now."""
    for road in settings.ROADS:
        path, wanted = shell.run_dir / road, shell.roads.get(road)
        try:
            mode = path.stat().st_mode & 0o777
        except OSError as error:
            yield Check(f"road_{road}", "warning", f"{path}: {error.strerror}", f"falkirk up --run-dir {shell.run_dir}")
            continue
        if mode == wanted.mode:
            yield Check(f"road_{road}", "ok", f"{path} has mode {mode:04o}")
        else:
            open_wide = road != "read" and bool(mode & ~wanted.mode)
            yield Check(
                f"road_{road}",
                "failed" if open_wide else "warning",
                f"{path} has mode {mode:04o}, not {wanted.mode:04o}",
                f"chmod {wanted.mode:04o} {path}",
            )


def ports(shell: Shell, *, running: bool) -> Iterator[Check]:
    """TCP addresses that the settings name: those of metrics must be free (or answer, when a mesh runs), the OTLP receiver must answer."""
    for service, address in shell.metrics.items():
        name = f"metrics_{service}"
        error = _connect(address) if running else _bind(address)
        if error is None:
            yield Check(name, "ok", f"{address} {'answers' if running else 'is free'}")
        else:
            yield Check(name, "failed", f"{address}: {error}", f"choose another address in metrics.{service}")
    endpoint = shell.telemetry.otlp_endpoint
    if endpoint is not None:
        error = _connect(endpoint)
        if error is None:
            yield Check("otlp", "ok", f"{endpoint} answers")
        else:
            yield Check(
                "otlp", "warning", f"{endpoint}: {error}; spans are lost", f"falkirk trace receive --listen {endpoint}"
            )


def _bind(address: str) -> str | None:
    try:
        host, port = host_port(address)
        for family, kind, _, _, where in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
    except (OSError, ValueError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        return "another process listens there" if in_use else str(error)
    return None


def _connect(address: str) -> str | None:
    try:
        socket.create_connection(host_port(address), timeout=2.0).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None
