"""A whole mesh between real clients and real servers, for tests of what applications see.

`World`: a server's namespace behind a cable, a mesh with some number of workers, and clients. A `Client` is a running
`falkirk lower` whose command only waits; the test opens its own sockets in that namespace, so both ends of every
connection are plain sockets in the test's hands. A `Way` is one of the six ways through: framing x address family.

What is in the prefix of the server's namespace: host 1 the server, 2 the mesh's end of the cable, 3 and 4 free for
egress addresses, 5 nobody, 6 the server by a route with a connect timeout of a second, 7 behind a blackhole route;
port 25 is denied everywhere. Limit: needs root.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from tests.netns.conftest import ServerNamespace, in_namespace
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, wait_for
from tools.processes import descendants, module

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
T = TypeVar("T")
A = TypeVar("A")
DEADLINE_S = 60.0
"""For what takes no time on an idle machine."""
DENIED_PORT = 25
MAIL_RULE = "access/no-mail"
NO_ROUTE = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}
"""Destinations that no route covers."""
_TOTAL_RETRANS = 100
"""Offset of tcpi_total_retrans in struct tcp_info."""
FRAMINGS = ("vnet", "raw", "device")
"""As `Mesh.lower` names them."""
FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Attempt(NamedTuple):
    """What a connect came to."""

    error: int
    """0, or the errno."""
    retransmitted: int
    """SYNs beyond the first: 0 where the answer came at once."""


class Client:
    """A device's network stack: a namespace whose TCP travels through the mesh."""

    def __init__(self, mesh: Mesh, device: str, framing: str, tenant: str) -> None:
        command = mesh.lower(device, ["sh", "-c", "echo $$; exec sleep infinity"], tenant=tenant, framing=framing)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"falkirk lower ended with {self._process.wait()}")
        self.namespace = os.open(f"/proc/{int(line)}/ns/net", os.O_RDONLY)
        self.tenant, self.device, self.framing = tenant, device, framing

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function inside, in a thread; sockets that it opens stay inside."""
        return in_namespace(self.namespace, function, *args)

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket inside."""
        return self.call(socket.socket, family, kind, protocol)

    def close(self) -> None:
        """End the command, and with it the tunnel."""
        os.close(self.namespace)
        self._process.terminate()
        try:
            self._process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdout is not None
        self._process.stdout.close()


@dataclass(frozen=True)
class Way:
    """One client, one address family."""

    world: World
    client: Client
    family: socket.AddressFamily

    def host(self, number: int) -> str:
        """An address in the server's prefix."""
        server = self.world.server
        return server.host4(number) if self.family == socket.AF_INET else server.host6(number)

    @property
    def server(self) -> str:
        """The server's address."""
        return self.host(1)

    def listener(self, backlog: int = 128, port: int = 0) -> socket.socket:
        """A listener of the server; accept() gives up after DEADLINE_S."""
        listener = self.world.server.listener(self.family, port, backlog)
        listener.settimeout(DEADLINE_S)
        return listener

    def connect(self, port: int, host: str = "", source_port: int = 0) -> socket.socket:
        """A connected client socket with a generous timeout."""
        sock = self.client.socket(self.family)
        try:
            sock.settimeout(DEADLINE_S)
            if source_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("", source_port))
            sock.connect((host or self.server, port))
        except BaseException:
            sock.close()
            raise
        return sock

    @contextlib.contextmanager
    def pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A connection: the client's socket and the server's."""
        with self.listener() as listener, self.connect(listener.getsockname()[1]) as client:
            server, _ = listener.accept()
            with server:
                server.settimeout(DEADLINE_S)
                yield client, server

    def attempt(self, host: str, port: int) -> Attempt:
        """Try to connect, and let go."""
        with self.client.socket(self.family) as sock:
            return outcome(sock, begin(sock, host, port))


def begin(sock: socket.socket, host: str, port: int) -> int:
    """Begin to connect; the errno of it (EINPROGRESS as a rule)."""
    sock.setblocking(False)
    return sock.connect_ex((host, port))


def outcome(sock: socket.socket, begun: int, seconds: float = DEADLINE_S) -> Attempt:
    """What a connect that was begun came to."""
    error = begun
    if begun == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        if not poll.poll(seconds * 1000):
            raise AssertionError(f"neither connected nor refused within {seconds} s")
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return Attempt(error, retransmitted(sock))


def retransmitted(sock: socket.socket) -> int:
    """Segments that this socket has sent again."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    (count,) = struct.unpack_from("=I", info, _TOTAL_RETRANS)
    return int(count)


def receive(sock: socket.socket, size: int = -1) -> bytes:
    """`size` bytes, or everything up to the end."""
    data = bytearray()
    while size < 0 or len(data) < size:
        chunk = sock.recv(min(1 << 20, size - len(data)) if size >= 0 else 1 << 20)
        if not chunk:
            if size >= 0:
                raise AssertionError(f"ended after {len(data)} of {size} bytes")
            break
        data += chunk
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    sock.close()


def together(function: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """The function on all items at once; what it raised is raised here."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


class Process(NamedTuple):
    """What a process holds."""

    descriptors: int
    resident: int
    """KiB."""


class World:
    """A server, a mesh, and clients that are made when they are first asked for."""

    def __init__(self, lab: Lab, server: ServerNamespace, mesh: Mesh, workers: int) -> None:
        self.lab, self.server, self.mesh, self.workers = lab, server, mesh, workers
        self.pid = 0
        self._clients: dict[tuple[str, str, str], Client] = {}
        self._on_worker: dict[int, str] = {}

    # the mesh

    def start(self, settings: Mapping[str, Any]) -> None:
        """`falkirk up`, and the resources of tenant acme."""
        self.pid = self.mesh.start({"workers": self.workers, **settings})
        names = (f"device{number}" for number in range(1000))
        documents = self.tenant("acme")
        while len(self._on_worker) < self.workers:
            devices = [next(names) for _ in range(4 * self.workers)]
            documents += [resource("Device", name, "acme", user="alice") for name in devices]
            self.apply(documents)
            documents.clear()
            for device in self.mesh.ask_json("devices", "device", "list", "--tenant", "acme"):
                meta = device["metadata"]
                self._on_worker.setdefault(zlib.crc32(meta["id"].encode()) % self.workers, meta["name"])

    def apply(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """`falkirk apply`; returns once packets and tunnels are decided by what was applied."""
        self.mesh.apply(documents)
        (stored,) = self._revisions("registry")
        wait_for(
            "the replicas",
            lambda: min((*self._revisions("flow"), *self._revisions("onramp"))) >= stored,
            DEADLINE_S,
        )

    def _revisions(self, service: str) -> list[int]:
        stats = self.stats(service)
        held = [stats] if service == "registry" else stats.replicas
        return [of.revision.number for of in held]

    def tenant(self, name: str, **egress: str) -> list[dict[str, Any]]:
        """A tenant with a user, rules, and routes to the server's prefix (by egress_address4 and 6 where given)."""
        server = self.server
        internet = {"internet": {f"egressAddress{key[-1]}": address for key, address in egress.items()}}
        slow = {"internet": {"connectTimeoutMs": 1000}}
        rules = [
            rule("no-mail", f"net.port == {DENIED_PORT}", "deny"),
            rule("staff", '"staff" in identity.groups', "allow"),
        ]
        prefixes = [
            ("server4", str(server.prefix4), internet),
            ("server6", str(server.prefix6), internet),
            ("slow4", f"{server.host4(6)}/32", slow),
            ("slow6", f"{server.host6(6)}/128", slow),
            ("nowhere4", f"{server.host4(7)}/32", {"blackhole": {}}),
            ("nowhere6", f"{server.host6(7)}/128", {"blackhole": {}}),
        ]
        return [
            resource("Tenant", name),
            resource("User", "alice", name, groups=["staff"]),
            *(resource("Route", route, name, prefix=prefix, target=target) for route, prefix, target in prefixes),
            resource("Policy", "access", name, priority=10, rules=rules),
        ]

    # clients

    def device(self, worker: int) -> str:
        """Some device of acme whose tunnels that worker carries."""
        return self._on_worker[worker % self.workers]

    def client(self, framing: str = "vnet", *, worker: int = 0, device: str = "", tenant: str = "acme") -> Client:
        """A device's client; without a name, that of some device of acme on a worker."""
        key = (tenant, device or self.device(worker), framing)
        if key not in self._clients:
            self._clients[key] = Client(self.mesh, key[1], framing, tenant)
        return self._clients[key]

    def way(self, framing: str, family: socket.AddressFamily) -> Way:
        """One of the ways. With several workers each of them carries some."""
        worker = FRAMINGS.index(framing) + FAMILIES.index(family)
        return Way(self, self.client(framing, worker=worker), family)

    def ways(self) -> list[Way]:
        """All of them."""
        return [self.way(framing, family) for framing in FRAMINGS for family in FAMILIES]

    @property
    def a_device(self) -> str:
        """The name of some device of acme."""
        return self._on_worker[0]

    # questions

    def audit(self, event: str, address: str) -> list[dict[str, Any]]:
        """The newest 1,000 audit records of one kind about flows to an address (empty: to any), oldest first."""
        from falkirk.api.policy.v1 import policy_service_pb2 as pb
        from falkirk.api.policy.v1 import policy_service_pb2_grpc as pb_grpc
        from falkirk.runtime import client

        wanted = pb.AuditFilter(event=event, destination_address=address)
        with client.sync_channel(self.mesh.run_dir, "policy") as channel:
            request = pb.QueryRequest(filter=wanted, limit=1000)
            answers = pb_grpc.AuditServiceStub(channel).Query(request, timeout=DEADLINE_S)
            return [msgspec.json.decode(answer.record.json) for answer in answers]

    def recorded(self, event: str, port: int, address: str = "", device: str = "") -> dict[str, Any]:
        """The first audit record about a flow to that port, once it is stored; address and device where given."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [
                record
                for record in self.audit(event, address)
                if record["destination_port"] == port and device in ("", record["device"])
            ]
            return bool(found)

        wait_for(f"an audit record that a flow to port {port} {event}", look, DEADLINE_S)
        return found[0]

    def live(self, port: int, device: str) -> Any:
        """The live flow of a device to that port, once there is one."""
        from falkirk.api.flow.v1 import flow_service_pb2 as pb
        from falkirk.api.flow.v1 import flow_service_pb2_grpc as pb_grpc
        from falkirk.runtime import client

        found: list[Any] = []

        def look() -> bool:
            with client.sync_channel(self.mesh.run_dir, "flow") as channel:
                chosen = pb.FlowFilter(destination_port=port, device=device)
                answer = pb_grpc.FlowServiceStub(channel).List(pb.ListRequest(filter=chosen), timeout=DEADLINE_S)
            found[:] = answer.flows
            return bool(found)

        wait_for(f"a live flow to port {port}", look, DEADLINE_S)
        return found[0]

    def stats(self, service: str) -> Any:
        """A service's Stats, called by name: its request and stub follow from the service's."""
        from falkirk.runtime import client

        package = f"falkirk.api.{service}.v1.{service}_service"
        messages, stubs = importlib.import_module(f"{package}_pb2"), importlib.import_module(f"{package}_pb2_grpc")
        with client.sync_channel(self.mesh.run_dir, service) as channel:
            stub = getattr(stubs, f"{service.capitalize()}ServiceStub")(channel)
            return stub.Stats(messages.StatsRequest(), timeout=DEADLINE_S)

    def drops(self, reason: str) -> int:
        """Packets dropped for a reason, by all workers."""
        return sum(drop.value for worker in self.stats("flow").workers for drop in worker.drops if drop.name == reason)

    def active_slots(self) -> int:
        """Slots in use, of all workers; at most a second old."""
        return sum(worker.slots_active for worker in self.stats("flow").workers)

    def processes(self) -> dict[str, Process]:
        """What each process below `falkirk up` holds, by its process id and command."""
        found = {}
        for pid in [self.pid, *descendants(self.pid)]:
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
            found[f"{pid} {module(pid)}"] = Process(len(list(Path(f"/proc/{pid}/fd").iterdir())), resident)
        return found

    def hang_up(self) -> None:
        """End the clients that there are."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def close(self) -> None:
        """End the clients; the mesh and the server are whoever's who made them."""
        self.hang_up()


@contextlib.contextmanager
def open_world(workers: int, settings: Mapping[str, Any] | None = None) -> Iterator[World]:
    """A world with a mesh that runs; all gone afterwards."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fk-")))
        # Other users must get as far as the run directory, whose own modes are what counts.
        directory.chmod(0o755)
        server = ServerNamespace()
        stack.callback(server.close)
        for host in (server.host4(6), server.host6(6)):
            server.add_there(host)
        lab = stack.enter_context(Lab())
        world = World(lab, server, Mesh(lab, directory), workers)
        stack.callback(world.close)
        world.start(settings or {})
        yield world
