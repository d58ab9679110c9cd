"""Records put together from parts are what the reader's structure says."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest

from falkirk.decide.routes import RouteEntry
from falkirk.decide.rules import Verdict
from falkirk.flow import records
from falkirk.flow.decision import Decision, Outcome
from falkirk.flow.keys import key_of
from falkirk.runtime.spool import AuditRecord
from falkirk.wire.context import TunnelContext

CONTEXT = TunnelContext("t-1", "acme", "d-1", 'lap"top\\', "v-1", "default", (bytes(4),), user="älice")
ROUTE = RouteEntry("00000000-0000-4000-8000-0000000000f4", "all", "0.0.0.0/0", "internet")


@pytest.mark.parametrize(
    ("number", "name"), [(17, "udp"), (1, "icmp"), (58, "icmpv6"), (132, "sctp"), (6, "tcp"), (99, "99")]
)
def test_a_record_names_its_protocol(number: int, name: str) -> None:
    key = key_of(number, bytes([100, 96, 0, 2]), bytes([203, 0, 113, 5]), 40000, 53)
    found = msgspec.json.decode("{" + records.of_key(key)[1:] + "}")
    assert found == {
        "protocol": name,
        "source": "100.96.0.2",
        "source_port": 40000,
        "destination": "203.0.113.5",
        "destination_port": 53,
    }


@pytest.mark.parametrize("family", [4, 6])
def test_a_record_reads_back_as_it_was_meant(family: int) -> None:
    source, destination = (
        (ipaddress.ip_address("100.96.0.2"), ipaddress.ip_address("203.0.113.5"))
        if family == 4
        else (ipaddress.ip_address("fd00::2"), ipaddress.ip_address("2001:db8::5"))
    )
    key = source.packed + destination.packed + (40000).to_bytes(2, "big") + (443).to_bytes(2, "big")
    decision = Decision(Outcome.LIFT, "allowed", 'rule says "yes"', ROUTE, Verdict(True, "main/web", "yes", "l4"))
    line = (
        '{"event":"ended","flow_id":"00","time":"2026-01-01T00:00:00.000000000Z",'
        + records.of_worker("node-1", 2, 77)
        + ',"sequence":9'
        + records.of_tunnel(5, CONTEXT)
        + records.of_key(key)
        + records.of_decision(decision)
        + records.of_reason('terminated: "because"\n')
        + records.of_counts(1, 2, 3, 4, 5)
        + records.of_trace(bytes(range(8)), 10, 20)
        + "}"
    )
    assert "\n" not in line
    record = msgspec.json.decode(line, type=AuditRecord)
    assert record == AuditRecord(
        event="ended",
        flow_id="00",
        time="2026-01-01T00:00:00.000000000Z",
        node="node-1",
        worker=2,
        epoch=77,
        sequence=9,
        tenant="acme",
        tenant_id="t-1",
        device='lap"top\\',
        device_id="d-1",
        user="älice",
        virtual_network="default",
        tunnel_id=5,
        protocol="tcp",
        source=str(source),
        source_port=40000,
        destination=str(destination),
        destination_port=443,
        rule="main/web",
        why='rule says "yes"',
        route_id=ROUTE.route_id,
        treatment="l4",
        reason='terminated: "because"\n',
        bytes_up=1,
        bytes_down=2,
        packets_up=3,
        packets_down=4,
        duration_ns=5,
        sampled=True,
        span_id="0001020304050607",
        resolve_ns=10,
        decide_ns=20,
    )


def test_what_is_empty_is_left_out() -> None:
    assert records.of_trace(b"") == ""
    assert records.of_reason("") == ""
    assert records.of_rule("") == ""
    assert records.of_tunnel(3, None) == ',"tunnel_id":3'
