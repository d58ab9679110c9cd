"""Audit records of questions."""

from __future__ import annotations

import msgspec

from falkirk.router import query_log
from falkirk.router.answering import Said
from falkirk.wire.asker import Asker
from falkirk.wire.context import TunnelContext


def test_a_record_says_who_asked_what_and_what_was_answered() -> None:
    context = TunnelContext("t1", "acme", "d1", "laptop", "n1", "default", (), user="ann", groups=("eng",))
    asker = Asker(bytes(range(16)), 17, bytes([100, 96, 0, 2]), 4711, bytes([100, 96, 0, 53]), context)
    said = Said("nas.acme.falkirk", "A", "NOERROR", 1, "device")
    ids = query_log.Ids("here", 2000, 1, 2)
    record = msgspec.json.decode(query_log.line(ids, 1_700_000_000_000_000_042, asker, said, 1500))
    assert record == {
        "event": "query",
        "flow_id": "000102030405060708090a0b0c0d0e0f",
        "time": "2023-11-14T22:13:20.000000042Z",
        "node": "here",
        "worker": 2000,
        "epoch": 1,
        "sequence": 2,
        "tenant": "acme",
        "tenant_id": "t1",
        "device": "laptop",
        "device_id": "d1",
        "user": "ann",
        "groups": ["eng"],
        "virtual_network": "default",
        "protocol": "udp",
        "source": "100.96.0.2",
        "source_port": 4711,
        "destination": "100.96.0.53",
        "destination_port": 53,
        "query": "nas.acme.falkirk",
        "query_type": "A",
        "rcode": "NOERROR",
        "answers": 1,
        "answered_by": "device",
        "duration_ns": 1500,
    }
