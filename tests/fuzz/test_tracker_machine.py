"""The tracker under events in any order: whatever comes, its books agree with each other, and close at the end.

Events are what a client, the private namespace's kernel, the upgrader, the on-ramp, an operator and the clock can do.
After each the worker's tables are compared: tunnels, slots, devices, tenants, the live table, the packet counts.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from falkirk.flow import control
from falkirk.flow.live import LiveReader
from falkirk.flow.settings import FlowSettings
from falkirk.flow.table import State, TcpLift
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.build import segment
from falkirk.wire.context import Framing
from falkirk.wire.handover import Closed, Connected, DialFailed, Message, Prepare, TunnelClosed, encode
from tests.flow_rig import DEVICE4, DEVICE6, PORT, SERVER4, SERVER6, FlowRig, context, read

SETTINGS = FlowSettings(
    slots=24, max_flows=20, device_flows=10, device_held=6, tenant_flows=16, established_idle_s=30, transitory_idle_s=10
)
FAMILIES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
FLAGS = st.sampled_from([2, 2, 2, 16, 16, 17, 17, 4, 20, 18, 3, 24])
NUMBERS = st.sampled_from([1000, 1001, 1002, 9001, 9002, 0, 0xFFFFFFFF])
REASONS = st.sampled_from(["finished", "client_reset", "upstream_reset", "idle", "aborted", "never_opened", "x", ""])
PORTS = st.integers(40000, 40004)


class TrackerMachine(RuleBasedStateMachine):
    """The rig, and everybody around it."""

    tunnels = Bundle("tunnels")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="falkirk-tracker-"))
        self.rig = FlowRig(self.directory, SETTINGS)
        self.ahead = 0
        self.rig.worker.clock = lambda: time.monotonic_ns() + self.ahead
        self.slots = [0]
        self.socks: dict[int, tuple[Any, Framing]] = {}

    # the world's moves

    @rule(target=tunnels, framing=st.sampled_from(list(Framing)), device=st.sampled_from(["laptop", "phone"]))
    def open(self, framing: Framing, device: str) -> int:
        number = self.rig.next_tunnel
        self.socks[number] = (self.rig.tunnel(framing, context(device=device)), framing)
        return number

    @rule(number=tunnels, by_onramp=st.booleans())
    def close(self, number: int, by_onramp: bool) -> None:
        if number not in self.socks:
            return
        sock, _ = self.socks.pop(number)
        if by_onramp:
            self.rig.say_onramp(TunnelClosed(number, "removed"))
        sock.close()
        self.rig.step()

    @rule(
        number=tunnels, family=st.sampled_from([4, 6]), port=PORTS, flags=FLAGS, sequence=NUMBERS, acknowledged=NUMBERS
    )
    def client(self, number: int, family: int, port: int, flags: int, sequence: int, acknowledged: int) -> None:
        if number not in self.socks:
            return
        sock, framing = self.socks[number]
        packet = segment(*FAMILIES[family], port, 80, sequence, acknowledged, flags)
        sock.send(packet if framing is Framing.RAW else vnet.ZERO + packet)
        self._listen()

    @rule(
        which=st.integers(0, 50),
        family=st.sampled_from([4, 6]),
        port=PORTS,
        flags=FLAGS,
        sequence=NUMBERS,
        acknowledged=NUMBERS,
    )
    def kernel(self, which: int, family: int, port: int, flags: int, sequence: int, acknowledged: int) -> None:
        slot = self.slots[which % len(self.slots)]
        plan = self.rig.plan
        address = plan.address4 if family == 4 else plan.address6
        framing = Framing.RAW if slot >> plan.index_bits else Framing.VNET
        packet = segment(address(0, plan.slot(framing, 1)), address(0, slot), PORT, port, sequence, acknowledged, flags)
        self.rig.tun[framing].send(vnet.ZERO + packet)
        self._listen()

    @rule(which=st.integers(0, 50))
    def connected(self, which: int) -> None:
        self._upgrader(Connected(self.slots[which % len(self.slots)], 1))

    @rule(which=st.integers(0, 50), error=st.sampled_from([errno.ECONNREFUSED, errno.EHOSTUNREACH, 0]))
    def failed(self, which: int, error: int) -> None:
        self._upgrader(DialFailed(self.slots[which % len(self.slots)], error, 1))

    @rule(which=st.integers(0, 50), reason=REASONS)
    def closed(self, which: int, reason: str) -> None:
        self._upgrader(Closed(self.slots[which % len(self.slots)], reason, 1, 1))

    @rule(seconds=st.sampled_from([1, 2, 6, 11, 31, 61, 601]))
    def wait(self, seconds: int) -> None:
        self.ahead += seconds * 1_000_000_000
        self._listen()

    @rule(which=st.integers(0, 50))
    def terminate(self, which: int) -> None:
        flow = self.rig.worker.flow_of(self.slots[which % len(self.slots)])
        if flow is not None:
            seqpacket.send(
                self.rig._parent,
                encode(
                    [control.Terminate(flow.tunnel.id, flow.key, self.rig.worker.lifecycle.identity(flow), "operator")]
                ),
            )
            self._listen()

    @rule(again=st.booleans())
    def lose_the_upgrader(self, again: bool) -> None:
        if again:
            self.rig.hand_over()
            self._listen()
            return
        assert self.rig.upgrader is not None
        self.rig.upgrader.close()
        self.rig.step()
        self.ahead += 1_000_000_000
        self.rig.step()
        assert self.rig.worker.flow_count == 0
        self.rig.pair()
        self._listen()

    def _upgrader(self, message: Message) -> None:
        self.rig.say_upgrader(message)
        self._listen()

    def _listen(self) -> None:
        for message in self.rig.asked():
            if isinstance(message, Prepare):
                self.slots = [*self.slots[-30:], message.slot]
        for sock in (*self.rig.tun.values(), *(sock for sock, _ in self.socks.values())):
            read(sock)

    # what always holds

    def _flows(self) -> list[TcpLift]:
        return [flow for tunnel in self.rig.worker.tunnels.values() for flow in tunnel.lifts.values()]

    @invariant()
    def books_agree(self) -> None:
        worker, flows = self.rig.worker, self._flows()
        assert worker.flow_count == len(flows)
        for framing in Framing:
            lane = worker.lane(framing)
            own = {flow.slot - lane.first_slot: flow for flow in flows if flow.tunnel.framing is framing}
            assert {index: flow for index, flow in enumerate(lane.flows) if flow is not None} == own
            assert lane.pool.active == len(own)
            assert lane.pool.active + lane.pool.resting <= lane.pool.size
        for device in {id(tunnel.device): tunnel.device for tunnel in worker.tunnels.values()}.values():
            own_flows = [flow for flow in flows if flow.tunnel.device is device]
            assert device.flows == len(own_flows)
            assert device.held == sum(flow.held is not None for flow in own_flows)
        for flow in flows:
            assert (flow.held is not None) == (flow.state is State.HELD)
            assert flow.bucket > 0
        rows = {tunnel.row for tunnel in worker.tunnels.values()}
        assert sum(worker.tenants.total(row) for row in rows) == len(flows)
        assert len(worker.wheel) == len(flows)

    @invariant()
    def the_live_table_shows_them(self) -> None:
        reader = LiveReader(self.rig.data_dir / "flow" / "live" / "worker-0")
        identity = self.rig.worker.lifecycle.identity
        shown = {(record.flow_id, record.slot, record.state) for record in reader}
        reader.close()
        assert shown == {(identity(flow), flow.slot, int(flow.state)) for flow in self._flows()}

    @invariant()
    def every_packet_is_accounted_for(self) -> None:
        rig = self.rig
        held = sum(flow.held is not None for flow in self._flows())
        accounted = rig.count("forwarded") + rig.count("answered") + sum(rig.drops().values())
        assert rig.count("received") == accounted + held

    def teardown(self) -> None:
        """Everybody leaves: the books close."""
        try:
            for sock, _ in self.socks.values():
                sock.close()
            self.rig.step()
            worker = self.rig.worker
            assert (worker.tunnels, worker.flow_count, worker.tunnels.devices) == ({}, 0, {})
            self.books_agree()
            self.the_live_table_shows_them()
            self.every_packet_is_accounted_for()
            events: dict[str, list[str]] = {}
            for record in self.rig.records():
                events.setdefault(record.flow_id, []).append(record.event)
            assert {tuple(order) for order in events.values()} <= {("started", "ended"), ("denied",)}
            self.ahead += 601 * 1_000_000_000
            self.rig.step()
            for framing in Framing:
                pool = worker.lane(framing).pool
                slots = [pool.claim(worker.second) for _ in range(pool.size)]
                assert len({slot for slot in slots if slot is not None}) == pool.size
        finally:
            self.rig.close()
            shutil.rmtree(self.directory)


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
