"""What a simulation says of a packet is what a worker does with it: each packet here goes both ways."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.decide.routes import RouteEntry, RouteSource
from falkirk.decide.rules import PolicySource, RuleSource
from falkirk.flow import quota
from falkirk.flow.coalesce import claimed
from falkirk.flow.keys import Signature
from falkirk.flow.passages import ForwardFlow
from falkirk.flow.settings import FlowSettings
from falkirk.flow.signatures import keys
from falkirk.flow.simulate import Existing, Leading, Simulation
from falkirk.wire.build import icmp_packet, too_big, unreachable
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.handover import OpenSocket, Prepare
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse
from falkirk.wire.probe import completed, probe
from falkirk.wire.protocol import TCP
from tests.flow_rig import ALLOW_WEB, DEVICE4, DEVICE6, NETWORK, SERVER4, SERVER6, TENANT, FlowRig, context, read
from tests.forward_rig import ROUTES
from tests.unit.flow.test_worker_lift import Client, established

FIN, SYN, RST, ACK = 1, 2, 4, 16
HOLE4 = bytes([198, 51, 100, 1])
NAS4 = bytes([100, 96, 0, 3])
OFF4 = bytes([100, 96, 0, 4])
ELSEWHERE = bytes([100, 96, 0, 99])


POLICIES = (
    PolicySource(TENANT, "first", 0, [RuleSource("lowered", "net.port == 4444", "allow", "l4")]),
    *(msgspec.structs.replace(policy, priority=1) for policy in ALLOW_WEB),
)


RESOLVER4 = bytes([100, 96, 0, 53])
RESOLVER = RouteSource(NETWORK, RouteEntry("", "resolver", "100.96.0.53/32", "resolver"))


class WorkerNode:
    """What the parent tells a simulation, asked of the worker itself."""

    def __init__(self, rig: FlowRig, settings: FlowSettings) -> None:
        self._rig = rig
        self.settings = settings

    @property
    def routes(self) -> object:
        return self._rig.worker.routes

    @property
    def rules(self) -> object:
        return self._rig.worker.rules

    def existing(self, whose: TunnelContext, said: Signature) -> Existing | None:
        for tunnel in self._rig.worker.tunnels.values():
            for key in keys(said):
                flow = tunnel.flows.get(key)
                if flow is not None and tunnel.context == whose:
                    mtu = flow.to.mtu if isinstance(flow, ForwardFlow) and flow.to is not None else 0
                    identity = self._rig.worker.lifecycle.identity(flow).hex()
                    return Existing(identity, flow.state.name.lower(), "", mtu=mtu)
        return None

    def load(self, whose: TunnelContext, *, lifted: bool) -> quota.Load:
        worker = self._rig.worker
        (tunnel,) = (tunnel for tunnel in worker.tunnels.values() if tunnel.context == whose)
        total = worker.tenants.total(tunnel.row)
        return quota.Load(worker.pair.ready, True, tunnel.device.flows, tunnel.device.held, total, worker.live.full)

    def free_slots(self, whose: TunnelContext) -> int:
        pool = self._rig.worker.lane(Framing.RAW).pool
        return pool.size - pool.active - pool.resting

    def leading(self, whose: TunnelContext, route: RouteEntry) -> Leading | None:
        assert route.device is not None
        found = self._rig.worker.forward.directory.find(whose.tenant_id, route.device.device_id)
        return Leading(f"tunnel {found.tunnel}", found.mtu) if found is not None else None


class Both:
    """One worker with a device's raw tunnel, and the simulation of the same."""

    def __init__(self, directory: Path, settings: FlowSettings | None = None) -> None:
        settings = settings or FlowSettings()
        self.rig = FlowRig(directory, settings, policies=POLICIES, routes=(*ROUTES, RESOLVER))
        self.node = WorkerNode(self.rig, settings)
        self.client = Client(self.rig, Framing.RAW, 4)
        self.nas = self.rig.tunnel(who=context(device="nas", addresses=[NAS4]), mtu=1000)
        self.whose = self.rig.worker.tunnels[1].context

    def simulated(self, data: bytes) -> tuple[str, str]:
        """The outcome, and the name under which it is counted where the packet is dropped."""
        simulation = Simulation(self.node, self.whose, data, 1500)  # type: ignore[arg-type]
        *passed, last = simulation.stages
        assert all(stage.passed for stage in passed)
        return simulation.outcome, last.reference if simulation.outcome == "drop" else ""

    def real(self, data: bytes) -> tuple[str, str]:
        """The same, seen from outside."""
        before, drops = self._counts(), self.rig.drops()
        waiting = self.rig.worker.fragments.reassembly.waiting
        self.client.sock.send(data)
        self.rig.step()
        forwarded, answered, started = (now - was for now, was in zip(self._counts(), before, strict=True))
        dropped = {reason for reason, count in self.rig.drops().items() if count != drops.get(reason)}
        answers = [parse(one, 0, len(one)) for one in read(self.client.sock)]
        asked = [message for message in self.rig.asked() if isinstance(message, Prepare | OpenSocket)]
        # Not the probes by which a connection that the test has cut is ended.
        nas = [one for one in read(self.nas) if one[9] != TCP or one[33] != ACK]
        read(self.client.tun)
        if dropped:
            (reason,) = dropped
            return "drop", reason
        if answered:
            (answer,) = answers
            return _answer(answer.icmp_type, answer.icmp_code, answer.version), ""
        if started:
            assert bool(asked) is not bool(nas)
            return "forward" if nas else "lift", ""
        if self.rig.worker.fragments.reassembly.waiting > waiting:
            return "wait", ""
        assert forwarded or nas
        return "flow", ""

    def end_all(self) -> None:
        """No flow is left."""
        for tunnel in self.rig.worker.tunnels.values():
            for flow in list(tunnel.flows.values()):
                flow.owner.cut(flow, "ended by the test")
        self.rig.step()
        self.rig.asked()
        # A forwarded connection's ends are told.
        for sock in (self.nas, self.client.sock):
            read(sock)

    def _counts(self) -> tuple[int, int, int]:
        return self.rig.count("forwarded"), self.rig.count("answered"), self.rig.count("started")


def _answer(kind: int, code: int, version: int) -> str:
    if kind < 0:
        return "answer_rst"
    if version == 4:
        return {(11, 0): "answer_time_exceeded", (3, 13): "answer_prohibited", (3, 4): "answer_too_big"}.get(
            (kind, code), "answer_unreachable"
        )
    return {(3, 0): "answer_time_exceeded", (1, 1): "answer_prohibited"}.get((kind, code), "answer_unreachable")


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    made = Both(tmp_path)
    yield made
    made.rig.close()
    made.nas.close()
    made.client.sock.close()


def edited(data: bytes, at: int, value: int) -> bytes:
    changed = bytearray(data)
    changed[at] = value
    return bytes(changed)


def fragment(data: bytes, offset: int, *, more: bool) -> bytes:
    changed = bytearray(data)
    changed[6:8] = (offset >> 3 | more << 13).to_bytes(2, "big")
    return completed(bytes(changed))


TCP4 = (DEVICE4, SERVER4, 40000, 80)
QUOTED = probe(6, SERVER4, DEVICE4, 80, 40000, flags=ACK)
CASES = {
    "question to the resolver": (probe(17, DEVICE4, RESOLVER4, 40000, 53), "lift", ""),
    "syn to the resolver": (probe(6, DEVICE4, RESOLVER4, 40000, 53), "lift", ""),
    "datagram to the resolver": (probe(17, DEVICE4, RESOLVER4, 40000, 80), "answer_unreachable", ""),
    "syn to another port of the resolver": (probe(6, DEVICE4, RESOLVER4, 40000, 80), "answer_rst", ""),
    "echo to the resolver": (probe(1, DEVICE4, RESOLVER4, 0, 0), "answer_unreachable", ""),
    "syn": (probe(6, *TCP4), "lift", ""),
    "syn to a port that a rule denies": (probe(6, DEVICE4, SERVER4, 40000, 23), "answer_rst", ""),
    "syn to a port without a rule": (probe(6, DEVICE4, SERVER4, 40000, 25), "answer_rst", ""),
    "syn over IPv6": (probe(6, DEVICE6, SERVER6, 40000, 80), "lift", ""),
    "syn into a black hole": (probe(6, DEVICE4, HOLE4, 40000, 80), "answer_unreachable", ""),
    "syn to loopback": (probe(6, DEVICE4, bytes([127, 0, 0, 1]), 1, 80), "answer_unreachable", ""),
    "large syn": (probe(6, *TCP4, length=1501), "drop", "syn_too_large"),
    "syn with data": (probe(6, *TCP4, length=100), "lift", ""),
    "syn and fin": (probe(6, *TCP4, flags=SYN | FIN), "drop", "bad_tcp_flags"),
    "ack of nothing": (probe(6, *TCP4, flags=ACK), "answer_rst", ""),
    "rst of nothing": (probe(6, *TCP4, flags=RST), "drop", "reset_of_nothing"),
    "wrong checksum": (edited(probe(6, *TCP4), 37, 1), "drop", "bad_l4_checksum"),
    "wrong IP checksum": (edited(probe(6, *TCP4), 10, 1), "drop", "bad_ip_checksum"),
    "cut": (probe(6, *TCP4, length=100)[:-1], "drop", "bad_total_length"),
    "nothing": (b"\x45", "drop", "too_short"),
    "version 5": (b"\x55" + bytes(39), "drop", "bad_version"),
    "spoofed": (probe(6, ELSEWHERE, SERVER4, 1, 80), "drop", "spoofed_source"),
    "last hop": (probe(6, *TCP4, ttl=1), "answer_time_exceeded", ""),
    "last hop of an ICMP error": (
        completed(edited(unreachable(QUOTED, parse(QUOTED, 0, 40), Unreachable.PORT, DEVICE4) or b"", 8, 1)),
        "drop",
        "unanswerable",
    ),
    "udp": (probe(17, DEVICE4, SERVER4, 40000, 53), "lift", ""),
    "udp denied": (probe(17, DEVICE4, SERVER4, 40000, 23), "answer_prohibited", ""),
    "udp over IPv6": (probe(17, DEVICE6, SERVER6, 40000, 53, length=500), "lift", ""),
    "udp with a wrong checksum": (edited(probe(17, DEVICE4, SERVER4, 1, 53), 26, 9), "drop", "bad_l4_checksum"),
    "ping": (probe(1, DEVICE4, SERVER4, 77), "lift", ""),
    "ping6": (probe(58, DEVICE6, SERVER6, 77), "lift", ""),
    "echo reply of nothing": (completed(edited(probe(1, DEVICE4, SERVER4, 77), 20, 0)), "drop", "icmp_not_carried"),
    "timestamp": (completed(edited(probe(1, DEVICE4, SERVER4, 77), 20, 13)), "drop", "icmp_not_carried"),
    "ICMP error about nothing": (
        unreachable(QUOTED, parse(QUOTED, 0, 40), Unreachable.PORT, DEVICE4) or b"",
        "drop",
        "icmp_error_unmatched",
    ),
    "sctp to the internet": (probe(132, DEVICE4, SERVER4), "answer_unreachable", ""),
    "sctp to a device": (probe(132, DEVICE4, NAS4, length=50), "forward", ""),
    "udp to a device": (probe(17, DEVICE4, NAS4, 1, 53), "forward", ""),
    "syn to a device": (probe(6, DEVICE4, NAS4, 1, 80), "forward", ""),
    "syn to a device, lifted and lowered": (probe(6, DEVICE4, NAS4, 1, 4444), "lift", ""),
    "the same to one that is away": (probe(6, DEVICE4, OFF4, 1, 4444), "answer_unreachable", ""),
    "udp that a rule wants lifted and lowered": (probe(17, DEVICE4, NAS4, 1, 4444), "forward", ""),
    "a large syn, lifted and lowered": (probe(6, DEVICE4, NAS4, 1, 4444, length=1600), "drop", "syn_too_large"),
    "denied to a device": (probe(17, DEVICE4, NAS4, 1, 23), "answer_prohibited", ""),
    "to a device that is away": (probe(17, DEVICE4, OFF4, 1, 53), "answer_unreachable", ""),
    "to itself": (probe(17, DEVICE4, DEVICE4, 1, 53), "answer_unreachable", ""),
    "too big for a device": (probe(17, DEVICE4, NAS4, 1, 53, length=1200), "answer_too_big", ""),
    "in fragments to a device": (probe(17, DEVICE4, NAS4, 1, 53, length=1200, dont_fragment=False), "forward", ""),
    "first fragment": (fragment(probe(17, DEVICE4, SERVER4, 1, 53, length=108), 0, more=True), "wait", ""),
    "later fragment": (fragment(probe(17, DEVICE4, SERVER4, 1, 53, length=108), 80, more=False), "wait", ""),
    "tiny fragment": (fragment(probe(6, *TCP4, length=60), 8, more=False), "drop", "fragment_tiny"),
    "fragment of an odd length": (
        fragment(probe(17, DEVICE4, SERVER4, 1, 53, length=101), 0, more=True),
        "drop",
        "fragment_length",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_is_what_happens(both: Both, name: str) -> None:
    data, outcome, reason = CASES[name]
    assert both.simulated(data) == (outcome, reason)
    assert both.real(data) == (outcome, reason)


def test_flows_that_there_are(both: Both) -> None:
    """Held, then established; and what an ICMP error says of it."""
    syn = probe(6, *TCP4)
    assert both.simulated(syn) == both.real(syn) == ("lift", "")
    assert both.simulated(syn) == both.real(syn) == ("drop", "syn_held")
    first = both.client
    other = Client(both.rig, Framing.RAW, 4, port=40001)
    both.whose = both.rig.worker.tunnels[3].context
    both.client = other
    established(other)
    for data in (
        probe(6, DEVICE4, SERVER4, 40001, 80, flags=ACK),
        probe(6, DEVICE4, SERVER4, 40001, 80, flags=ACK, length=900),
    ):
        assert both.simulated(data) == both.real(data) == ("flow", "")
    quoted = probe(6, SERVER4, DEVICE4, 80, 40001, flags=ACK, length=1400)
    for error in (
        too_big(quoted, parse(quoted, 0, 1400), 1280, DEVICE4),
        unreachable(quoted, parse(quoted, 0, 1400), Unreachable.HOST, DEVICE4),
    ):
        assert error is not None
        assert both.simulated(error) == both.real(error) == ("flow", "")
    first.sock.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (FlowSettings(device_flows=1), "device_limit"),
        (FlowSettings(device_held=1), "device_held_limit"),
        (FlowSettings(tenant_flows=1), "tenant_limit"),
        (FlowSettings(slots=1), "slots_exhausted"),
        (FlowSettings(max_flows=1), "table_full"),
        (FlowSettings(fragment_bytes=0), ""),
    ],
)
def test_limits(tmp_path: Path, settings: FlowSettings, reason: str) -> None:
    both = Both(tmp_path, settings)
    first = probe(6, *TCP4)
    assert both.simulated(first) == both.real(first) == ("lift", "")
    if reason:
        second = probe(6, DEVICE4, SERVER4, 40001, 80)
        assert both.simulated(second) == both.real(second) == ("drop", reason)
    else:
        piece = CASES["first fragment"][0]
        assert both.simulated(piece) == both.real(piece) == ("drop", "fragment")
    both.rig.close()
    both.nas.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_mutants(both: Both, seed: int) -> None:
    """Bytes are changed at random, with their checksums made right half of the time."""
    chance = random.Random(seed)
    seeds = [data for data, _, _ in CASES.values()]
    for _ in range(250):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        mutant = completed(bytes(data)) if chance.random() < 0.5 else bytes(data)
        if chance.random() < 0.1:
            mutant = mutant[: chance.randrange(1, len(mutant) + 1)]
        if claimed(bytearray(mutant), 0, len(mutant)) < len(mutant):
            continue  # Several packets, on a raw tunnel.
        said, seen = both.simulated(mutant), both.real(mutant)
        both.end_all()
        if said[0] == "wait" and seen[1].startswith("fragment"):
            continue  # It doesn't fit to one that waits: a fragment is judged alone.
        assert said == seen, (seed, mutant.hex())


def test_an_error_of_ours_is_told_apart() -> None:
    """What `_answer` reads is what answers are."""
    assert _answer(-1, -1, 4) == "answer_rst"
    data = icmp_packet(bytearray(8), DEVICE4, SERVER4)
    assert parse(data, 0, len(data)).icmp_type == 0
