"""The on-ramp's worker as a process: admission, hand-over to flow workers, reviews, and what survives whose death."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from falkirk.onramp.control import Changed, Close, Opened, State, Traced
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, TenantRow, UserRow
from falkirk.wire import handover
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.handover import AdoptRefused, Held, Recontext, TunnelClosed
from tests.process.onramp_rig import CONTEXT, ROWS, FlowFake, Rig, datagram, eventually, rig

LAPTOP = next(row for row in ROWS if isinstance(row, DeviceRow) and row.id == "d-laptop")
ANN = next(row for row in ROWS if isinstance(row, UserRow))

Parts = tuple[Rig, list[FlowFake]]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with rig(tmp_path) as made:
        yield made


def test_a_context_is_admitted_handed_over_and_answered(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer = onramp.producer(CONTEXT | {"framing": "vnet", "attributes": {"k": "v"}})
    message, tunnel = flow.adopt()
    assert message.context == TunnelContext(
        tenant_id="t-acme",
        tenant="acme",
        device_id="d-laptop",
        device="laptop",
        virtual_network_id="n-default",
        virtual_network="default",
        addresses=LAPTOP.addresses,
        user_id="u-ann",
        user="ann",
        groups=("eng", "managed"),
        attributes={"k": "v"},
        device_max_flows=7,
        tenant_max_flows=100,
    )
    assert (message.tunnel, message.framing, message.mtu) == (1, Framing.VNET, 1400)
    assert json.loads(datagram(producer)) == {
        "admitted": {
            "tunnel_id": 1,
            "addresses": [str(ip_address(address)) for address in LAPTOP.addresses],
            "mtu": 1400,
            "framing": "vnet",
        }
    }
    opened = onramp.report(Opened)
    assert (opened.tunnel, opened.context, opened.resumed) == (1, message.context, False)
    assert onramp.counters.read("admitted") == 1
    producer.send(b"packet")
    assert datagram(tunnel) == b"packet"
    tunnel.send(b"reply")
    assert datagram(producer) == b"reply"


def test_tunnels_of_a_device_go_to_the_worker_of_its_hash(tmp_path: Path) -> None:
    with rig(tmp_path, 3) as (onramp, flows):
        for context, device_id in ((CONTEXT, "d-laptop"), (CONTEXT | {"tenant": "other"}, "d-other")):
            worker = crc32(device_id.encode()) % 3
            for _ in range(2):
                assert onramp.opened(flows[worker], context)[1].context.device_id == device_id


def test_producer_that_leaves_is_told_to_flow(parts: Parts) -> None:
    onramp, (flow,) = parts
    before = onramp.descriptors()
    producer, message, tunnel = onramp.opened(flow)
    producer.close()
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "producer_closed")
    assert onramp.ended(message.tunnel) == "producer_closed"
    eventually(lambda: onramp.descriptors() <= before)
    assert tunnel.recv(10) == b""


@pytest.mark.parametrize(
    ("changed", "removed", "reason"),
    [
        ([], ("d-laptop",), "device_removed"),
        ([], ("t-acme",), "tenant_removed"),
        ([], ("n-default",), "virtual_network_removed"),
        ([msgspec.structs.replace(LAPTOP, disabled=True)], (), "device_disabled"),
        ([msgspec.structs.replace(ANN, disabled=True)], (), "user_disabled"),
        ([msgspec.structs.replace(LAPTOP, addresses=(b"\x01\x02\x03\x04",))], (), "context_changed"),
        ([msgspec.structs.replace(LAPTOP, virtual_network="lab")], (), "context_changed"),
        (
            [NetworkRow("n-default", "t-acme", "default"), NetworkRow("n-lab", "t-acme", "lab", True)],
            (),
            "context_changed",
        ),
    ],
)
def test_a_change_that_leaves_no_such_context_closes_the_tunnel(
    parts: Parts, changed: list[DeviceRow], removed: tuple[str, ...], reason: str
) -> None:
    onramp, (flow,) = parts
    producer, message, tunnel = onramp.opened(flow)
    onramp.update(*changed, removed=removed)
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, reason)
    assert onramp.ended(message.tunnel) == reason
    # Every copy of the descriptor is shut, the flow worker's too.
    assert datagram(producer) == b""
    assert tunnel.recv(10) == b""


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ([msgspec.structs.replace(ANN, groups=())], {"groups": ("managed",)}),
        ([msgspec.structs.replace(LAPTOP, groups=("more",))], {"groups": ("eng", "more")}),
        ([msgspec.structs.replace(LAPTOP, posture={"disk": "clear"})], {"posture": {"disk": "clear"}}),
        ([msgspec.structs.replace(LAPTOP, user="")], {"user": "", "user_id": "", "groups": ("managed",)}),
        ([msgspec.structs.replace(LAPTOP, name="renamed", max_flows=9)], {"device": "renamed", "device_max_flows": 9}),
        ([TenantRow("t-acme", "acme-2", 1)], {"tenant": "acme-2", "tenant_max_flows": 1}),
    ],
    ids=["user's groups", "device's groups", "posture", "user", "device", "tenant"],
)
def test_a_change_of_the_context_reaches_the_flow_worker(
    parts: Parts, changed: list[Row], fields: dict[str, object]
) -> None:
    onramp, (flow,) = parts
    producer, message, _ = onramp.opened(flow)
    onramp.update(*changed)
    told = flow.expect(Recontext)
    assert told == Recontext(message.tunnel, msgspec.structs.replace(message.context, **fields))
    assert onramp.report(Changed) == Changed(message.tunnel, told.context)
    # The same once more is no change.
    onramp.update(*changed)
    onramp.tell(Close(message.tunnel, "by the operator"))
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "by the operator")
    assert datagram(producer) == b""


def test_a_change_while_the_flow_worker_was_away_reaches_it(parts: Parts) -> None:
    onramp, (flow,) = parts
    generation = time.time_ns()
    flow.die()
    flow.accept(generation)
    onramp.report(State, lambda state: state.links == (True,))
    _, message, tunnel = onramp.opened(flow)
    flow.die()
    onramp.update(msgspec.structs.replace(LAPTOP, posture={"disk": "clear"}))
    context = onramp.report(Changed).context
    flow.accept(generation)
    flow.send(Held(message.tunnel, message.context, message.framing, message.mtu), fds=(tunnel.fileno(),))
    assert flow.expect(Recontext) == Recontext(message.tunnel, context)


def test_other_changes_leave_tunnels_alone(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer, message, tunnel = onramp.opened(flow)
    pinned, second, _ = onramp.opened(flow, CONTEXT | {"virtual_network": "default"})
    onramp.update(removed=("d-other", "n-other", "t-other"))
    # A new selection concerns only the tunnel that didn't name its virtual network.
    onramp.update(msgspec.structs.replace(LAPTOP, virtual_network="lab"))
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "context_changed")
    pinned.send(b"still open")
    onramp.tell(Close(second.tunnel, "by the operator"))
    assert flow.expect(TunnelClosed) == TunnelClosed(second.tunnel, "by the operator")
    assert datagram(producer) == b""
    tunnel.close()


def test_names_may_swap_in_one_update(parts: Parts) -> None:
    onramp, (flow,) = parts
    onramp.update(
        DeviceRow("d-laptop", "t-acme", "off", "ann"),
        DeviceRow("d-off", "t-acme", "laptop", addresses=(b"\x09\x09\x09\x09",)),
    )
    onramp.report(State, lambda state: state.number == onramp.number)
    assert onramp.opened(flow)[1].context.device_id == "d-off"


def test_flow_worker_may_refuse_and_close(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer = onramp.producer()
    message, tunnel = flow.adopt(take=False)
    tunnel.close()
    flow.send(AdoptRefused(message.tunnel, "TOO_MANY", "no room"))
    assert onramp.refusal(producer) == "ADOPT_REFUSED"
    flow.expect(TunnelClosed)
    producer, message, _ = onramp.opened(flow)
    flow.send(TunnelClosed(message.tunnel, "flow_said_so"))
    assert datagram(producer) == b""
    assert onramp.ended(message.tunnel) == "flow_said_so"


def test_a_new_flow_worker_gets_the_tunnels_without_a_greeting(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer, message, tunnel = onramp.opened(flow)
    tunnel.close()
    flow.die()
    onramp.report(State, lambda state: not all(state.links))
    producer.send(b"sent while nobody read")
    flow.accept()
    again, tunnel = flow.adopt()
    assert again == msgspec.structs.replace(message, greeting=b"")
    assert datagram(tunnel) == b"sent while nobody read"
    tunnel.send(b"packet")
    assert datagram(producer) == b"packet"


def test_the_same_flow_worker_gets_nothing_twice(parts: Parts) -> None:
    onramp, (flow,) = parts
    flow.die()
    flow.accept(generation=7 << 60)
    producer, message, _ = onramp.opened(flow)
    flow.die()
    flow.accept(generation=7 << 60)
    producer.close()
    assert flow.expect(TunnelClosed).tunnel == message.tunnel


def test_a_tunnel_waits_for_its_flow_worker(parts: Parts) -> None:
    onramp, (flow,) = parts
    flow.die()
    onramp.report(State, lambda state: not all(state.links))
    producer = onramp.producer()
    flow.accept()
    message, _ = flow.adopt()
    assert message.greeting
    assert b"admitted" in datagram(producer)


def test_a_tunnel_that_nobody_takes_is_refused(tmp_path: Path) -> None:
    with rig(tmp_path, adopt_timeout_ms=50) as (onramp, (flow,)):
        producer = onramp.producer()
        message, tunnel = flow.adopt(take=False)
        assert onramp.refusal(producer) == "NOT_READY"
        assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "not_ready")
        assert onramp.counters.read("NOT_READY") == 1
        tunnel.close()


@pytest.mark.parametrize(
    "hello",
    [{"role": "upgrader"}, {"worker": 1}, {"protocol": 99}, {"generation": 1}],
    ids=lambda hello: next(iter(hello)),
)
def test_wrong_flow_workers_are_refused(parts: Parts, hello: dict[str, Any]) -> None:
    onramp, (flow,) = parts
    flow.die()
    flow.accept(**hello)
    assert flow.link is not None
    assert datagram(flow.link) == b""
    flow.die()
    flow.accept()
    onramp.opened(flow)


def test_garbage_from_a_flow_worker_drops_the_link_only(parts: Parts) -> None:
    onramp, (flow,) = parts
    for garbage in (b"\xc1", handover.encode([Held(9, TunnelContext("", "", "", "", "", "", ()), Framing.RAW, 1)])):
        assert flow.link is not None
        flow.link.send(garbage)
        assert datagram(flow.link) == b""
        flow.die()
        flow.accept()
    onramp.opened(flow)


def test_a_new_onramp_gets_its_tunnels_back(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer, message, tunnel = onramp.opened(flow)
    pinned, other, tunnel2 = onramp.opened(flow, CONTEXT | {"virtual_network": "lab"})
    onramp.kill()
    producer.send(b"passes while the on-ramp is away")
    assert datagram(tunnel) == b"passes while the on-ramp is away"
    flow.die()
    onramp.start()
    flow.accept()
    held = [Held(m.tunnel, m.context, m.framing, m.mtu) for m in (message, other)]
    flow.send(*held, fds=(tunnel.fileno(), tunnel2.fileno()))
    onramp.ready()
    opened = onramp.report(Opened)
    assert (opened.tunnel, opened.resumed, opened.context) == (message.tunnel, True, message.context)
    assert opened.pid > 0
    # Ids go on where they were, a review still finds the old tunnels, and so does the producer's leaving.
    assert onramp.opened(flow)[1].tunnel == other.tunnel + 1
    onramp.update(msgspec.structs.replace(LAPTOP, virtual_network="lab"))
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "context_changed")
    assert datagram(producer) == b""
    flow.expect(TunnelClosed)
    pinned.close()
    assert flow.expect(TunnelClosed) == TunnelClosed(other.tunnel, "producer_closed")


def test_held_tunnel_of_a_device_that_was_removed_is_closed(parts: Parts) -> None:
    onramp, (flow,) = parts
    _, message, tunnel = onramp.opened(flow)
    onramp.kill()
    flow.die()
    onramp.start()
    flow.accept()
    flow.send(Held(message.tunnel, message.context, message.framing, message.mtu), fds=(tunnel.fileno(),))
    onramp.ready(*(row for row in ROWS if row.id != "d-laptop"))
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "device_removed")


def test_sampled_flows_are_passed_to_the_parent(parts: Parts) -> None:
    onramp, (flow,) = parts
    _, message, _ = onramp.opened(flow)
    flow.send(handover.Traced(message.tunnel, bytes(16), bytes(8), 123))
    assert onramp.report(Traced) == Traced(message.tunnel, bytes(16), bytes(8), 123)


def test_it_ends_on_sigterm_and_leaves_tunnels_open(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer, _, tunnel = onramp.opened(flow)
    onramp.process.send_signal(signal.SIGTERM)
    assert onramp.process.wait(10) == 0
    producer.send(b"packet")
    assert datagram(tunnel) == b"packet"
    onramp.parent.close()
    onramp.start()


def test_a_large_state_is_applied_whole(parts: Parts) -> None:
    onramp, (flow,) = parts
    devices = [DeviceRow(f"d-{number}", "t-acme", f"dev-{number}") for number in range(20_000)]
    onramp.ready(*ROWS, *devices)
    assert onramp.opened(flow, CONTEXT | {"device": "dev-19999"})[1].context.device_id == "d-19999"
    onramp.update(removed=tuple(device.id for device in devices))
    onramp.report(State, lambda state: state.number == onramp.number)
    assert onramp.refusal(onramp.producer(CONTEXT | {"device": "dev-1"})) == "UNKNOWN_DEVICE"


def test_many_tunnels_come_and_go_without_a_trace(parts: Parts) -> None:
    onramp, (flow,) = parts
    before = onramp.descriptors()
    open_tunnels: list[tuple[socket.socket, socket.socket]] = []
    for _ in range(90):
        producer, _, tunnel = onramp.opened(flow)
        open_tunnels.append((producer, tunnel))
    for producer, tunnel in open_tunnels:
        producer.close()
        tunnel.close()
    eventually(lambda: onramp.counters.read("closed") == 90)
    eventually(lambda: onramp.descriptors() <= before)
