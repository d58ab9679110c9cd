"""Every message there and back, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from falkirk.wire import handover
from falkirk.wire.context import Framing, Transport, TunnelContext
from falkirk.wire.handover import (
    Abort,
    AbortAll,
    Adopt,
    Adopted,
    AdoptRefused,
    Closed,
    Connected,
    Devices,
    DialFailed,
    Held,
    Hello,
    LowerRefused,
    LowerWanted,
    Message,
    Prepare,
    Traced,
    Trunk,
    Trunked,
    TunnelClosed,
)
from falkirk.wire.slots import LOWERED

CONTEXT = TunnelContext(
    tenant_id="t-1",
    tenant="acme",
    device_id="d-1",
    device="laptop",
    virtual_network_id="v-1",
    virtual_network="default",
    addresses=(bytes([100, 96, 0, 2]), bytes(16)),
    groups=("eng",),
    attributes={"app": "web"},
)
HELLO = Hello("flow", 2, 1_700_000_000_000_000_000)
ROADS: list[tuple[msgspec.msgpack.Decoder[Any], list[Message]]] = [
    (
        handover.ONRAMP_TO_FLOW,
        [
            HELLO,
            Trunk(),
            Adopt(7, CONTEXT, Framing.VNET, 1500, b"{}"),
            Adopt(8, CONTEXT, Framing.RAW, 1420, transport=Transport.TRUNK, descriptors=0),
            TunnelClosed(7, "device disabled"),
        ],
    ),
    (
        handover.FLOW_TO_ONRAMP,
        [
            HELLO,
            Trunked(),
            Adopted(7),
            AdoptRefused(7, "LIMIT", "too many"),
            Held(7, CONTEXT, Framing.RAW, 1500),
            TunnelClosed(7, "closed"),
            Traced(7, bytes(16), bytes(8), 5),
        ],
    ),
    (
        handover.FLOW_TO_UPGRADER,
        [
            HELLO,
            Prepare(16, bytes(16), bytes(4), 443, b"", 5000, 7440, "l4"),
            Prepare(16, bytes(16), bytes(4), 22, b"", 5000, 7440, "l4", lower=LOWERED | 16, source_port=40000),
            Abort(16),
            AbortAll(),
            LowerRefused(1, "no_tunnel", "device laptop has none here"),
        ],
    ),
    (
        handover.UPGRADER_TO_FLOW,
        [
            HELLO,
            Devices(3, 1026, 1500),
            Connected(16, 99),
            DialFailed(16, 111, 99),
            Closed(16, "idle", 1, 2),
            LowerWanted(1, "acme", "laptop", 0, 22, "root (uid 0)"),
        ],
    ),
]


@pytest.mark.parametrize(("decoder", "messages"), ROADS)
def test_there_and_back(decoder: msgspec.msgpack.Decoder[Any], messages: list[Message]) -> None:
    assert decoder.decode(handover.encode(messages)) == messages


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (handover.UPGRADER_TO_FLOW, Prepare(16, bytes(16), bytes(4), 443, b"", 5000, 7440, "l4")),
        (handover.FLOW_TO_UPGRADER, Connected(16, 99)),
        (handover.ONRAMP_TO_FLOW, Adopted(7)),
        (handover.FLOW_TO_ONRAMP, Adopt(7, CONTEXT, Framing.VNET, 1500)),
    ],
)
def test_the_wrong_road_is_refused(decoder: msgspec.msgpack.Decoder[Any], message: Message) -> None:
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(handover.encode([message]))


def test_descriptors_are_announced() -> None:
    assert Adopt(7, CONTEXT, Framing.VNET, 1500).descriptors == 1
    assert Held(7, CONTEXT, Framing.RAW, 1500).descriptors == 1
    assert Devices(3, 1026, 1500).descriptors == 4


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (64, [64]), (65, [64, 1]), (130, [64, 64, 2])])
def test_batches(count: int, sizes: list[int]) -> None:
    messages: list[Message] = [Connected(slot, 1) for slot in range(count)]
    parts = [handover.UPGRADER_TO_FLOW.decode(part) for part in handover.batches(messages)]
    assert [len(part) for part in parts] == sizes
    assert [message for part in parts for message in part] == messages


def test_a_full_datagram_of_small_messages_fits() -> None:
    full = [Closed(0x7FFFFF, "upstream_reset", 2**63, 2**63)] * handover.MAX_MESSAGES
    assert len(handover.encode(full)) < handover.MAX_DATAGRAM
