"""`tools/soak`: does anything leak? A mesh, a server beyond a cable, and flows for as long as they are wanted.

    sessions    1,000 UDP sessions at once for so many minutes, each with a datagram and its echo every few seconds
    churn       a million short flows, UDP and TCP by turns, through tunnels that open and close
    wireguard   WireGuard clients, stock ones and ours, through roaming, restarts and rekeys (`tools.soak_wireguard`)

Of the first two: before and after, each process of the mesh is asked what it holds: descriptors, anonymous memory (/proc/PID/smaps_rollup), and the flow
tracker its flows and slots. What must be as it was is so, or the exit code is 1: descriptors, flows and slots exactly, memory
of the packet workers within `MEMORY`. "Before" is after a warm-up of the same kind: an interpreter and an allocator that have never worked hold
less than ones that have. `--json` prints one object.

Needs root. Limits: IPv4, one device, raw framing; slots rest a minute and TIME-WAIT another, so a churn is measured two minutes
after its last flow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tools import soak_wireguard
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, guard_signals, wait_for
from tools.processes import descendants, module
from tools.soak_device import Count, Device

SERVER: Final = Path(__file__).parent / "load" / "soak_server.py"
MEMORY: Final = 0.02
"""By how much the packet workers' memory may differ."""
WARM_UP: Final = 20_000
PER_TUNNEL: Final = 2_000
"""Flows of one tunnel before the next one takes its place."""
REST_S: Final = 130.0
ROUND_S: Final = 3.0
"""Between two datagrams of a session."""
QUIET_S: Final = 15.0
"""How long what has ended may take to be tidied away."""
WORKERS: Final = ("falkirk.flow.worker", "falkirk.upgrader.worker")


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    descriptors: int
    anonymous_kib: int


@dataclass(frozen=True)
class Books:
    """What the mesh holds."""

    processes: dict[str, Held]
    """By process id and module."""
    flows: int
    slots: int


class Soak:
    """A mesh under observation. `pid` is `falkirk up`; `stats` gives the flow tracker's Stats."""

    def __init__(self, pid: int, stats: Callable[[], Any], open_device: Callable[[], Device]) -> None:
        self._pid, self._stats, self._open = pid, stats, open_device

    def books(self) -> Books:
        """Now."""
        workers = self._stats().workers
        processes = {}
        for pid in [self._pid, *descendants(self._pid)]:
            with contextlib.suppress(OSError):
                processes[f"{pid} {module(pid)}"] = Held(
                    len(list(Path(f"/proc/{pid}/fd").iterdir())), anonymous_kib(pid)
                )
        return Books(processes, sum(each.flows for each in workers), sum(each.slots_active for each in workers))

    def at_rest(self) -> Books:
        """Once no flow is left. Raises LabError."""
        wait_for("the last flow's end", lambda: not (books := self.books()).flows and not books.slots, QUIET_S)
        return self.books()

    def sessions(self, sessions: int, rounds: int, pause_s: float) -> tuple[Count, Books]:
        """So many sessions, all of them in each round; what came of their datagrams, and the books while they were all open."""
        device = self._open()
        try:
            for number in range(rounds):
                begun = time.monotonic()
                device.talk(sessions, b"round %d" % number)
                if number + 1 < rounds:
                    # Spread over time: that is what a soak is.
                    time.sleep(max(0.0, pause_s - (time.monotonic() - begun)))
            # The gauge of flows is written once a second.
            wait_for("the sessions in the statistics", lambda: self.books().flows >= sessions, QUIET_S)
            return device.count, self.books()
        finally:
            device.close()

    def churn(self, flows: int, until: float = float("inf"), told: Callable[[Count], None] | None = None) -> Count:
        """So many flows, or as many as go until then (monotonic)."""
        total = Count()
        while total.begun < flows and time.monotonic() < until:
            device = self._open()
            try:
                device.churn(min(PER_TUNNEL, flows - total.begun))
            finally:
                device.close()
            for name, value in asdict(device.count).items():
                setattr(total, name, getattr(total, name) + value)
            if told is not None:
                told(total)
        return total


def anonymous_kib(pid: int) -> int:
    """Memory that is a process's own: heap and stacks, not files and what is shared by mapping."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    return 0


CONNECTIONS = 8
"""Descriptors that a process may have more: those of questions to it that are on their way. Far below what sessions take."""


def leaks(before: Books, after: Books, memory: float | None = MEMORY) -> list[str]:
    """What isn't as it was; memory isn't judged where `memory` is None."""
    found = [f"{name}: {value} left" for name, value in (("flows", after.flows), ("slots", after.slots)) if value]
    if before.processes.keys() != after.processes.keys():
        found.append(f"processes: {sorted(before.processes.keys() ^ after.processes.keys())} came or went")
    for name in before.processes.keys() & after.processes.keys():
        was, now = before.processes[name], after.processes[name]
        if now.descriptors > was.descriptors + CONNECTIONS:
            found.append(f"{name}: {was.descriptors} descriptors before, {now.descriptors} after")
        change = now.anonymous_kib / max(was.anonymous_kib, 1) - 1
        if memory is not None and name.endswith(WORKERS) and abs(change) > memory:
            found.append(f"{name}: {was.anonymous_kib} KiB before, {now.anonymous_kib} after ({change:+.1%})")
    return found


@contextlib.contextmanager
def stage(workers: int) -> Iterator[Soak]:
    """A mesh in a namespace, a server in another."""
    with tempfile.TemporaryDirectory(prefix="fk-soak-") as directory, Lab() as lab:
        node, far = lab.namespace("node"), lab.namespace("server")
        network = f"198.18.{lab.number}"
        lab.cable(node, far, [f"{network}.1/24"], [f"{network}.2/24"])
        server = subprocess.Popen(
            far.command(sys.executable, str(SERVER), f"{network}.2"), stdout=subprocess.PIPE, text=True
        )
        lab.on_exit(server.wait)
        lab.on_exit(server.kill)
        assert server.stdout is not None
        udp_port, tcp_port = (int(port) for port in server.stdout.readline().split())
        mesh = Mesh(lab, Path(directory), node)
        pid = mesh.start({"workers": workers, "onramp": {"mtu": 1500}})
        mesh.apply(
            [
                resource("Tenant", "acme"),
                resource("User", "alice", "acme", groups=["staff"]),
                resource("Device", "laptop", "acme", user="alice"),
                resource("Route", "all", "acme", prefix="0.0.0.0/0", target={"internet": {}}),
                resource("Policy", "access", "acme", priority=10, rules=[rule("all", "true", "allow")]),
            ]
        )
        server_at = (f"{network}.2", udp_port, tcp_port)
        yield Soak(pid, lambda: flow_stats(mesh.run_dir), lambda: opened(mesh.run_dir / "tunnel.sock", server_at))


def opened(tunnel_sock: Path, server: tuple[str, int, int], device: str = "laptop") -> Device:
    """A device's tunnel, once the on-ramp knows the device."""
    made: list[Device] = []

    def admitted() -> bool:
        with contextlib.suppress(RuntimeError):
            made.append(Device(tunnel_sock, "acme", device, server))
        return bool(made)

    wait_for("the device to be admitted", admitted, QUIET_S)
    return made[0]


def flow_stats(run_dir: Path) -> Any:
    """FlowService.Stats."""
    from falkirk.api.flow.v1 import flow_service_pb2 as messages
    from falkirk.api.flow.v1 import flow_service_pb2_grpc as stubs
    from falkirk.runtime import client

    with client.sync_channel(run_dir, "flow") as channel:
        return stubs.FlowServiceStub(channel).Stats(messages.StatsRequest(), timeout=20)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where nothing leaked and nothing was lost for good."""
    parser = argparse.ArgumentParser(prog="tools/soak", description="Does anything leak?")
    parser.add_argument("what", choices=("sessions", "churn", "wireguard"))
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the sessions, of WireGuard's connections; at most, of the churn"
    )
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--flows", type=int, default=1_000_000)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="flows churned before anything is counted")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=soak_wireguard.SIZE, help="of each of WireGuard's transfers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    guard_signals()

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    if options.what == "wireguard":
        return _wireguard(options, say)
    try:
        with stage(options.workers) as soak:
            begun = time.monotonic()
            if options.what == "sessions":
                soak.sessions(options.sessions, 2, 0.0)
                before = soak.at_rest()
                count, _ = soak.sessions(options.sessions, max(2, int(options.minutes * 60 / ROUND_S)), ROUND_S)
                after = soak.at_rest()
            else:
                soak.churn(options.warm_up)
                say(f"warm after {time.monotonic() - begun:.0f} s; resting for {REST_S:.0f} s")
                time.sleep(REST_S)
                before = soak.at_rest()
                begun = time.monotonic()
                count = soak.churn(
                    options.flows,
                    begun + options.minutes * 60,
                    lambda total: (
                        None
                        if total.begun % 20_000
                        else say(f"{total} {total.begun / (time.monotonic() - begun):.0f}/s")
                    ),
                )
                say(f"done after {time.monotonic() - begun:.0f} s; resting for {REST_S:.0f} s")
                time.sleep(REST_S)
                after = soak.at_rest()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = leaks(before, after)
    if count.lost or count.wrong or count.refused:
        found.append(f"flows: {count.lost} lost, {count.refused} refused, {count.wrong} answered wrongly")
    if options.json:
        print(json.dumps({"count": asdict(count), "before": asdict(before), "after": asdict(after), "leaks": found}))
    for name in sorted(before.processes):
        now = after.processes.get(name, Held(0, 0))
        was = before.processes[name]
        say(
            f"{name:45} {was.descriptors:5} -> {now.descriptors:5} descriptors {was.anonymous_kib:8} -> {now.anonymous_kib:8} KiB"
        )
    say(f"{count}\n" + ("\n".join(found) or "nothing leaked"))
    return 1 if found else 0


def _wireguard(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    try:
        found = soak_wireguard.soak(options.minutes, options.bytes, options.workers, say)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found))
    say(soak_wireguard.show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
