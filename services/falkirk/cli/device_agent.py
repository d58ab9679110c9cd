"""`python -m falkirk.cli.device_agent STATE`: stays while the device is up, and keeps its interface as the registry wants it.

It starts the interface (`falkirk.linux.wireguard`), and starts it again where it ended without being told to. Now and then it asks the registry: where nodes, routes,
addresses or DNS have changed, the interface is ended and started with them, which its connections outlive as they outlive a lost packet; where facts about
this machine have changed, they are reported. `down` ends the interface, and the agent with it.

It says `up` on standard output once the interface is up for the first time; what happens later goes to standard error, a line each. A first start that
fails ends it with status 1.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from falkirk.cli import device_registry
from falkirk.cli.device_state import BadState, State
from falkirk.linux.wireguard import control
from falkirk.linux.wireguard.request import InterfaceRequest
from falkirk.runtime.backoff import Backoff
from falkirk.runtime.errors import FalkirkError

_END_SECONDS: Final = 10.0


class Agent:
    """One device's."""

    def __init__(self, state: State, interface: str, *, dns: bool, refresh: float) -> None:
        self._state = state
        self._name = interface
        self._dns = dns
        self._refresh = refresh
        self._process: subprocess.Popen[bytes] | None = None
        self._request: InterfaceRequest | None = None
        self._started = 0.0
        self._said = ""
        self._stopping = False

    def run(self) -> int:
        """Until the interface is ended in order; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if not self._start():
            return 1
        print("up", flush=True)
        sys.stdout.close()
        backoff = Backoff()
        while True:
            assert self._process is not None
            try:
                status = self._process.wait(self._refresh or None)
            except subprocess.TimeoutExpired:
                self._look()
                continue
            if status == 0 or self._stopping:
                return 0
            _say(f"the interface ended with status {status}; starting it again")
            self._start_again(backoff)

    def _start_again(self, backoff: Backoff) -> None:
        """Until it is up, or shall not be."""
        while not self._stopping:
            time.sleep(backoff.ended(time.monotonic() - self._started))
            if self._start():
                return

    def _stop(self, _number: int, _frame: object) -> None:
        self._stopping = True
        self._end()

    def _start(self) -> bool:
        """Start the interface; False where it ended at once, having said why."""
        enrolled = self._state.read()
        if enrolled is None:
            return False
        self._request = self._state.write_interface(enrolled, self._name, dns=self._dns)
        self._started = time.monotonic()
        command = [sys.executable, "-m", "falkirk.linux.wireguard", str(self._state.interface)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            if stdout.readline() == b"up\n":
                return True
        self._process.wait()
        return False

    def _look(self) -> None:
        """Take up what the registry says now. What goes wrong is told once, and changes nothing."""
        try:
            enrolled = self._state.read()
            if enrolled is None:
                return
            enrolled = device_registry.refresh(self._state, enrolled)
            wanted = self._state.request(enrolled, self._name, dns=self._dns)
        except (device_registry.Unreachable, device_registry.MayNotConnect, BadState, FalkirkError) as error:
            self._tell(f"{type(error).__name__}: {error}")
            return
        self._tell("")
        if wanted != self._request and wanted.peers:
            _say("the tunnel has changed; taking that up")
            self._end()
            assert self._process is not None
            self._process.wait(_END_SECONDS)
            self._start_again(Backoff())

    def _end(self) -> None:
        """End the interface in order."""
        try:
            control.ask(self._state.socket, "down")
        except control.NotRunning:
            if self._process is not None:
                self._process.terminate()

    def _tell(self, said: str) -> None:
        if said and said != self._said:
            _say(said)
        self._said = said


def _say(text: str) -> None:
    print(f"falkirk: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The command line, which `falkirk device up` writes."""
    parser = argparse.ArgumentParser(prog="falkirk.cli.device_agent", description=__doc__)
    parser.add_argument("state", type=Path, help="directory of the device's key and state")
    parser.add_argument("--interface", default="", help="name of the interface")
    parser.add_argument("--no-dns", action="store_true", help="leave DNS as it is")
    parser.add_argument(
        "--refresh", type=float, default=60.0, help="seconds between looks at what has changed; 0: none"
    )
    given = parser.parse_args()
    try:
        return Agent(State(given.state), given.interface, dns=not given.no_dns, refresh=given.refresh).run()
    except BadState as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
