"""Where the services of `falkirk up` come from: a process that has their modules loaded, and forks.

Six interpreters that each load the same libraries take a second and a half of CPU and 300 MB; forks of one take 20 ms each and share what
they loaded. It is what makes a service that died be there again at once. Nothing else is shared: the nursery reads no settings, opens no file,
starts no thread, and forks before any of it, so a service has what `python -m falkirk.<service>` has, command line included.

`Nursery` is the supervisor's side, `main` the process. They speak over a SEQPACKET pair: a request is the service, its generation and its arguments,
the answer is the new process's id, which that process itself sends once the supervisor is its parent. That takes two forks: the one between ends, and the
kernel gives its child to the nearest subreaper, which the supervisor is (`falkirk.runtime.supervised`).

Limits: services of one `falkirk up` have the same address-space layout, as forks have. A service that is started by itself
(in a container of its own) has no nursery.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from falkirk.linux import seqpacket
from falkirk.runtime import supervised
from falkirk.runtime.settings import SERVICES

MESSAGE_BYTES: Final = 64 * 1024
BIRTH_SECONDS: Final = 30.0
"""For the loading of all modules on a machine that is very busy."""
ATTEMPTS: Final = 3
MODULES: Final = {service: f"falkirk.{service}.__main__" for service in SERVICES}


class Stillborn(Exception):
    """The nursery can't be started, or doesn't answer; the message is for the user."""


class Born:
    """A child of ours that `subprocess` doesn't know of, with the part of Popen's interface that a supervisor needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError where it was waited for."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Blocks until it has ended; its status, or minus the signal."""
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class Nursery:
    """Starts services, one at a time; a nursery that died is replaced. `arguments` are every service's."""

    program: Sequence[str] = ("-m", "falkirk.cli.nursery")

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._turn = asyncio.Lock()
        self.labour = False
        """True while a child may be there that `bear` hasn't told of yet."""

    def start(self) -> None:
        """Starts the process, which goes on loading; `bear` would do it, too. Raises Stillborn."""
        ours, theirs = seqpacket.pair()
        with theirs:
            # The arguments say whose it is, and keep room for its children's command lines.
            command = [sys.executable, *self.program, "--control-fd", str(theirs.fileno())]
            environment = {**os.environ, supervised.SUPERVISOR: str(os.getpid())}
            try:
                self._process = subprocess.Popen(
                    [*command, *self._arguments],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                raise Stillborn(f"the nursery can't be started: {error}") from error
        self._control = ours

    async def bear(self, service: str, generation: int) -> Born:
        """A new process of a service, in a process group of its own. Raises Stillborn."""
        request = "\0".join((service, str(generation), *self._arguments)).encode()
        async with self._turn:
            for _ in range(ATTEMPTS):
                if self._control is None:
                    self.start()
                self.labour = True
                try:
                    if (pid := await self._ask(request)) is not None:
                        return Born(pid)
                finally:
                    self.labour = False
                self.close()
        raise Stillborn(
            f"{service} can't be started: the nursery ended {ATTEMPTS} times or took more than {BIRTH_SECONDS:g} s"
        )

    async def _ask(self, request: bytes) -> int | None:
        """The new process's id; None where the nursery is gone or silent."""
        control = self._control
        assert control is not None
        loop = asyncio.get_running_loop()
        try:
            seqpacket.send(control, request)
            readable = asyncio.Event()
            loop.add_reader(control, readable.set)
            try:
                await asyncio.wait_for(readable.wait(), BIRTH_SECONDS)
            finally:
                loop.remove_reader(control)
            answer = seqpacket.receive(control, MESSAGE_BYTES, 0)
        except (OSError, TimeoutError):
            return None
        return int(answer[0]) if answer and answer[0] else None

    def close(self) -> None:
        """Ends the nursery; its children live on."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


def main(modules: Mapping[str, str] = MODULES) -> int:
    """Forks what is asked for until the other end of the pair is gone; in a child, runs the service. The exit status.

    `modules` are the services' by name; each has a `main`.
    """
    parser = argparse.ArgumentParser(
        prog="falkirk nursery", description="The process that `falkirk up` forks services from."
    )
    parser.add_argument("--control-fd", type=int, required=True)
    options, _ = parser.parse_known_args()
    os.set_inheritable(options.control_fd, False)
    gc.disable()
    mains: dict[str, Callable[[], int]] = {}
    for service, module in modules.items():
        mains[service] = importlib.import_module(module).main
    gc.collect()
    # What is loaded stays, and stays shared: a collection would write to every page of it.
    gc.freeze()
    gc.enable()
    request = _fork_on_request(options.control_fd)
    if request is None:
        return 0
    service, generation, *arguments = request
    os.environ[supervised.GENERATION] = generation
    sys.argv = [f"falkirk.{service}", *arguments]
    with contextlib.suppress(OSError, ValueError):
        _call_it([sys.executable, "-m", f"falkirk.{service}", *arguments])
    return mains[service]()


def _fork_on_request(control: int) -> list[str] | None:
    """Returns in each child with its request, and with None in the nursery once nobody can ask any more."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        poll.poll()
        message = seqpacket.receive(control, MESSAGE_BYTES, 0)
        if message is None:
            continue
        if not message[0]:
            return None
        if _fork_twice():
            seqpacket.send(control, str(os.getpid()).encode())
            os.close(control)
            return message[0].decode().split("\0")


def _fork_twice() -> bool:
    """True in a grandchild that the supervisor is the parent of; False here."""
    adopted, adopt = os.pipe()
    between = os.fork()
    if between:
        os.close(adopted)
        # Once it can be waited for its child has its new parent; only then does the pipe end.
        os.waitpid(between, 0)
        os.close(adopt)
        return False
    os.close(adopt)
    if os.fork():
        os._exit(0)
    os.read(adopted, 1)
    os.close(adopted)
    os.setpgid(0, 0)
    return True


def _call_it(words: Sequence[str]) -> None:
    """Makes /proc/self/cmdline (ps, top) say these words; as many bytes of them as there were at the start.

    The kernel reads them from where execve put them (proc_pid_cmdline(5)), fields 48 and 49 of proc_pid_stat(5).
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    size = end - begin
    # A last byte that isn't NUL would make the kernel read on into the environment.
    text = "\0".join(words).encode()[: size - 1].ljust(size, b"\0")
    ctypes.memmove(begin, text, size)


if __name__ == "__main__":
    sys.exit(main())
