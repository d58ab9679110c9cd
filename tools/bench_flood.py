"""The part of `tools/bench wireguard` about floods: what a device's transfer keeps while others send 20,000 initiations a second.

The device is Debian's wireguard-go with iperf3 through the mesh, one way and the other; the flood (`tools/load/wireguard_flood.py`) comes one datagram
after another from sixteen other addresses. In turn, in each round:

    quiet      nobody floods
    control    the same flood, to a socket beside the node's that nobody reads: what the generator and the kernel take of this machine
    strangers  initiations of keys that are nobody's, with the right mac1
    device     initiations of a device's own key, without a cookie

What existing sessions keep is told against both: against `quiet` it has in it what the generator takes, which on a machine of two processors
is a part of everything; against `control` it is the node's own doing. The node's counters tell that cookies were asked for, and the generator how
many it got.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.bench_stage import Samples, medians, ratio
from tools.netlab import LabError, Namespace, stop, wait_for

RATE = 20_000
SOURCES = 16
LONGEST_S = 120.0
DIRECTIONS = ("up", "down")
KINDS = ("quiet", "control", "strangers", "device")
SINK = "import signal,socket,sys; s=socket.socket(2,2); s.bind((sys.argv[1],int(sys.argv[2]))); print('bound',flush=True); signal.pause()"


class Flooder:
    """A namespace with many addresses, cabled to the node's at `near`, and the sockets that are flooded there."""

    def __init__(self, namespace: Namespace, addresses: list[str], near: str, node_key: str, port: int) -> None:
        self._namespace, self._addresses, self._near = namespace, addresses, near
        self._key, self._port = node_key, port

    def start(self, kind: str, sink: int, device: Path, log: Path) -> subprocess.Popen[bytes]:
        """A flood of a kind, once it has begun; its last line is the result, after SIGTERM."""
        port = sink if kind == "control" else self._port
        command = [sys.executable, "-m", "tools.load.wireguard_flood", self._key, self._near, str(port)]
        command += ["--rate", str(RATE), "--seconds", str(LONGEST_S), "--sources", ",".join(self._addresses)]
        command += ["--device", str(device)] if kind == "device" else []
        with log.open("wb") as output:
            process = self._namespace.start(*command, log=output)
        wait_for("a flood", lambda: "begun" in log.read_text(errors="replace"), 20)
        return process


def sink(node: Namespace, address: str, port: int, log: Path) -> None:
    """A socket in the node's namespace that nobody reads."""
    with log.open("wb") as output:
        node.start(sys.executable, "-c", SINK, address, str(port), log=output)
    wait_for("a socket to flood", lambda: "bound" in log.read_text(), 10)


def sample(
    transfer: Callable[[str], dict[str, float]],
    flood: Callable[[], subprocess.Popen[bytes]] | None,
    asked: Callable[[], Mapping[str, int]],
    log: Path,
) -> dict[str, float]:
    """Both directions under one flood, which writes to `log`. `transfer` gives what one direction came to, `asked` the node's counters."""
    found: dict[str, float] = {}
    before = asked()
    process = flood() if flood is not None else None
    try:
        for direction in DIRECTIONS:
            found |= {f"{direction}:{key}": value for key, value in transfer(direction).items()}
        if process is None:
            return found
        if process.poll() is not None:
            raise LabError(f"the flood ended early: {log.read_text(errors='replace')[-500:]}")
        process.terminate()
        process.wait(10)
    finally:
        if process is not None:
            stop(process)
    after = asked()
    result: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    found |= {key: result[key] for key in ("per_s", "cookie_replies", "cpu", "lost")}
    for reason in ("no_cookie", "handshake_rate", "unknown_key"):
        found[reason] = after.get(reason, 0) - before.get(reason, 0)
    return found


def report(samples: Samples) -> dict[str, Any]:
    """Medians by kind, and the shares of its throughput that a transfer keeps."""
    found = medians(samples)

    def shares(of: str) -> dict[str, dict[str, float | None]]:
        return {
            kind: {
                direction: ratio(found[kind][f"{direction}:gbit_s"], found[of][f"{direction}:gbit_s"])
                for direction in DIRECTIONS
            }
            for kind in ("strangers", "device")
        }

    return {
        "per_s": RATE,
        "kept_of_control": shares("control"),
        "kept_of_quiet": shares("quiet"),
        "control_of_quiet": {
            direction: ratio(found["control"][f"{direction}:gbit_s"], found["quiet"][f"{direction}:gbit_s"])
            for direction in DIRECTIONS
        },
        "by_kind": {kind: {key: round(value, 4) for key, value in found[kind].items()} for kind in KINDS},
    }


def show(result: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"{result['per_s']:,} initiations a second; Gbit/s of a transfer, and the share that it keeps"]
    lines.append(f"{'':12}{'up':>8}{'down':>8}{'of control':>18}{'of quiet':>18}{'cookies asked':>15}{'generator':>11}")
    for kind, of in result["by_kind"].items():
        cells = "".join(f"{of[f'{one}:gbit_s']:>8}" for one in DIRECTIONS)
        for against in ("kept_of_control", "kept_of_quiet"):
            kept = result[against].get(kind)
            cells += f"{(str(kept['up']) + ' / ' + str(kept['down'])) if kept else '':>18}"
        cells += f"{of.get('no_cookie', 0):>15,}{of.get('cpu', 0):>11.0%}"
        lines.append(f"{kind:12}{cells}")
    return lines
