"""What producers do wrong: each is refused with its code and counted, and the worker goes on."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falkirk.linux import seqpacket
from falkirk.onramp.control import Close
from falkirk.wire.handover import TunnelClosed
from tests.process.onramp_rig import CONTEXT, FlowFake, Rig, datagram, eventually, rig

Parts = tuple[Rig, list[FlowFake]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """One worker for all: whatever one case leaves behind, the next one meets."""
    with rig(tmp_path_factory.mktemp("run")) as made:
        yield made


def with_(**more: Any) -> bytes:
    return json.dumps(CONTEXT | more).encode()


FIRST_DATAGRAMS = {
    "too_large": (with_(attributes={"k": "x" * 16384}), "TOO_LARGE"),
    "one_byte_too_large": (with_().ljust(16385), "TOO_LARGE"),
    "not_json": (b"hello", "INVALID_CONTEXT"),
    "an_ip_packet": (b"\x45" + bytes(19), "INVALID_CONTEXT"),
    "cut": (with_()[:-1], "INVALID_CONTEXT"),
    "trailing": (with_() + b"{}", "INVALID_CONTEXT"),
    "list": (b"[]", "INVALID_CONTEXT"),
    "nan": (b'{"v":NaN}', "INVALID_CONTEXT"),
    "infinity": (b'{"v":-Infinity}', "INVALID_CONTEXT"),
    "huge_number": (b'{"v":' + b"9" * 10000 + b"}", "INVALID_CONTEXT"),
    "deep": (b"[" * 16384, "INVALID_CONTEXT"),
    "deep_inside": (b'{"attributes":' + b'{"a":' * 3000, "INVALID_CONTEXT"),
    "duplicate": (b'{"v":1,"tenant":"acme","tenant":"other","device":"laptop"}', "INVALID_CONTEXT"),
    "duplicate_attribute": (with_()[:-1] + b',"attributes":{"a":"1","a":"2"}}', "INVALID_CONTEXT"),
    "unknown_key": (with_(color="red"), "UNKNOWN_KEY"),
    "v_2": (with_(v=2), "UNSUPPORTED_VERSION"),
    "v_2_and_unknown_key": (with_(v=2, color="red"), "UNSUPPORTED_VERSION"),
    "v_true": (with_(v=True), "INVALID_CONTEXT"),
    "v_text": (with_(v="1"), "INVALID_CONTEXT"),
    "v_float": (with_(v=1.0), "INVALID_CONTEXT"),
    "v_missing": (b'{"tenant":"acme","device":"laptop"}', "INVALID_CONTEXT"),
    "tenant_missing": (b'{"v":1,"device":"laptop"}', "INVALID_CONTEXT"),
    "tenant_null": (with_(tenant=None), "INVALID_CONTEXT"),
    "tenant_empty": (with_(tenant=""), "INVALID_CONTEXT"),
    "device_number": (with_(device=1), "INVALID_CONTEXT"),
    "framing": (with_(framing="jumbo"), "INVALID_CONTEXT"),
    "attributes_list": (with_(attributes=[]), "INVALID_CONTEXT"),
    "attribute_number": (with_(attributes={"a": 1}), "INVALID_CONTEXT"),
    "attribute_object": (with_(attributes={"a": {"b": "c"}}), "INVALID_CONTEXT"),
    "invalid_utf8": (b'{"v":1,"tenant":"\xff","device":"laptop"}', "INVALID_CONTEXT"),
    "utf8_mark": (b"\xef\xbb\xbf" + with_(), "INVALID_CONTEXT"),
    "utf16": (with_().decode().encode("utf-16"), "INVALID_CONTEXT"),
    "lone_surrogate": (with_(attributes={"a": "\ud800"}), "INVALID_CONTEXT"),
    "lone_surrogate_name": (with_(device="\udfff"), "INVALID_CONTEXT"),
    "unknown_tenant": (with_(tenant="nobody"), "UNKNOWN_TENANT"),
    "unknown_device": (with_(device="toaster"), "UNKNOWN_DEVICE"),
    "device_of_another_tenant": (with_(tenant="other", device="off"), "UNKNOWN_DEVICE"),
    "device_disabled": (with_(device="off"), "DEVICE_DISABLED"),
    "unknown_virtual_network": (with_(virtual_network="moon"), "UNKNOWN_VIRTUAL_NETWORK"),
}


@pytest.mark.parametrize(("data", "code"), FIRST_DATAGRAMS.values(), ids=FIRST_DATAGRAMS.keys())
def test_first_datagram_is_refused_with_its_code(parts: Parts, data: bytes, code: str) -> None:
    onramp, _ = parts
    counted, descriptors = onramp.counters.read(code), onramp.descriptors()
    producer = onramp.producer(data)
    assert onramp.refusal(producer) == code
    producer.close()
    assert onramp.counters.read(code) == counted + 1
    eventually(lambda: onramp.descriptors() <= descriptors)


def test_empty_first_datagram(parts: Parts) -> None:
    onramp, _ = parts
    assert onramp.refusal(onramp.producer(b"")) == "INVALID_CONTEXT"


def test_descriptors_beside_the_context_are_closed(parts: Parts) -> None:
    onramp, _ = parts
    before = onramp.descriptors()
    for count in (1, 16, 100):
        reader, writer = os.pipe()
        producer = onramp.connect()
        assert seqpacket.send(producer, with_(), [writer] * count)
        os.close(writer)
        assert onramp.refusal(producer) == "INVALID_CONTEXT"
        assert os.read(reader, 1) == b""  # the last writer is closed
        os.close(reader)
        producer.close()
    eventually(lambda: onramp.descriptors() <= before)


def test_answer_reaches_a_producer_that_goes_on_sending(parts: Parts) -> None:
    onramp, _ = parts
    producer = onramp.connect()
    onramp.process.send_signal(signal.SIGSTOP)  # so that all three are there when the first is judged
    for data in (b"not a context", b"packet", b"packet"):
        producer.send(data)
    onramp.process.send_signal(signal.SIGCONT)
    assert onramp.refusal(producer) == "INVALID_CONTEXT"


def test_packets_sent_before_the_answer_wait_for_flow(parts: Parts) -> None:
    onramp, (flow,) = parts
    producer = onramp.connect()
    producer.send(with_())
    producer.send(b"early packet")
    message, tunnel = flow.adopt()
    assert b"admitted" in datagram(producer)
    assert datagram(tunnel) == b"early packet"
    onramp.tell(Close(message.tunnel, "done"))
    flow.expect(TunnelClosed)


def test_producer_gone_before_its_context(parts: Parts) -> None:
    onramp, _ = parts
    before = onramp.counters.read("GONE")
    onramp.connect().close()
    eventually(lambda: onramp.counters.read("GONE") == before + 1)


def test_producer_gone_before_its_refusal(parts: Parts) -> None:
    onramp, _ = parts
    before = onramp.counters.read("UNKNOWN_DEVICE")
    onramp.producer(with_(device="toaster")).close()
    eventually(lambda: onramp.counters.read("UNKNOWN_DEVICE") == before + 1)


def test_producer_gone_before_flow_takes_it(parts: Parts) -> None:
    onramp, (flow,) = parts
    before = onramp.counters.read("GONE")
    onramp.producer().close()
    message, tunnel = flow.adopt(take=False)
    assert flow.expect(TunnelClosed) == TunnelClosed(message.tunnel, "producer_closed")
    assert tunnel.recv(100) == b""
    eventually(lambda: onramp.counters.read("GONE") == before + 1)


def test_silent_producer_is_refused_in_time(tmp_path: Path) -> None:
    with rig(tmp_path, context_timeout_ms=50) as (onramp, _):
        assert onramp.refusal(onramp.connect()) == "TIMEOUT"
        assert onramp.counters.read("TIMEOUT") == 1


@pytest.mark.parametrize("limit", ["max_pending", "max_pending_per_uid"])
def test_pending_connections_are_bounded(tmp_path: Path, limit: str) -> None:
    settings: dict[str, Any] = {limit: 5}
    with rig(tmp_path, **settings) as (onramp, (flow,)):
        silent = [onramp.connect() for _ in range(5)]
        assert onramp.refusal(onramp.connect()) == "LIMIT"
        silent.pop().close()
        eventually(lambda: onramp.counters.read("GONE") == 1)
        onramp.opened(flow)
        assert onramp.counters.read("LIMIT") == 1


def test_tunnels_are_bounded(tmp_path: Path) -> None:
    with rig(tmp_path, max_tunnels=3, max_tunnels_per_device=2) as (onramp, (flow,)):
        first, message, _ = onramp.opened(flow)
        kept = [onramp.opened(flow)]
        assert onramp.refusal(onramp.producer()) == "LIMIT"
        kept.append(onramp.opened(flow, CONTEXT | {"tenant": "other"}))
        assert onramp.refusal(onramp.producer(CONTEXT | {"tenant": "other"})) == "LIMIT"
        first.close()
        assert flow.expect(TunnelClosed).tunnel == message.tunnel
        kept.append(onramp.opened(flow))


def test_unknown_uid_is_refused_after_its_first_datagram(tmp_path: Path) -> None:
    with rig(tmp_path, grants=((54321, ("*",)),)) as (onramp, _):
        for data in (with_(), b"not even JSON"):
            assert onramp.refusal(onramp.producer(data)) == "UID_FORBIDDEN"


def test_foreign_tenants_can_not_be_told_from_unknown_ones(tmp_path: Path) -> None:
    with rig(tmp_path, grants=((os.getuid(), ("acme",)),)) as (onramp, (flow,)):
        answers = []
        for tenant in ("other", "third"):
            producer = onramp.producer(with_(tenant=tenant))
            answers.append(json.loads(datagram(producer)) | {"tenant": tenant})
        assert [answer["error"]["code"] for answer in answers] == ["TENANT_FORBIDDEN"] * 2
        assert len({answer["error"]["message"].replace(answer["tenant"], "") for answer in answers}) == 1
        onramp.opened(flow)


def test_before_the_first_update_nobody_is_admitted(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    assert made.refusal(made.producer()) == "NOT_READY"
    made.close()


def test_out_of_descriptors_it_rests_and_goes_on(tmp_path: Path) -> None:
    with rig(tmp_path) as (onramp, (flow,)):
        held = [onramp.opened(flow)[0] for _ in range(3)]
        limits = resource.prlimit(onramp.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(onramp.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        waiting = onramp.producer(with_(device="toaster"))
        assert not select.select([waiting], [], [], 0.15)[0]
        resource.prlimit(onramp.process.pid, resource.RLIMIT_NOFILE, limits)
        assert onramp.refusal(waiting) == "UNKNOWN_DEVICE"
        for producer in held:
            producer.close()
            flow.expect(TunnelClosed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["v", "tenant", "device", "virtual_network", "framing", "attributes", "x"])
MUTATED = st.dictionaries(KEYS, JSON, max_size=4).map(lambda more: json.dumps(CONTEXT | more).encode())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300) | MUTATED)
def test_whatever_is_sent_is_answered(parts: Parts, data: bytes) -> None:
    onramp, (flow,) = parts
    producer = onramp.producer(data)
    assert flow.link is not None
    ready, _, _ = select.select([producer, flow.link], [], [], 10)
    if flow.link in ready:  # the context was good after all
        flow.adopt()[1].close()
        assert b"admitted" in datagram(producer)
        producer.close()
        flow.expect(TunnelClosed)
    else:
        assert b"error" in datagram(producer)
        producer.close()
