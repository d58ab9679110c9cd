"""Flows' constants, and the wheel that ends what is idle."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from falkirk.flow.keys import key_of
from falkirk.flow.table import NOBODY, DeviceCounts, Flow, State, TcpLift, TcpOwner, Tunnel, Wheel, native_sum
from falkirk.wire.context import Framing
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, context
from tests.unit.wire.samples import slow_sum

PORTS = bytes.fromhex("9c4001bb")


class Nobody(TcpOwner):
    """Owns flows that don't end."""

    def end(self, flow: Flow, reason: str) -> None:
        raise AssertionError

    cut = bereave = release = end

    def segment_up(self, *_: object) -> bool:
        raise AssertionError

    def segment_down(self, *_: object) -> None:
        raise AssertionError

    def expire(self, flow: Flow) -> None:
        raise AssertionError


def tunnel() -> Tunnel:
    return Tunnel(1, context(), Framing.RAW, 1500, NOBODY, 0, DeviceCounts())


def flow(key: bytes = DEVICE4 + SERVER4 + PORTS, forward: bytes | None = None) -> TcpLift:
    forward = forward or bytes([10, 0, 0, 16, 10, 0, 0, 1]) + PORTS[:2] + b"\x04\x00"
    return TcpLift(Nobody(), tunnel(), key, forward, 16, cast(Any, None))


@pytest.mark.parametrize(
    ("key", "forward"),
    [
        (DEVICE4 + SERVER4 + PORTS, bytes([10, 0, 0, 16, 10, 0, 0, 1]) + PORTS[:2] + b"\x04\x00"),
        (DEVICE6 + SERVER6 + PORTS, bytes(range(16)) + bytes(range(16, 32)) + PORTS[:2] + b"\x04\x00"),
    ],
)
def test_a_flow_knows_its_ends_and_what_rewriting_changes(key: bytes, forward: bytes) -> None:
    one = flow(key, forward)
    size = 4 if len(key) == 12 else 16
    assert (one.family, one.source, one.destination) == (4 if size == 4 else 6, key[:size], key[size : 2 * size])
    assert (one.source_port, one.destination_port) == (40000, 443)
    assert one.back == one.destination + one.source + PORTS[2:] + PORTS[:2]
    assert (one.port & 0xFFFF).to_bytes(2, "little") == PORTS[:2]
    assert (one.port > 0xFFFF) is (size == 16)
    # The delta, in the machine's byte order, takes the sum of the old signature to that of the new one.
    for delta, end in ((one.delta_all, len(key)), (one.delta_addresses, 2 * size)):
        assert (native_sum(key[:end]) + delta) % 0xFFFF == native_sum(forward[:end])


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("protocol", [1, 6, 17, 58, 132])
def test_a_flow_of_any_protocol_knows_its_ends(size: int, protocol: int) -> None:
    source, destination = (DEVICE4, SERVER4) if size == 4 else (DEVICE6, SERVER6)
    one = Flow(Nobody(), tunnel(), key_of(protocol, source, destination, 40000, 53))
    assert (one.protocol, one.family) == (protocol, 4 if size == 4 else 6)
    assert (one.source, one.destination, one.source_port, one.destination_port) == (source, destination, 40000, 53)
    assert one.slot == 0


def test_sums_in_native_order_are_rfc_1071_sums() -> None:
    chance = random.Random(5)
    for _ in range(50):
        data = chance.randbytes(2 * chance.randrange(1, 30))
        swapped = native_sum(data)
        assert (swapped >> 8 | (swapped & 0xFF) << 8) % 0xFFFF == slow_sum(data) % 0xFFFF


def test_states_are_those_of_the_api() -> None:
    from falkirk.api.flow.v1 import flow_service_pb2 as pb

    assert {state.name: int(state) for state in State}.items() <= {
        name.removeprefix("FLOW_STATE_"): number for name, number in pb.FlowState.items()
    }.items()


def test_the_wheel_gives_each_flow_once_at_its_second() -> None:
    wheel = Wheel(100)
    flows = [flow() for _ in range(3)]
    for one, deadline in zip(flows, (101, 105, 105), strict=True):
        wheel.place(one, deadline)
    assert len(wheel) == 3
    assert wheel.due(100) == []
    assert wheel.due(104) == flows[:1]
    assert wheel.due(105) == flows[1:]
    assert wheel.due(200) == []
    assert (len(wheel), [one.bucket for one in flows]) == (0, [0, 0, 0])


def test_placing_again_moves_and_removing_takes_out() -> None:
    wheel = Wheel(0)
    one, other = flow(), flow()
    wheel.place(one, 5)
    wheel.place(one, 9)
    wheel.place(other, 5)
    wheel.remove(other)
    wheel.remove(other)
    assert wheel.due(8) == []
    assert wheel.due(9) == [one]


def test_a_deadline_in_the_past_is_the_next_second() -> None:
    wheel = Wheel(50)
    one = flow()
    wheel.place(one, 3)
    assert wheel.due(50) == []
    assert wheel.due(51) == [one]


def test_the_wheel_against_a_plain_list() -> None:
    chance = random.Random(11)
    wheel, now = Wheel(0), 0
    deadlines: dict[Flow, int] = {}
    flows: list[Flow] = [flow() for _ in range(20)]
    for _ in range(3000):
        one = chance.choice(flows)
        action = chance.randrange(3)
        if action == 0:
            deadline = now + chance.randrange(-5, 40)
            wheel.place(one, deadline)
            deadlines[one] = max(deadline, now + 1)
        elif action == 1 and one in deadlines:
            wheel.remove(one)
            del deadlines[one]
        else:
            now += chance.randrange(3)
            due = wheel.due(now)
            assert set(due) == {one for one, deadline in deadlines.items() if deadline <= now}
            for one in due:
                del deadlines[one]
        assert len(wheel) == len(deadlines)


class Idle:
    """As much of a flow as the wheel looks at; every look is counted."""

    __slots__ = ("_bucket",)
    looks = 0

    def __init__(self) -> None:
        self._bucket = 0

    @property
    def bucket(self) -> int:
        Idle.looks += 1
        return self._bucket

    @bucket.setter
    def bucket(self, value: int) -> None:
        Idle.looks += 1
        self._bucket = value


class Buckets(dict[int, dict[Any, None]]):
    """A wheel's buckets; every look into one is counted, and going through them isn't to be."""

    looks = 0

    def pop(self, *key: Any) -> Any:
        self.looks += 1
        return super().pop(*key)

    def _scan(self, *_: Any) -> Any:
        raise AssertionError("the wheel goes through its buckets")

    __iter__ = items = keys = values = _scan


def test_a_million_idle_flows_cost_no_scanning() -> None:
    """Two hours pass: a second costs one look into one bucket, and a flow is looked at only when its own second comes."""
    flows, timeout = 1_000_000, 7_440
    wheel: Any = Wheel(0)
    for number in range(flows):
        wheel.place(Idle(), timeout + number % 100)
    wheel._buckets = buckets = Buckets(wheel._buckets)
    Idle.looks = 0
    for second in range(1, timeout):
        assert wheel.due(second) == []
    assert (buckets.looks, Idle.looks) == (timeout - 1, 0)
    due = wheel.due(timeout)
    assert (len(due), Idle.looks) == (flows // 100, flows // 100)
    # One that had a packet meanwhile is placed anew: as many looks, however many flows there are.
    Idle.looks = 0
    wheel.place(due[0], 2 * timeout)
    wheel.remove(due[0])
    assert Idle.looks <= 6


def test_an_ending_is_shared_until_it_begins() -> None:
    one, other = flow(), flow()
    assert (one.fin_up, one.fin_down, one.over, one.reset, one.long_rest) == (None, None, False, False, False)
    one.reset = True
    one.fin_up = 7
    assert (one.reset, one.fin_up, one.ending.reset) == (True, 7, True)
    assert (other.reset, other.fin_up, flow().reset) == (False, None, False)
    assert other.ending is not one.ending


def test_flows_of_a_bucket_refer_to_one_number() -> None:
    wheel = Wheel(0)
    one, other = flow(), flow()
    wheel.place(one, int("1000"))
    wheel.place(other, int("1000"))
    assert one.bucket is other.bucket
    assert set(wheel.due(1000)) == {one, other}
    assert len(wheel) == 0
