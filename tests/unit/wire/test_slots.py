"""Slots and addresses: one arithmetic, there and back, and no two workers share an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.wire.context import Framing
from falkirk.wire.slots import FIRST_INDEX, SlotPlan


@given(st.integers(1, 64), st.sampled_from(Framing), st.data())
def test_there_and_back(workers: int, framing: Framing, data: st.DataObject) -> None:
    plan = SlotPlan(workers)
    worker = data.draw(st.integers(0, workers - 1))
    slot = plan.slot(framing, data.draw(st.integers(FIRST_INDEX, plan.last_index)))
    assert plan.slot_of(worker, plan.address4(worker, slot)) == slot
    assert plan.slot_of(worker, plan.address6(worker, slot)) == slot
    for other in range(workers):
        if other != worker:
            found = plan.slot_of(other, plan.address4(worker, slot))
            assert found < 0 or found >> (plan.index_bits + 1)


@given(st.integers(1, 64))
def test_prefixes_are_disjoint_and_inside(workers: int) -> None:
    plan = SlotPlan(workers)
    mask = 32 - plan.prefix_length4()
    firsts = [
        int.from_bytes(plan.address4(worker, plan.slot(framing, 0)), "big") >> mask
        for worker in range(workers)
        for framing in Framing
    ]
    assert len(set(firsts)) == 2 * workers
    assert {first << mask >> 24 for first in firsts} == {10}
    assert plan.prefix_length6() - plan.prefix_length4() == 96


def test_the_numbers_that_others_rely_on() -> None:
    plan = SlotPlan(3)
    assert (plan.index_bits, plan.last_index) == (21, (1 << 21) - 2)
    assert plan.address4(0, plan.slot(Framing.VNET, 1)) == bytes([10, 0, 0, 1])
    assert plan.address4(0, plan.slot(Framing.RAW, 1)) == bytes([10, 32, 0, 1])
    assert plan.address4(2, plan.slot(Framing.VNET, 16)) == bytes([10, 128, 0, 16])
    assert plan.address6(2, plan.slot(Framing.VNET, 16)).hex() == "fd66616c6b69726b0000000000800010"
    assert (plan.prefix_length4(), plan.prefix_length6()) == (11, 107)


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_how_many_workers(workers: int) -> None:
    with pytest.raises(ValueError, match="workers"):
        SlotPlan(workers)
