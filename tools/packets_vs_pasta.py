"""`tools/packets-vs-pasta`: the packet cases of tests/packets against passt's `pasta`, which does the same job by a TAP device.

pasta runs as it does for a container, unprivileged, without `--config-net`: the kernel of its namespace has no address, so that nobody but this
tool answers what comes out of `tap0`; frames go in and out by a packet socket. The server, and the routes to where nobody is, are
those of the suite. A case says in its script where pasta differs (`pasta: differs: how`) or why it has no meaning there (`pasta: no: why`);
what isn't as the scripts say is printed with its transcript, and the exit code is 1. `--table` prints the differences as README has them.

Needs root for namespaces, iproute2 and pasta. Limit: what the fence can't see (answers that need the server's kernel) is waited for
`QUIET_S`; what pasta drops isn't counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from falkirk.linux import netns
from tests.netns.conftest import ServerNamespace, in_namespace
from tests.packets.conftest import quiet_limits, special_routes
from tests.packets.craft import packed
from tests.packets.ground import Mismatch
from tests.packets.read import Seen, seen
from tests.packets.runner import Run
from tests.packets.script import FAMILIES, Case, read_all
from tests.packets.server import Server
from tools.netlab import LabError, run, wait_for
from tools.processes import descendants

SCRIPTS: Final = Path(__file__).resolve().parents[1] / "tests" / "packets"
DEVICE: Final = "tap0"
MTU: Final = 1500
CLIENT: Final = {"ipv4": "10.77.0.2", "ipv6": "fd77::2"}
GATEWAY: Final = {"ipv4": "10.77.0.1", "ipv6": "fd77::1"}
QUIET_S: Final = 0.1
READY_S: Final = 10.0
ATTEMPTS: Final = 2
"""Of a case that doesn't go as its script says, before that is told: a machine may be slow for a moment."""
DEADLINE_S: Final = 2.0
"""How long an answer may take: longer than any retransmission that a case waits for."""
_ETHERNET: Final = struct.Struct(">6s6sH")
_TYPES: Final = {"ipv4": 0x0800, "ipv6": 0x86DD}
_ARP: Final = 0x0806


class PastaRoad:
    """pasta as a road for packet cases: see `tests.packets.runner.Road`."""

    name = "pasta"
    partial = False
    mtu = MTU

    def __init__(self) -> None:
        command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--", "pasta", "--ns-ifname", DEVICE]
        command += ["--foreground", "--quiet", "--no-map-gw", "--mtu", str(MTU)]
        for family in FAMILIES:
            command += ["--address", CLIENT[family], "--gateway", GATEWAY[family]]
        command += ["--", "sh", "-c", "echo $$; exec sleep infinity"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LabError(f"pasta ended with {self._process.wait()}")
        # Its own pid namespace may number the shell otherwise; the children of pasta are known outside.
        self.namespace = self._find_namespace()
        in_namespace(self.namespace, run, ["ip", "link", "set", DEVICE, "addrgenmode", "none", "mtu", str(MTU), "up"])
        self._socket = in_namespace(self.namespace, self._open)
        self._mac = self._socket.getsockname()[4]
        self._inbox: list[Seen] = []
        self._peer = b"\xff" * 6
        wait_for("pasta to answer ARP", lambda: self._fence(1.0), READY_S)

    def _find_namespace(self) -> int:
        found: list[int] = []
        own = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116 -- a magic link

        def look() -> bool:
            for pid in descendants(self._process.pid):
                with contextlib.suppress(OSError):
                    path = f"/proc/{pid}/ns/net"
                    if os.stat(path).st_ino != own:  # noqa: PTH116
                        found.append(os.open(path, os.O_RDONLY))
                        return True
            return False

        wait_for("pasta's namespace", look, READY_S)
        return found[0]

    @staticmethod
    def _open() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        sock.bind((DEVICE, 3))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        return sock

    def address(self, family: str) -> str:
        """The guest's."""
        return CLIENT[family]

    def send(self, packet: bytes, *, whole: bool = False, gso: int = 0) -> bytes:
        """One frame."""
        family = "ipv6" if packet[:1] and packet[0] >> 4 == 6 else "ipv4"
        self._socket.send(_ETHERNET.pack(self._peer, self._mac, _TYPES[family]) + packet)
        return packet

    def receive(self, deadline: float) -> Seen | None:
        """The next packet for the guest."""
        while not self._inbox:
            if not self._read(deadline):
                return None
        return self._inbox.pop(0)

    def _read(self, deadline: float) -> bool:
        """Take one frame in; False at the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        self._socket.settimeout(left)
        try:
            frame, address = self._socket.recvfrom(1 << 17)
        except TimeoutError:
            return False
        _, source, kind = _ETHERNET.unpack_from(frame)
        if address[2] == socket.PACKET_OUTGOING:
            return True
        if kind == _ARP and frame[20:22] == b"\0\2":
            self._peer = source
            self._arps += 1
        elif kind in _TYPES.values():
            packet = seen(_unpadded(frame[_ETHERNET.size :]))
            if packet.destination in CLIENT.values():
                self._inbox.append(packet)
        return True

    _arps = 0

    def _fence(self, seconds: float) -> bool:
        """Ask by ARP for the gateway, and wait for the answer."""
        before = self._arps
        source, target = packed(CLIENT["ipv4"]), packed(GATEWAY["ipv4"])
        question = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, self._mac, source, bytes(6), target)
        self._socket.send(_ETHERNET.pack(b"\xff" * 6, self._mac, _ARP) + question)
        deadline = time.monotonic() + seconds
        while self._arps == before:
            if not self._read(deadline):
                return False
        return True

    def settle(self) -> list[Seen]:
        """Two rounds through pasta's loop, and a moment for what needs the server's kernel."""
        for _ in range(2):
            assert self._fence(READY_S), "pasta doesn't answer"
        deadline = time.monotonic() + QUIET_S
        while self._read(deadline):
            pass
        rest, self._inbox = self._inbox, []
        return rest

    @property
    def died(self) -> bool:
        """Whether pasta has ended by itself."""
        return self._process.poll() is not None

    def dropped(self) -> dict[str, int] | None:
        """pasta doesn't count."""
        return None

    def close(self) -> None:
        """End pasta and what runs in its namespace."""
        self._socket.close()
        os.close(self.namespace)
        for pid in reversed([self._process.pid, *descendants(self._process.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _unpadded(data: bytes) -> bytes:
    """Ethernet pads what is short."""
    total = int.from_bytes(data[2:4], "big") if data[0] >> 4 == 4 else 40 + int.from_bytes(data[4:6], "big")
    return data[:total]


@contextlib.contextmanager
def surroundings() -> Iterator[Server]:
    """A namespace of our own with a server beyond a cable, the way there being the default route."""
    netns.unshare_network()
    with contextlib.ExitStack() as stack:
        run(["ip", "link", "set", "lo", "up"])
        namespace = ServerNamespace()
        stack.callback(namespace.close)
        run(["ip", "route", "add", "default", "via", namespace.address4])
        run(["ip", "route", "add", "default", "via", namespace.address6])
        stack.enter_context(special_routes(namespace))
        namespace.call(quiet_limits)
        # pasta's echo needs ping sockets, which a new namespace gives to nobody.
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
        server = Server(namespace, DEADLINE_S)
        stack.callback(server.close_for_good)
        yield server


def judge(case: Case, wrong: dict[str, str]) -> str:
    """What of a case's outcomes (family -> what went another way) its script doesn't say; empty where all is said."""
    expected = case.pasta.startswith("differs: ")
    if wrong and not expected:
        return "differs, which its script doesn't say"
    if not wrong and expected:
        return "is the same, though its script says that it differs"
    return ""


def table(cases: Sequence[Case]) -> str:
    """The differences as README has them."""
    rows: dict[str, list[str]] = {}
    for case in cases:
        if case.pasta.startswith("differs: "):
            rows.setdefault(case.pasta.removeprefix("differs: "), []).append(f"`{case.name}`")
    return "\n".join(
        ["| pasta | Cases |", "|---|---|", *(f"| {how} | {', '.join(names)} |" for how, names in rows.items())]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where every case went as its script says."""
    parser = argparse.ArgumentParser(prog="tools/packets-vs-pasta", description="The packet cases against pasta.")
    parser.add_argument(
        "-k", default="", help="only cases whose file and name contain one of these, separated by commas"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="also print the differences that scripts name")
    parser.add_argument("--table", action="store_true", help="print the differences as a table, run nothing")
    options = parser.parse_args(arguments)
    cases = [
        case for case in read_all(SCRIPTS) if any(part in f"{case.file}-{case.name}" for part in options.k.split(","))
    ]
    if options.table:
        print(table(cases))
        return 0
    if shutil.which("pasta") is None:
        print("error: pasta isn't installed (apt-get install passt)", file=sys.stderr)
        return 1
    same = differ = surprises = 0
    applicable = [case for case in cases if not case.pasta.startswith("no: ") and "raw" in case.framings]
    with surroundings() as server, contextlib.ExitStack() as stack:
        road = stack.enter_context(contextlib.closing(PastaRoad()))
        for case in applicable:
            for _ in range(ATTEMPTS):
                wrong: dict[str, str] = {}
                for family in case.families:
                    try:
                        Run(case, road, family, server, DEADLINE_S).run()
                    except (Mismatch, AssertionError, OSError) as error:
                        wrong[family] = str(error)
                        # A new one: what the case has left must not be the next one's, and some don't survive their case.
                        died = road.died
                        stack.close()
                        road = stack.enter_context(contextlib.closing(PastaRoad()))
                        if died:
                            wrong[family] += "\npasta has died of it"
                surprise = judge(case, wrong)
                if not surprise:
                    break
            if surprise or options.verbose:
                print(f"=== {case.file} {case.name}: {surprise}\n" + "\n".join(wrong.values()), flush=True)
            surprises += bool(surprise)
            same, differ = same + (not wrong), differ + bool(wrong)
    print(f"{len(applicable)} of {len(cases)} cases apply: {same} the same, {differ} differ, {surprises} not as said")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
