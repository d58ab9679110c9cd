"""Namespaces, cables and processes of a demo or a bench, gone when it is.

A namespace is held by a process that dies with us, not by a name in /run/netns: when its last process goes, the kernel
takes it and its interfaces away, whatever became of our own clean-up. `Lab` is a context manager that stops what it
started (by its own process ids) in reverse order; `guard_signals` turns SIGTERM and SIGHUP into an orderly exit.

Needs CAP_NET_ADMIN, util-linux and iproute2. Limit: 250 at once, as each has 198.18.N.0/24 and 198.19.N.0/24 (RFC 2544,
benchmarking) with an N of its own (`Network`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

STOP_S = 8.0
"""How long a process may take to end after SIGTERM, where its starter doesn't say."""


class LabError(Exception):
    """The laboratory couldn't be set up or a process in it failed; the message is for the user."""


def guard_signals() -> None:
    """SIGTERM and SIGHUP end the program through its finally blocks, as SIGINT does."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Return once the condition holds; raises LabError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


class Namespace:
    """A network namespace."""

    def __init__(self, lab: Lab, name: str, pid: int) -> None:
        self.lab = lab
        self.name = name
        self.pid = pid

    def command(self, *command: str) -> list[str]:
        """The command line that runs it inside."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *command]

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run to its end; the standard output. Raises LabError where it fails."""
        return run(self.command(*command), timeout)

    def start(self, *command: str, log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        """Start; the lab stops it."""
        return self.lab.start(self.command(*command), log=log)

    def ping(self, address: str, *, seconds: int = 2) -> bool:
        """Whether an echo comes back in time."""
        try:
            self.run("ping", "-c", "1", "-n", "-W", str(seconds), address)
        except LabError:
            return False
        return True

    def sysctl(self, key: str, value: str) -> bool:
        """Set a kernel parameter of this namespace; False where /proc/sys is read-only."""
        path = f"/proc/sys/{key.replace('.', '/')}"
        try:
            self.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", value, path)
        except LabError:
            return False
        return True


class Network:
    """A number from 0 to 249 that no other process of this network namespace has, until `close` or the process's end.

    An abstract unix socket's name is what is held: one namespace, one holder, gone with its process. A laboratory that was
    kept (`Lab.keep`) lives on without its process, so numbers whose 198.18.N.1 is an address here are left alone, too.
    Raises LabError where none is free.
    """

    COUNT = 250

    def __init__(self) -> None:
        self._name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        begin = os.getpid()
        for number in (n % self.COUNT for n in range(begin, begin + self.COUNT)):
            try:
                self._name.bind(f"\0falkirk-lab-{number}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            if not _is_ours(f"198.18.{number}.1"):
                self.number = number
                return
            self.close()
            self._name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.close()
        raise LabError(f"198.18.0.0/15: all of {self.COUNT} networks are in use by other runs of tests, demo or bench")

    def close(self) -> None:
        """Gives the number back."""
        self._name.close()


def _is_ours(address: str) -> bool:
    """Whether it is an address of this network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            return False
    return True


class Lab:
    """Processes and namespaces with one end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        network = Network()
        self._stack.callback(network.close)
        self.number = network.number
        self._cables = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def directory(self) -> Path:
        """A directory that is removed with everything else."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="falkirk-lab-")))

    def on_exit(self, callback: Callable[[], Any]) -> None:
        """Call it at the end, before what was started earlier is stopped."""
        self._stack.callback(callback)

    def keep(self) -> None:
        """Leave everything as it is: whoever called takes over."""
        self._stack.pop_all()

    def start(
        self,
        command: Sequence[str],
        *,
        log: IO[bytes] | None = None,
        dies_with_us: bool = True,
        env: dict[str, str] | None = None,
        stop_s: float = STOP_S,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; its output goes to `log` or nowhere."""
        output = log or subprocess.DEVNULL
        whole = [*(["setpriv", "--pdeathsig", "TERM", "--"] if dies_with_us else []), *command]
        process = subprocess.Popen(
            whole, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=env
        )
        self._stack.callback(stop, process, stop_s)
        return process

    def namespace(self, name: str, *, dies_with_us: bool = True) -> Namespace:
        """A new network namespace with its loopback up."""
        process = self.start(["unshare", "--net", "--", "sleep", "infinity"], dies_with_us=dies_with_us)
        own = Path("/proc/self/ns/net").readlink()
        theirs = Path(f"/proc/{process.pid}/ns/net")

        def moved() -> bool:
            if process.poll() is not None:
                raise LabError("can't make a network namespace: needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
            return theirs.readlink() != own

        wait_for("a network namespace", moved, 10)
        namespace = Namespace(self, name, process.pid)
        namespace.run("ip", "link", "set", "lo", "up")
        return namespace

    def cable(
        self, near: Namespace | None, far: Namespace, near_addresses: Sequence[str], far_addresses: Sequence[str]
    ) -> tuple[str, str]:
        """A veth pair with addresses; `near` None is the namespace that we are in. The two interface names."""
        self._cables += 1
        stem = f"fk{os.getpid()}{chr(96 + self._cables)}"
        names = (f"{stem}0", f"{stem}1")
        place = [] if near is None else ["netns", str(near.pid)]
        run(["ip", "link", "add", names[0], *place, "type", "veth", "peer", "name", names[1], "netns", str(far.pid)])
        if near is None:
            self._stack.callback(
                subprocess.run, ["ip", "link", "del", names[0]], check=False, capture_output=True, timeout=10
            )
        for namespace, interface, addresses in ((near, names[0], near_addresses), (far, names[1], far_addresses)):
            prefix = [] if namespace is None else namespace.command()
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                run([*prefix, "ip", "address", "add", address, "dev", interface, *nodad])
            run([*prefix, "ip", "link", "set", interface, "up"])
            for address in (one.partition("/")[0] for one in addresses if ":" in one):
                wait_until_local(address, prefix)
        return names


def wait_until_local(address: str, inside: Sequence[str] = ()) -> None:
    """Return once packets to an IPv6 address are taken by the calling thread's namespace, or the one in which the command line `inside` runs others.

    Linux gives the address its local route in a work queue (addrconf_dad_work), which namespaces that are taken down hold
    up: for seconds on a busy machine. Until then its neighbours say that it isn't reachable. Raises LabError.
    """
    command = [*inside, "ip", "-6", "route", "show", "table", "local", address]
    wait_for(f"a local route of {address}", lambda: run(command) != "", 30)


def run(
    command: Sequence[str], timeout: float = 30, env: dict[str, str] | None = None, accept: Sequence[int] = (0,)
) -> str:
    """Run to its end; the standard output. Raises LabError with what it said where it fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)}: not done within {timeout:g} s") from None
    except FileNotFoundError as error:
        raise LabError(str(error)) from None
    if done.returncode not in accept:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"{' '.join(command)}: exit {done.returncode}: {said}")
    return done.stdout


def stop(process: subprocess.Popen[bytes], seconds: float = STOP_S) -> None:
    """SIGTERM, then SIGKILL to its whole session after `seconds`."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
