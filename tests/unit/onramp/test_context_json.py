"""The default context format: what is read, what is refused, and that nothing else can come of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.context_json import parse
from falkirk.wire.context import Framing

GOOD: dict[str, Any] = {"v": 1, "tenant": "acme", "device": "laptop"}


def test_the_least_context() -> None:
    assert parse(json.dumps(GOOD).encode()) == ContextRequest("acme", "laptop")


def test_the_whole_context() -> None:
    more = {"virtual_network": "lab", "framing": "vnet", "attributes": {"a": "1", "ü": ""}}
    found = parse(json.dumps(GOOD | more, ensure_ascii=False).encode())
    assert found == ContextRequest("acme", "laptop", "lab", Framing.VNET, {"a": "1", "ü": ""})


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", Code.INVALID_CONTEXT, "not JSON"),
        (b'{"v":1', Code.INVALID_CONTEXT, "not JSON"),
        (b"\xff", Code.INVALID_CONTEXT, "not UTF-8 at byte 0"),
        (b'{"v":1,"v":1}', Code.INVALID_CONTEXT, 'duplicate key "v"'),
        (b'{"v":NaN}', Code.INVALID_CONTEXT, "NaN"),
        (b"[" * 16384, Code.INVALID_CONTEXT, "nesting"),
        (b"9" * 5000, Code.INVALID_CONTEXT, "number"),
        (b'{"v":2,"later":[]}', Code.UNSUPPORTED_VERSION, "v must be 1, not"),
        (b'{"v":1,"later":[]}', Code.UNKNOWN_KEY, '"later"'),
        (b'{"v":1,"' + b"x" * 5000 + b'":1}', Code.UNKNOWN_KEY, '..."'),
        (b'{"v":1,"tenant":"a"}', Code.INVALID_CONTEXT, "device is missing"),
        (b'{"v":1,"tenant":"a","device":{}}', Code.INVALID_CONTEXT, '"device" must be a string'),
        (b'{"v":1,"tenant":"a","device":"\\ud800"}', Code.INVALID_CONTEXT, "UTF-8"),
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, code: Code, says: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(data)
    assert caught.value.code is code
    assert says in caught.value.message
    answer = json.loads(caught.value.answer())
    assert answer == {"error": {"code": code.value, "message": caught.value.message}}
    assert len(caught.value.answer()) < 500


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(["v", "tenant", "device", "virtual_network", "framing", "attributes", "x"])


@given(st.binary() | st.dictionaries(KEYS, VALUES).map(lambda more: json.dumps(GOOD | more).encode()))
def test_any_bytes_give_a_request_or_a_refusal(data: bytes) -> None:
    try:
        found = parse(data)
    except Refusal as refusal:
        refusal.answer().decode()
        return
    assert found.tenant
    assert found.device
    for text in (found.tenant, found.device, found.virtual_network, *found.attributes, *found.attributes.values()):
        text.encode()
