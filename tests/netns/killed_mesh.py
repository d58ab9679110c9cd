"""A mesh under load whose processes are killed one at a time.

Every place (a device with its framing, on one of the workers) is a `falkirk lower` that only keeps a namespace: the
streams' sockets are opened inside by this process (setns works per thread). Servers are sockets in a namespace of
their own, behind a cable.

Needs root. Limit: which worker a device falls to is its id's to say, so there are more devices than are used.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from zlib import crc32

import grpc

from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
from falkirk.linux import netns
from falkirk.linux.seqpacket import connect
from tests.netns.conftest import ServerNamespace
from tests.netns.stream_load import HELLO, LASTING, Habit, Load, Stream
from tools.mesh import Mesh, health, resource, rule
from tools.netlab import Lab, wait_for

PATIENCE_S: Final = 20.0
"""How long a place may take to serve again; what it takes is measured and told."""
ATTEMPT_S: Final = 0.5
"""One attempt at a new connection; a SYN that was dropped is sent again only after a second."""
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
LOST: Final = {"ECONNRESET", "EPIPE"}
"""What a RST is told as; EPIPE where a FIN had come before (tcp_reset in Linux)."""


@dataclass(frozen=True)
class Victim:
    """A process of the mesh as `falkirk doctor` names it, and the workers whose streams die with it."""

    service: str
    name: str
    takes: frozenset[int]


class Place:
    """A device's namespace."""

    def __init__(self, device: str, framing: str, worker: int, process: subprocess.Popen[bytes]) -> None:
        self.device, self.framing, self.worker = device, framing, worker
        self._process = process
        self._namespace = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, "place", netns.join_network, (self._namespace,))

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        """A TCP socket of this place."""
        return self._thread.submit(socket.socket, family, socket.SOCK_STREAM).result()

    def leave(self) -> None:
        """End the tunnel. Raises AssertionError where it had ended before."""
        assert self._process.poll() is None, f"falkirk lower of {self} ended with {self._process.returncode}"
        self._process.terminate()

    def close(self) -> None:
        """Let the namespace go."""
        self._thread.shutdown()
        os.close(self._namespace)

    def __str__(self) -> str:
        return f"{self.framing} on worker {self.worker}"


@dataclass(frozen=True)
class Group:
    """Where a stream belongs."""

    place: Place
    family: socket.AddressFamily

    def __str__(self) -> str:
        return f"{self.place}, {self.family.name}"


@dataclass
class Recovery:
    """Seconds from the kill until each thing was seen."""

    name: str
    takes: frozenset[int]
    """Workers that lose their streams."""
    lost: int
    start: float
    settled: float = 0.0
    """When the load was whole again; 0 while it isn't."""
    streams_lost: float = 0.0
    process: float = 0.0
    health: float = 0.0
    connection: float = 0.0
    failed_briefly: int = 0

    @property
    def serves(self) -> float:
        """Until the place served again."""
        return max(self.process, self.health, self.connection)

    def __str__(self) -> str:
        lost = f"streams reset {self.streams_lost:5.2f} s" if self.lost else "no stream lost"
        return (
            f"{self.name:<26} serves again {self.serves:5.2f} s (process {self.process:5.2f}, health {self.health:5.2f}, "
            f"new connections {self.connection:5.2f}), {lost}, short streams failed {self.failed_briefly}"
        )


@dataclass
class KilledMesh:
    """The mesh, its places, its load."""

    mesh: Mesh
    lab: Lab
    workers: int
    places: list[Place]
    load: Load
    addresses: dict[socket.AddressFamily, tuple[str, int]]
    recoveries: list[Recovery] = field(default_factory=list)

    # processes

    def processes(self, service: str) -> dict[str, int]:
        """Process ids by name as the service's Stats tells them; none where it doesn't answer."""
        package = f"falkirk.api.{service}.v1.{service}_service"
        messages, stubs = importlib.import_module(f"{package}_pb2"), importlib.import_module(f"{package}_pb2_grpc")
        found: dict[str, int] = {}
        channel = grpc.insecure_channel(f"unix:{self.mesh.run_dir}/read/{service}.sock")
        with channel, contextlib.suppress(grpc.RpcError):
            stats = getattr(stubs, f"{service.capitalize()}ServiceStub")(channel).Stats
            found = {process.name: process.pid for process in stats(messages.StatsRequest(), timeout=1).processes}
        if found and service not in found:
            with contextlib.suppress(OSError, ValueError):
                found[service] = int((self.mesh.run_dir / f".{service}.lock").read_text())
        return found

    def stats(self) -> Any:
        """FlowService.Stats; None where it doesn't answer."""
        return self._ask_flow(lambda stub: stub.Stats(flow_service_pb2.StatsRequest(), timeout=2))

    def flows(self) -> int | None:
        """How many flows are live (1000 at most); None where nobody says."""
        answer = self._ask_flow(lambda stub: stub.List(flow_service_pb2.ListRequest(page_size=1000), timeout=2))
        return None if answer is None else len(answer.flows)

    def _ask_flow(self, question: Callable[[Any], Any]) -> Any:
        channel = grpc.insecure_channel(f"unix:{self.mesh.run_dir}/read/flow.sock")
        with channel, contextlib.suppress(grpc.RpcError):
            return question(flow_service_pb2_grpc.FlowServiceStub(channel))
        return None

    def victims(self) -> list[Victim]:
        """Every process that `falkirk doctor` lists, in the order in which they are killed."""
        report = json.loads(self.mesh.ask("doctor", "--json"))
        everyone = frozenset(range(self.workers))
        found = []
        for process in report["mesh"]["processes"]:
            service, name = process["service"], process["name"]
            kind, _, number = name.rpartition(".")
            takes: frozenset[int] = frozenset()
            if name in ("flow", "upgrader"):
                takes = everyone
            elif kind in ("flow.worker", "upgrader.worker"):
                takes = frozenset({int(number)})
            found.append(Victim(service, name, takes))
        assert {victim.name for victim in found} == self._expected()
        # The on-ramp's and the flow tracker's in turn: tunnels must come back by `Held` and by the on-ramp's copies.
        turn = ("registry", "policy", "router", "onramp.worker", "flow.worker", "onramp", "flow")
        return sorted(found, key=lambda victim: (_rank(victim, turn), victim.name))

    def _expected(self) -> set[str]:
        workers = {
            f"{kind}.worker.{number}" for kind in ("onramp", "flow", "upgrader") for number in range(self.workers)
        }
        services = {"registry", "policy", "router", "onramp", "flow", "upgrader"}
        return services | workers | {"router.worker.0", "upgrader.helper", "upgrader.lower_helper"}

    # load

    def groups(self) -> Iterator[Group]:
        """Every place, both families."""
        for place in self.places:
            for family in FAMILIES:
                yield Group(place, family)

    def fill(self) -> None:
        """Open what isn't open, and wait until all of it is steady."""
        streams = self.streams()
        have = {(stream.habit, stream.group) for stream in streams}
        for group in self.groups():
            # Small packets at full speed fill the TUN device's queue while nobody reads it.
            bulk = (Habit.BULK,) if group.place is self.places[1] else ()
            for habit in (*LASTING, *bulk):
                if (habit, group) not in have:
                    sock = group.place.socket(group.family)
                    streams.append(self.load.begin(habit, sock, self.addresses[group.family], group))
        try:
            wait_for("every stream is steady", lambda: all(stream.steady for stream in streams), PATIENCE_S)
            wait_for("every stream is in the flow table", lambda: (self.flows() or 0) >= len(streams), PATIENCE_S)
            for recovery in self.recoveries:
                recovery.settled = recovery.settled or time.monotonic()
        finally:
            unsteady = [str(stream) for stream in streams if not stream.steady]
            assert not unsteady, unsteady

    def streams(self) -> list[Stream]:
        """Those that last."""
        return [stream for stream in list(self.load.streams.values()) if stream.habit is not Habit.SHORT]

    def keep_brief(self) -> None:
        """A short stream at a time from every place."""
        for group in self.groups():

            def source(group: Group = group) -> tuple[socket.socket, tuple[str, int], object]:
                return group.place.socket(group.family), self.addresses[group.family], group

            self.load.keep_brief(source)

    def connects(self, group: Group) -> bool:
        """One attempt at a new connection that the server answers."""
        with group.place.socket(group.family) as sock:
            sock.settimeout(ATTEMPT_S)
            with contextlib.suppress(OSError):
                sock.connect(self.addresses[group.family])
                # No stream has the number 0: the server closes.
                sock.sendall(HELLO.pack(b"probe", 0))
                return sock.recv(1) == b""
        return False

    def admits(self) -> bool:
        """Whether the on-ramp takes a new tunnel."""
        try:
            with connect(self.mesh.run_dir / "tunnel.sock") as tunnel:
                tunnel.settimeout(1)
                tunnel.send(json.dumps({"v": 1, "tenant": "acme", "device": self.places[0].device}).encode())
                return tunnel.recv(4096).startswith(b'{"admitted"')
        except OSError:
            return False

    def finish(self) -> None:
        """Have everybody read what is there, then end all streams and close every tunnel."""
        parked = [stream for stream in self.streams() if stream.habit is Habit.FINISHED]
        self.load.read_on(parked)
        wait_for("finished streams arrive whole", lambda: all(s.client.outcome == "eof" for s in parked), PATIENCE_S)
        lies = [lie for stream in (*self.load.streams.values(), *self.load.short) for lie in stream.lies()]
        assert not lies, lies
        unexcused = [str(stream) for stream in self.load.short if not self._excused(stream)]
        assert not unexcused, unexcused
        self.load.close()
        for place in self.places:
            place.leave()

    def _excused(self, stream: Stream) -> bool:
        """A short stream ends well, or is told that it doesn't while its worker's kill was felt."""
        return stream.client.outcome == "eof" or (
            stream.client.outcome != "given up"
            and any(
                _worker(stream) in recovery.takes
                and recovery.start < stream.ended
                and stream.started < recovery.settled
                for recovery in self.recoveries
            )
        )

    # the kill

    def kill(self, *victims: Victim, again: int = 0) -> Recovery:
        """Kill -9 all of them at once, each successor `again` times as soon as it is there; wait until the places serve
        again, and until lost streams were told."""
        streams = self.streams()
        takes = frozenset[int]().union(*(victim.takes for victim in victims))
        doomed = [stream for stream in streams if _worker(stream) in takes]
        others = [stream for stream in streams if _worker(stream) not in takes]
        brief = len(self.load.short)
        before = {victim: self.processes(victim.service)[victim.name] for victim in victims}
        name = " + ".join(victim.name for victim in victims) + f", {again + 1} times" * bool(again)
        recovery = Recovery(name, takes, len(doomed), start := time.monotonic())
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        waiting = list(self.groups())

        def reborn() -> bool:
            return all(self.processes(victim.service).get(victim.name, pid) != pid for victim, pid in before.items())

        def serving() -> bool:
            sockets = (self.mesh.run_dir / "read" / f"{victim.service}.sock" for victim in victims)
            return recovery.process > 0 and all(health(path) == "SERVING" for path in sockets)

        def connected() -> bool:
            while waiting and self.connects(waiting[-1]):
                waiting.pop()
            return not waiting and (all(victim.service != "onramp" for victim in victims) or self.admits())

        for _ in range(again):
            wait_for(f"{name}: a successor", reborn, PATIENCE_S)
            before = {victim: self.processes(victim.service)[victim.name] for victim in victims}
            for pid in before.values():
                os.kill(pid, signal.SIGKILL)
        steps: dict[str, Callable[[], bool]] = {
            "process": reborn,
            "health": serving,
            "connection": connected,
            "streams_lost": lambda: all(map(_told, doomed)),
        }
        while steps and time.monotonic() - start < PATIENCE_S:
            for step, done in list(steps.items()):
                if done():
                    setattr(recovery, step, time.monotonic() - start)
                    del steps[step]
            # Somebody always looks at the table, also while nobody fills it.
            self.flows()
        untold = [str(stream) for stream in doomed if not _told(stream)]
        assert not steps, f"{name}: not within {PATIENCE_S} s: {set(steps)}; streams untold: {untold}"
        recovery.failed_briefly = sum(stream.client.outcome != "eof" for stream in self.load.short[brief:])
        self.recoveries.append(recovery)
        self._judge(name, doomed, others)
        for stream in doomed:
            self.load.forget(stream)
        wait_for("lost streams are closed", lambda: not set(doomed) & set(self.streams()), PATIENCE_S)
        return recovery

    def _judge(self, name: str, doomed: list[Stream], others: list[Stream]) -> None:
        lies = [lie for stream in (*doomed, *others, *self.load.short) for lie in stream.lies()]
        assert not lies, f"{name}: {lies}"
        broken = [str(stream) for stream in others if not stream.steady]
        assert not broken, f"{name} took what isn't its own: {broken}"
        marks = {stream: stream.progress for stream in others if stream.moves}
        wait_for(
            f"others go on without {name}",
            lambda: all(stream.progress > mark for stream, mark in marks.items()),
            PATIENCE_S,
        )


def _worker(stream: Stream) -> int:
    assert isinstance(stream.group, Group)
    return stream.group.place.worker


def _told(stream: Stream) -> bool:
    """Whether both ends know that it is lost; of one that had finished, the client may have got all."""
    assert stream.server is not None
    if stream.habit is Habit.FINISHED:
        return stream.client.outcome in LOST | {"eof"}
    return stream.client.outcome in LOST and stream.server.outcome in LOST


def _rank(victim: Victim, turn: tuple[str, ...]) -> int:
    for rank, name in enumerate(turn):
        if victim.name == name or (name.endswith("worker") and victim.name.startswith(name)):
            return rank
    return len(turn)


@contextmanager
def killed_mesh(directory: Path, workers: int) -> Iterator[KilledMesh]:
    """Servers, mesh, a place of each framing on each worker, and the load; all gone afterwards."""
    with contextlib.ExitStack() as stack:
        servers = ServerNamespace()
        stack.callback(servers.close)
        listeners = {family: stack.enter_context(servers.listener(family, backlog=4096)) for family in FAMILIES}
        lab = stack.enter_context(Lab())
        mesh = Mesh(lab, directory)
        mesh.start({"workers": workers})
        names = [f"device{number}" for number in range(2 if workers == 1 else 16 * workers)]
        mesh.apply(
            [
                resource("Tenant", "acme"),
                *(resource("Device", name, "acme") for name in names),
                resource("Route", "internet4", "acme", prefix="0.0.0.0/0", target={"internet": {}}),
                resource("Route", "internet6", "acme", prefix="::/0", target={"internet": {}}),
                resource("Policy", "access", "acme", rules=[rule("all", "true", "allow")]),
            ]
        )
        places = [
            _place(stack, mesh, lab, directory, device, framing, worker)
            for worker, devices in enumerate(_by_worker(mesh, workers))
            for device, framing in zip(devices, ("device", "raw"), strict=False)
        ]
        assert [place.framing for place in places] == ["device", "raw"] * workers
        load = Load(listeners.values())
        stack.callback(load.close)
        hosts = {socket.AF_INET: servers.address4, socket.AF_INET6: servers.address6}
        addresses = {family: (hosts[family], listener.getsockname()[1]) for family, listener in listeners.items()}
        yield KilledMesh(mesh, lab, workers, places, load, addresses)


def _by_worker(mesh: Mesh, workers: int) -> list[list[str]]:
    """Devices by the flow worker that the on-ramp gives them to."""
    found: list[list[str]] = [[] for _ in range(workers)]
    for device in mesh.ask_json("devices", "device", "list", "--tenant", "acme"):
        found[crc32(device["metadata"]["id"].encode()) % workers].append(device["metadata"]["name"])
    return found


def _place(
    stack: contextlib.ExitStack, mesh: Mesh, lab: Lab, directory: Path, device: str, framing: str, worker: int
) -> Place:
    log = directory / f"lower-{device}.log"
    with log.open("wb") as output:
        command = mesh.lower(device, ["sh", "-c", "echo ready; exec sleep infinity"], framing=framing)
        process = lab.start(command, log=output)
    wait_for(f"a namespace for {device}", lambda: b"ready" in log.read_bytes(), PATIENCE_S)
    place = Place(device, framing, worker, process)
    stack.callback(place.close)
    return place
