"""The protobuf context format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.api.net.v1 import net_pb2
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.context_protobuf import parse
from falkirk.wire.context import Framing


def request(**more: object) -> bytes:
    fields = {"v": 1, "tenant": "acme", "device": "laptop", **more}
    return net_pb2.TunnelRequest(**fields).SerializeToString()  # type: ignore[arg-type]  # some are meant to be wrong


def test_read() -> None:
    assert parse(request()) == ContextRequest("acme", "laptop")
    found = parse(request(virtual_network="lab", framing=net_pb2.FRAMING_VNET, attributes={"a": "b"}))
    assert found == ContextRequest("acme", "laptop", "lab", Framing.VNET, {"a": "b"})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\xff\xff", Code.INVALID_CONTEXT),
        (request(v=0), Code.UNSUPPORTED_VERSION),
        (request(v=2), Code.UNSUPPORTED_VERSION),
        (request(tenant=""), Code.INVALID_CONTEXT),
        (request(framing=7), Code.INVALID_CONTEXT),
        (request() + b"\xf8\x07\x01", Code.UNKNOWN_KEY),
    ],
)
def test_refused(data: bytes, code: Code) -> None:
    with pytest.raises(Refusal) as caught:
        parse(data)
    assert caught.value.code is code


@given(st.binary())
def test_any_bytes_give_a_request_or_a_refusal(data: bytes) -> None:
    try:
        parse(request() + data)
    except Refusal as refusal:
        refusal.answer().decode()
