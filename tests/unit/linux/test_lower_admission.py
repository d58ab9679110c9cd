"""The on-ramp handshake as `falkirk lower` writes and reads it."""

from __future__ import annotations

import json

import pytest

from falkirk.linux.lower.admission import Admitted, context, read_answer
from falkirk.linux.lower.request import Exit, LowerRequest, Stopped
from falkirk.wire.context import Framing, Transport

REQUEST = LowerRequest(tunnel="t.sock", tenant="acme", device="laptop", command=("true",))


def test_context_says_no_more_than_it_must() -> None:
    assert json.loads(context(REQUEST)) == {"v": 1, "tenant": "acme", "device": "laptop", "framing": "vnet"}


def test_context_carries_what_was_given() -> None:
    request = LowerRequest(
        tunnel="t.sock",
        tenant="acme",
        device="laptop",
        command=("true",),
        virtual_network="lab",
        framing=Framing.RAW,
        attributes={"app": "x"},
    )
    assert json.loads(context(request)) == {
        "v": 1,
        "tenant": "acme",
        "device": "laptop",
        "framing": "raw",
        "virtual_network": "lab",
        "packed": True,
        "attributes": {"app": "x"},
    }
    # A device takes a packet at a time, whatever its framing.
    assert json.loads(context(request, Transport.DEVICE)) == {
        "v": 1,
        "tenant": "acme",
        "device": "laptop",
        "framing": "raw",
        "transport": "device",
        "virtual_network": "lab",
        "attributes": {"app": "x"},
    }


@pytest.mark.parametrize("tunnel_id", [7, "7"])
def test_admitted(tunnel_id: int | str) -> None:
    addresses = ["100.96.0.2", "fd00::2"]
    answer = {"admitted": {"tunnel_id": tunnel_id, "addresses": addresses, "mtu": 1500, "framing": "raw", "more": 1}}
    admitted = read_answer(json.dumps(answer).encode(), Framing.RAW)
    assert admitted == Admitted(tunnel_id, tuple(addresses), 1500, Framing.RAW)
    assert [len(address) for address in admitted.packed()] == [4, 16]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b'{"error":{"code":"UNKNOWN_DEVICE","message":"no such device"}}', "UNKNOWN_DEVICE: no such device"),
        (b"{}", "BAD_ANSWER: the on-ramp neither admitted nor refused"),
        (b"E\0\0", "BAD_ANSWER: the on-ramp's answer can't be read"),
        (b'{"admitted":{"tunnel_id":1,"addresses":[],"mtu":1500,"framing":"vnet"}}', "BAD_ANSWER: the on-ramp frames"),
        (b'{"admitted":{"tunnel_id":1,"addresses":["x"],"mtu":9,"framing":"raw"}}', "BAD_ANSWER: the on-ramp's addr"),
    ],
)
def test_anything_else_ends_the_run(answer: bytes, text: str) -> None:
    with pytest.raises(Stopped) as stopped:
        read_answer(answer, Framing.RAW)
    assert str(stopped.value).startswith(text)
    assert stopped.value.exit_code is Exit.REFUSED
