"""`tools/soak wireguard`: WireGuard clients through a whole mesh, for as long as three of their rekeys take (they make one every two minutes).

Three at once, Debian's wireguard-go, (where there is a `go` to build it) the newest one, and ours, each in a namespace of its own. Each first pings, and
takes and gives a gigabyte by SHA-256. Then a connection of each ticks all the time, while things happen to all: another port of the client, another
address, both; the on-ramp's workers are killed; the whole on-ramp is killed, and is ended. After each: how long was the longest silence, and did the connection go on.
At last nothing happens for the rest of the time but rekeys. Exit code 0 where no byte was wrong and no connection lost.

Limits: IPv4 outside; our client's port is its system's choice, so it stays. Silences are told, not judged: on a machine that does other things a client may wait as long for its processor.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from tools import go_peers
from tools.bench_wireguard import WIREGUARD_GO, key_of
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, wait_for
from tools.own_device import OwnDevice
from tools.processes import children, module
from tools.wg_device import StockDevice

STEADY: Final = Path(__file__).parent / "load" / "steady.py"
SIZE: Final = 1 << 30
PORT, SERVICE = 51820, 7000
APART_S: Final = 15.0
"""Between two events: longer than any of a client's own timers takes to mend them."""
REKEYS: Final = 3
ANOTHER_PORT, BOTH = "another port", "both at once"
DEADLINE_S: Final = 20.0


class Client:
    """One client and its connection."""

    def __init__(self, place: Walk, device: StockDevice | OwnDevice, number: int) -> None:
        self.name, self.near = device.name, f"198.18.{number}.1"
        self.outer = [f"198.18.{number}.{host}" for host in (2, 3)]
        self.device = device
        place.lab.cable(place.node, device.namespace, [f"{self.near}/24"], [f"{address}/24" for address in self.outer])
        self.handshakes: set[int] = set()
        self._ticks: subprocess.Popen[str] | None = None
        self._port = 40_000 + number
        self._address = 0

    def steady(self, *words: str) -> list[str]:
        """The command line of one of the connections."""
        return self.device.namespace.command(sys.executable, str(STEADY), *words)

    def start(self, place: Walk, seconds: float) -> None:
        """Begin to tick."""
        self._ticks = subprocess.Popen(
            self.steady("tick", place.server_at, str(SERVICE), f"{seconds:g}"), stdout=subprocess.PIPE, text=True
        )
        place.lab.on_exit(self._ticks.kill)

    def end(self) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """The connection's last word, and its silences. Raises LabError where it was lost."""
        assert self._ticks is not None
        said, _ = self._ticks.communicate()
        lines = [json.loads(line) for line in said.splitlines()]
        if self._ticks.returncode or not lines or "ticks" not in lines[-1]:
            raise LabError(f"{self.name}: the connection was lost")
        return lines[-1], lines[:-1]

    def lives(self) -> bool:
        """Whether it still ticks."""
        return self._ticks is not None and self._ticks.poll() is None

    def look(self) -> None:
        """Remember the handshake that is the last at present."""
        self.handshakes.add(self.device.handshake())

    # what may happen to it

    def another_port(self) -> None:
        """As behind a NAT that has forgotten it. Ours can't be told to; what is found then isn't told (`_told`)."""
        self._port += 100
        if isinstance(self.device, StockDevice):
            self.device.namespace.run("wg", "set", self.device.interface, "listen-port", str(self._port))

    def another_address(self) -> None:
        """The other one of its two: as from one network to another, while both are there."""
        self._address ^= 1
        found = json.loads(self.device.namespace.run("ip", "-j", "route", "get", self.near))
        self.device.namespace.run(
            "ip", "route", "replace", f"{self.near}/32", "dev", found[0]["dev"], "src", self.outer[self._address]
        )

    def both(self) -> None:
        """At once."""
        self.another_address()
        self.another_port()


class Walk:
    """A mesh, a server, and the clients, connected."""

    def __init__(self, lab: Lab, directory: Path, workers: int, say: Callable[[str], None]) -> None:
        self.lab, self.directory = lab, directory
        self.node, far = lab.namespace("node"), lab.namespace("server")
        self.server_at = "198.18.1.2"
        lab.cable(self.node, far, ["198.18.1.1/24"], [f"{self.server_at}/24"])
        self.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
        far.start(sys.executable, str(STEADY), "serve", str(SERVICE))
        wait_for("the server", lambda: f":{SERVICE} " in far.run("ss", "-Hltn"), DEADLINE_S)
        programs = {"debian": "wireguard-go"}
        newest = go_peers.program(WIREGUARD_GO, say)
        if newest is not None:
            programs["newest"] = str(newest)
        self.mesh = Mesh(lab, directory, self.node)
        stock = {
            f"100.96.0.{9 + at}": StockDevice(lab, name, directory, program)
            for at, (name, program) in enumerate(programs.items())
        }
        ours = OwnDevice(lab, "ours", directory, self.mesh)
        devices: list[StockDevice | OwnDevice] = [*stock.values(), ours]
        self.clients = [Client(self, device, number) for number, device in enumerate(devices, 2)]
        endpoints = [f"{client.near}:{PORT}" for client in self.clients]
        self.mesh.start({"workers": workers, "onramp": {"wireguard": {"port": PORT, "endpoints": endpoints[-1:]}}})
        known = [
            resource("Device", device.name, "acme", publicKey=device.public_key, addresses=[address])
            for address, device in stock.items()
        ]
        self.mesh.apply(
            [
                resource("Tenant", "acme"),
                resource("Route", "all", "acme", prefix="0.0.0.0/0", target={"internet": {}}),
                resource("Policy", "access", "acme", priority=10, rules=[rule("all", "true", "allow")]),
                *known,
            ]
        )
        key = key_of(self.mesh)
        for endpoint, (address, device) in zip(endpoints, stock.items(), strict=False):
            device.join(key, endpoint, [address], allowed=["0.0.0.0/0"])
        wait_for("the node, by the registry", lambda: bool(self.mesh.ask_json("nodes", "node", "list")), DEADLINE_S)
        ours.enroll("--tenant", "acme")
        ours.up()

    def onramp(self) -> list[int]:
        """Its process, as its lock says; none while there is none. Nobody is asked, as that would take a processor from who starts meanwhile."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.mesh.run_dir / ".onramp.lock").read_text())
            return [pid] if module(pid) == "falkirk.onramp" else []
        return []

    def workers(self) -> list[int]:
        """Those of the on-ramp that run."""
        found = []
        for pid in (child for parent in self.onramp() for child in children(parent)):
            with contextlib.suppress(OSError):
                found += [pid] if module(pid) == "falkirk.onramp.worker" else []
        return found

    def end(self, pids: Callable[[], list[int]], number: signal.Signals) -> None:
        """Signal them, and wait until there are as many others."""
        wait_for("what is to end", lambda: bool(pids()), DEADLINE_S)
        before = pids()
        for pid in before:
            os.kill(pid, number)
        wait_for("others", lambda: len(now := pids()) == len(before) and not {*now} & {*before}, DEADLINE_S)

    def _each(self, what: Callable[[Client], None]) -> None:
        for client in self.clients:
            what(client)

    def events(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What happens, in this order."""
        for name, roam in (
            (ANOTHER_PORT, Client.another_port),
            ("another address", Client.another_address),
            (BOTH, Client.both),
        ):
            yield name, partial(self._each, roam)
        yield from self.restarts()

    def restarts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The last three of them."""
        yield "on-ramp's workers killed", lambda: self.end(self.workers, signal.SIGKILL)
        yield "on-ramp killed", lambda: self.end(self.onramp, signal.SIGKILL)
        yield "on-ramp ended", lambda: self.end(self.onramp, signal.SIGTERM)


@contextlib.contextmanager
def walk(workers: int, say: Callable[[str], None]) -> Iterator[Walk]:
    """All of it, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="fk-soak-") as directory, Lab() as lab:
        yield Walk(lab, Path(directory), workers, say)


def soak(minutes: float, size: int, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What was found, by client. Raises LabError where a connection was lost or a byte wrong."""
    with walk(workers, say) as place:
        found: dict[str, Any] = {client.name: {} for client in place.clients}
        for client in place.clients:
            if not client.device.ping(place.server_at, seconds=5):
                raise LabError(f"{client.name}: the server doesn't answer a ping")
            for what in ("take", "give"):
                done = _done(client.steady(what, place.server_at, str(SERVICE), str(size)))
                if not done["sha256_ok"]:
                    raise LabError(f"{client.name}: {what} of {size} bytes: another digest")
                rate = size * 8 / done["seconds"] / 1e9
                found[client.name][what] = {"bytes": size, "gbit_s": round(rate, 3), "sha256_ok": True}
                say(f"{client.name}: {what} {size} bytes, SHA-256 right, {rate:.2f} Gbit/s")
        begun = time.monotonic()
        for client in place.clients:
            client.start(place, minutes * 60)
        happened: list[tuple[str, float]] = [("nothing yet", begun)]
        for name, event in place.events():
            _watch(place, APART_S)
            say(f"{time.monotonic() - begun:5.0f} s  {name}")
            happened.append((name, time.monotonic()))
            event()
        _watch(place, APART_S)
        happened.append(("rekeys only", time.monotonic()))
        say(f"{time.monotonic() - begun:5.0f} s  rekeys only")
        renewed = {client.name: len(client.handshakes) for client in place.clients}
        _watch(place, begun + minutes * 60 - time.monotonic())
        for client in place.clients:
            last, silences = client.end()
            if not last["whole"]:
                raise LabError(f"{client.name}: bytes of the connection were wrong")
            found[client.name] |= {
                "ticks": last["ticks"],
                "rekeys": len(client.handshakes) - renewed[client.name],
                "longest_silence_s": _told(client, _by_event(happened, silences)),
            }
        return found


def _watch(place: Walk, seconds: float) -> None:
    """Let time pass, and see handshakes. Raises LabError where a connection is lost."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for client in place.clients:
            client.look()
            if not client.lives() and time.monotonic() < until - 1:
                client.end()
        # Handshakes are told by the second, and nothing tells of them.
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))


def _by_event(happened: list[tuple[str, float]], silences: list[dict[str, float]]) -> dict[str, float]:
    """The longest silence that began after each, before the next."""
    longest: dict[str, float] = {}
    for (name, start), (_, stop) in itertools.pairwise([*happened, ("", float("inf"))]):
        # What is under way at the event has begun up to a tick before it.
        within = [each["gap_s"] for each in silences if start - 0.1 <= each["from"] < stop - 0.1]
        longest[name] = max(within, default=0.0)
    return longest


def _told(client: Client, silences: dict[str, float]) -> dict[str, float]:
    """Of what happened to this client."""
    whole = isinstance(client.device, StockDevice)
    return {name: gap for name, gap in silences.items() if whole or name not in (ANOTHER_PORT, BOTH)}


def _done(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command[-4:])}: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(found: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for name, of in found.items():
        lines.append(
            f"{name}: {of['ticks']} ticks, all of them back; {of['rekeys']} rekeys at the end; longest silence"
        )
        lines += [
            f"    {event:26}{f'{gap:.2f} s' if gap else 'below 0.1 s'}"
            for event, gap in of["longest_silence_s"].items()
        ]
    return "\n".join(lines)
