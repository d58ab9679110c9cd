"""A flow worker in the test's own process, stepped turn by turn, between a fake on-ramp and a fake upgrader.

Everything is real but the neighbours: SEQPACKET sockets, descriptors passed with SCM_RIGHTS, the spool, the live table,
compiled rules and routes. The TUN devices are SEQPACKET pairs, which behave like them: a read is a packet.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from falkirk.decide import routes as route_table
from falkirk.decide import rules as rule_table
from falkirk.flow import control, counters, limits
from falkirk.flow.settings import FlowSettings
from falkirk.flow.worker import Worker
from falkirk.linux import seqpacket
from falkirk.runtime import blob
from falkirk.runtime.counters import Counters
from falkirk.runtime.spool import AuditRecord, segments
from falkirk.wire import handover
from falkirk.wire.context import Framing, Transport, TunnelContext
from falkirk.wire.slots import SlotPlan

TENANT = "00000000-0000-4000-8000-00000000000a"
OTHER_TENANT = "00000000-0000-4000-8000-00000000000b"
NETWORK = "00000000-0000-4000-8000-000000000001"
DEVICE4 = bytes([100, 96, 0, 2])
DEVICE6 = bytes.fromhex("fd000000000000010000000000000002")
SERVER4 = bytes([203, 0, 113, 5])
SERVER6 = bytes.fromhex("20010db8000000000000000000000005")
PORT = 1024
"""Where the fake upgrader says that its listeners wait."""

ALLOW_WEB = (
    rule_table.PolicySource(
        TENANT,
        "main",
        0,
        [
            rule_table.RuleSource("no-telnet", "net.port == 23", "deny"),
            rule_table.RuleSource("all", "net.port != 25", "allow"),
        ],
    ),
)


def context(
    *, tenant: str = TENANT, device: str = "laptop", addresses: Sequence[bytes] = (DEVICE4, DEVICE6), max_flows: int = 0
) -> TunnelContext:
    """A device's context."""
    return TunnelContext(
        tenant_id=tenant,
        tenant="acme" if tenant == TENANT else "other",
        device_id=f"{tenant}/{device}",
        device=device,
        virtual_network_id=NETWORK,
        virtual_network="default",
        addresses=tuple(addresses),
        device_max_flows=max_flows,
    )


def route(
    number: str, name: str, prefix: str, target: route_table.Target = "internet", egress4: bytes = b""
) -> route_table.RouteEntry:
    """A route of the device's network; `number` ends its id."""
    return route_table.RouteEntry(f"00000000-0000-4000-8000-0000000000{number}", name, prefix, target, egress4)


class FlowRig:
    """The worker and its surroundings; `close` gives everything back."""

    def __init__(
        self,
        directory: Path,
        settings: FlowSettings | None = None,
        *,
        policies: Sequence[rule_table.PolicySource] = ALLOW_WEB,
        routes: Sequence[route_table.RouteSource] = (),
        number: int = 0,
        workers: int = 1,
        ready: bool = True,
    ) -> None:
        """`routes` come beside those to the internet; `number` is the worker's among `workers`."""
        self.run_dir, self.data_dir = directory / "run", directory / "data"
        (self.run_dir / "mesh").mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.policies, self.routes = policies, routes
        self.number, self.workers = number, workers
        self.plan = SlotPlan(workers)
        self.counters = Counters.create(counters.NAMES)
        self._tenants = os.memfd_create("tenants")
        os.ftruncate(self._tenants, limits.SIZE)
        self._settings = settings or FlowSettings()
        self._upgrader_listener = seqpacket.listen(self.run_dir / "mesh" / f"upgrader.worker.{number}.sock")
        self.next_tunnel = 1
        self._generation = time.time_ns()
        self.start()
        if ready:
            self.pair()
            self.load()

    def start(self) -> None:
        """A worker in place of the last one."""
        self._parent, inherited = seqpacket.pair()
        start = control.Start(
            worker=self.number,
            workers=self.workers,
            generation=1,
            node="test",
            sample_ratio=0.0,
            run_dir=str(self.run_dir),
            data_dir=str(self.data_dir),
            mesh_uids=(),
            settings=self._settings,
        )
        path = self.run_dir / "mesh" / f"flow.worker.{self.number}.sock"
        path.unlink(missing_ok=True)
        self.worker = Worker(inherited, start, self.counters, os.dup(self._tenants))
        self.upgrader: socket.socket | None = None
        self._inbox: list[handover.Message] = []
        self.onramp = self.another_onramp()

    def another_onramp(self, worker: int = 0) -> socket.socket:
        """A connection as an on-ramp's worker makes it."""
        link = seqpacket.connect(self.run_dir / "mesh" / f"flow.worker.{self.number}.sock")
        self._generation += 1
        seqpacket.send(link, handover.encode([handover.Hello("onramp", worker, self._generation)]))
        self.step()
        return link

    def pair(self) -> None:
        """Be the upgrader: accept, say hello, hand devices over."""
        self.until(lambda: self._accept_upgrader())
        self._generation += 1
        self.hand_over([handover.Hello("upgrader", self.number, self._generation)])

    def hand_over(self, before: Sequence[handover.Message] = ()) -> None:
        """Hand (new) devices over, behind other messages."""
        self.tun: dict[Framing, socket.socket] = {}
        self.lower_tun: dict[Framing, socket.socket] = {}
        fds = []
        for namespace in (self.tun, self.lower_tun):
            for framing in (Framing.VNET, Framing.RAW):
                ours, theirs = seqpacket.pair()
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                namespace[framing] = ours
                fds.append(theirs)
        assert self.upgrader is not None
        order = [end.fileno() for end in fds]
        seqpacket.send(self.upgrader, handover.encode([*before, handover.Devices(self.workers, PORT, 1500)]), order)
        for end in fds:
            end.close()
        self.step()

    def _accept_upgrader(self) -> bool:
        try:
            self.upgrader = self._upgrader_listener.accept()[0]
        except BlockingIOError:
            return False
        self.upgrader.setblocking(False)
        return True

    def load(self) -> None:
        """Give it routes (everything to the internet) and rules."""
        self.change_routes(
            route("f4", "default4", "0.0.0.0/0"),
            route("f6", "default6", "::/0"),
            route("bb", "hole", "198.51.100.0/24", "blackhole"),
            *self.routes,
        )
        self.change_rules(self.policies)
        self.until(lambda: self.worker.pair.ready)

    def change_rules(self, policies: Sequence[rule_table.PolicySource]) -> None:
        """Have these rules decide, and flows reviewed by them."""
        self._snapshot("rules", rule_table.compile(policies))

    def change_routes(self, *routes: route_table.RouteEntry | route_table.RouteSource) -> None:
        """Have these routes decide, and flows reviewed by them. An entry alone is one of the device's network."""
        sources = (
            one if isinstance(one, route_table.RouteSource) else route_table.RouteSource(NETWORK, one) for one in routes
        )
        self._snapshot("routes", route_table.compile(sources))

    def _snapshot(self, name: str, data: bytes) -> None:
        path = self.directory / f"{name}.{self.number}.bin"
        blob.save(path, blob.Blob("epoch", 1, data))
        self.say_parent(control.Load(name, str(path), "epoch", 1))
        self.until(lambda: not self.worker.snapshots.loading and not self.worker.review.pending)

    def say_parent(self, message: handover.Message, fds: Sequence[int] = ()) -> None:
        """Speak as the parent."""
        seqpacket.send(self._parent, handover.encode([message]), fds)
        self.step()

    def said_to_parent(self) -> list[handover.Message]:
        """What the worker said to its parent since the last call."""
        self.step()
        said: list[handover.Message] = []
        while (received := seqpacket.receive(self._parent, handover.MAX_DATAGRAM)) is not None and received[0]:
            said.extend(control.TO_PARENT.decode(received[0]))
        return said

    def say_onramp(self, message: handover.Message, fds: Sequence[int] = ()) -> None:
        """Speak as the on-ramp."""
        seqpacket.send(self.onramp, handover.encode([message]), fds)
        self.step()

    def say_upgrader(self, *messages: handover.Message) -> None:
        """Speak as the upgrader."""
        assert self.upgrader is not None
        seqpacket.send(self.upgrader, handover.encode(messages))
        self.step()

    def give_socket(
        self, wish: handover.OpenSocket, sock: socket.socket, *, local: int = -1, raw: bool = False
    ) -> None:
        """Answer a wish with a socket, which is the worker's from then on."""
        assert self.upgrader is not None
        opened = handover.SocketOpened(wish.token, sock.getsockname()[1] if local < 0 else local, raw)
        seqpacket.send(self.upgrader, handover.encode([opened]), [sock.fileno()])
        sock.close()
        self.step()

    def tunnel(
        self, framing: Framing = Framing.RAW, who: TunnelContext | None = None, mtu: int = 1500
    ) -> socket.socket:
        """A new tunnel; returns the producer's end."""
        ours, theirs = seqpacket.pair()
        number, self.next_tunnel = self.next_tunnel, self.next_tunnel + 1
        self.say_onramp(handover.Adopt(number, who or context(), framing, mtu), [theirs.fileno()])
        theirs.close()
        return ours

    def trunk(self) -> socket.socket:
        """A new trunk of the on-ramp's; returns its end."""
        ours, theirs = seqpacket.pair()
        self.say_onramp(handover.Trunk(), [theirs.fileno()])
        theirs.close()
        return ours

    def by_trunk(self, who: TunnelContext | None = None) -> int:
        """A new tunnel that comes by the trunk: its number."""
        number, self.next_tunnel = self.next_tunnel, self.next_tunnel + 1
        adopt = handover.Adopt(number, who or context(), Framing.RAW, 1500, transport=Transport.TRUNK, descriptors=0)
        self.say_onramp(adopt)
        return number

    def step(self, turns: int = 3) -> None:
        """Let the worker do what is ready."""
        for _ in range(turns):
            self.worker.turn(0)

    def until(self, condition: object, seconds: float = 5.0) -> None:
        """Step until a condition holds."""
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition didn't come true"
            self.worker.turn(0.01)

    def asked(self) -> list[handover.Message]:
        """What the worker said to its upgrader since the last call, without the greeting."""
        assert self.upgrader is not None
        self.step()
        said: list[handover.Message] = []
        while (received := seqpacket.receive(self.upgrader, handover.MAX_DATAGRAM)) is not None and received[0]:
            said.extend(handover.FLOW_TO_UPGRADER.decode(received[0]))
        return [message for message in said if not isinstance(message, handover.Hello | handover.AbortAll)]

    def told(self, onramp: socket.socket | None = None) -> list[handover.Message]:
        """What the worker said to its on-ramp (or another one) since the last call."""
        self.step()
        said: list[handover.Message] = []
        link = onramp or self.onramp
        while (received := seqpacket.receive(link, handover.MAX_DATAGRAM)) is not None and received[0]:
            for fd in received[1]:
                os.close(fd)
            said.extend(handover.FLOW_TO_ONRAMP.decode(received[0]))
        return said

    def records(self) -> list[AuditRecord]:
        """The whole spool."""
        self.step()
        decode = msgspec.json.Decoder(AuditRecord).decode
        directory = self.data_dir / "flow" / "spool" / f"worker-{self.number}"
        return [decode(line) for path in segments(directory) for line in path.read_bytes().splitlines()]

    def drops(self) -> dict[str, int]:
        """Drop counts that aren't zero."""
        return {reason: self.counters.view[at] for reason, at in counters.DROPS.items() if self.counters.view[at]}

    def count(self, name: str) -> int:
        """One counter."""
        return self.counters.read(name)

    def balanced(self) -> bool:
        """received = forwarded + answered + dropped (+ held, which is the caller's to know)."""
        total = self.count("forwarded") + self.count("answered") + sum(self.drops().values())
        return self.count("received") == total

    def kill(self) -> None:
        """The worker dies: its descriptors close, nothing is tidied."""
        self.worker.die()
        self.upgrader = None

    def close(self) -> None:
        """Give everything back."""
        self.worker.die()
        for sock in (
            self._parent,
            self.onramp,
            self.upgrader,
            self._upgrader_listener,
            *getattr(self, "tun", {}).values(),
            *getattr(self, "lower_tun", {}).values(),
        ):
            if sock is not None:
                sock.close()
        os.close(self._tenants)
        os.close(self.counters.fd)


def read(sock: socket.socket) -> list[bytes]:
    """All datagrams that wait."""
    packets = []
    while (received := seqpacket.receive(sock, 1 << 17)) is not None and received[0]:
        packets.append(received[0])
    return packets
