"""The serialised form of rules: written and read back, each expression once, damage refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.decide import snapshot
from falkirk.decide.rules import PolicySource, RuleSource, RuleTable, compile

DATA = compile([PolicySource("t-acme", "p", 0, [RuleSource("r", 'device.posture["os"] == "linux"')])])


def load(data: bytes) -> None:
    for _ in RuleTable.load(data):
        pass


def test_frames_hold_at_most_so_many_items_and_keep_order() -> None:
    rules: list[snapshot.Guarded] = [
        (snapshot.Rule(f"p/{n}", "", True, "", snapshot.EXACT), {"net.port": [n]}) for n in range(200)
    ]
    frames = list(snapshot.read(snapshot.write([b"x"] * 70, {"a": rules, "b": rules[:1]})))
    assert frames[0] == snapshot.Head(2, 201, 70)
    assert [len(frame.serialized) for frame in frames if isinstance(frame, snapshot.Expressions)] == [64, 6]
    of_a = [frame for frame in frames if isinstance(frame, snapshot.Rules) and frame.tenant_id == "a"]
    assert [rule.label for frame in of_a for rule in frame.rules] == [f"p/{n}" for n in range(200)]
    assert [guards["net.port"] for frame in of_a for guards in frame.guards] == [[n] for n in range(200)]
    assert isinstance(frames[-1], snapshot.End)


def test_one_expression_is_kept_once() -> None:
    when = 'device.posture["os"] == "linux"'
    data = compile([PolicySource(t, "p", 0, [RuleSource("r", when)]) for t in ("t-acme", "t-other")])
    assert next(iter(snapshot.read(data))) == snapshot.Head(2, 2, 1)


def test_another_version_is_refused_by_its_number() -> None:
    for other in (snapshot.VERSION - 1, snapshot.VERSION + 1):
        says = f"version {other}; this program reads version {snapshot.VERSION}"
        with pytest.raises(snapshot.UnreadableRules, match=says):
            load(DATA[:14] + bytes([other]) + DATA[15:])


@pytest.mark.parametrize("data", [b"", b"FALKIRK-RULES", b"x" * 100, DATA[:-1], DATA[:-6], DATA[:15]])
def test_what_is_no_whole_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(snapshot.UnreadableRules):
        load(data)


@given(cut=st.integers(0, len(DATA)), flip=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_loads(cut: int, flip: int, bit: int) -> None:
    data = bytearray(DATA)
    data[flip] ^= 1 << bit
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            load(damaged)
        except snapshot.UnreadableRules:
            continue
