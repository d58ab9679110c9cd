"""100,000 mutants of valid first datagrams: each is admitted as what it says, or refused with a code; some through the real gate."""

from __future__ import annotations

import json
import os
import string
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from falkirk.api.net.v1 import net_pb2
from falkirk.linux import seqpacket
from falkirk.linux.seqpacket import Peer
from falkirk.onramp import context_json, context_protobuf
from falkirk.onramp.admission import Grants
from falkirk.onramp.context import MAX_CONTEXT, Code, ContextRequest
from falkirk.onramp.gate import Gate
from falkirk.onramp.reactor import Reactor
from tests.fuzz.fuzz_context import answer

MUTANTS = 100_000
VALID: tuple[dict[str, Any], ...] = (
    {"v": 1, "tenant": "acme", "device": "laptop"},
    {"v": 1, "tenant": "other", "device": "laptop", "framing": "vnet"},
    {"v": 1, "tenant": "acme", "device": "laptop", "virtual_network": "lab", "attributes": {"site": "north"}},
)
KEYS = (
    "v",
    "tenant",
    "device",
    "virtual_network",
    "framing",
    "transport",
    "packed",
    "attributes",
    "Tenant",
    "extra",
    "",
)
VALUES: tuple[Any, ...] = (
    1, 2, 0, -1, 1.0, True, None, "", "acme", "other", "secret", "ghost", "laptop", "off", "bobs", "lab", "default",
    "raw", "vnet", "socket", "device", "x" * 300, "\ud800", "\0", "ä", [], {}, {"k": "v"}, {"k": 1}, {"k": None}, [1], 10**400,
)  # fmt: skip
TOKENS = (
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\u0000",
    b"\\",
    b"NaN",
    b"1e999",
    b"[" * 50,
    b"\xff",
    b"\xef\xbb\xbf",
    b"null",
)


def mutant(chance: Random) -> bytes:
    """One, of JSON."""
    value = dict(chance.choice(VALID))
    way = chance.random()
    if way < 0.6:
        for _ in range(chance.randrange(1, 3)):
            key = chance.choice(KEYS)
            if chance.random() < 0.25:
                value.pop(key, None)
            else:
                value[key] = chance.choice(VALUES)
        return json.dumps(value).encode()
    data = bytearray(json.dumps(value).encode())
    at = chance.randrange(len(data) + 1)
    if way < 0.7:
        return bytes(data[:at])
    if way < 0.8:
        data[at:at] = chance.choice(TOKENS)
    elif way < 0.9 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif way < 0.95:
        data[at : at + chance.randrange(8)] = chance.choice(string.printable).encode() * chance.randrange(3)
    else:
        data[1:1] = data[1 : chance.randrange(1, len(data))] + b","
    return bytes(data)


def test_a_hundred_thousand_mutants_are_answered() -> None:
    chance = Random(7)
    answers: Counter[str] = Counter()
    for _ in range(MUTANTS):
        answers[answer(context_json.parse, mutant(chance))] += 1
    assert answers.total() == MUTANTS
    # Not all are broken at the first byte: every code that a datagram alone can get is among them.
    alone = set(Code) - {
        Code.UID_FORBIDDEN,
        Code.TOO_LARGE,
        Code.NOT_READY,
        Code.TIMEOUT,
        Code.LIMIT,
        Code.ADOPT_REFUSED,
        Code.GONE,
    }
    assert set(answers) == {"admitted", *map(str, alone)}
    assert answers["admitted"] > MUTANTS // 50


def test_mutants_of_protobuf_are_answered() -> None:
    chance = Random(8)
    fields: dict[str, Any] = {"v": 1, "tenant": "acme", "device": "laptop", "framing": 2, "attributes": {"a": "b"}}
    valid = net_pb2.TunnelRequest(**fields).SerializeToString()
    answers: Counter[str] = Counter()
    for _ in range(20_000):
        data = bytearray(valid)
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        answers[
            answer(context_protobuf.parse, bytes(data[: chance.choice((len(data), len(data), chance.randrange(99)))]))
        ] += 1
    assert answers["admitted"] > 1000
    assert {"INVALID_CONTEXT", "UNKNOWN_KEY", "UNSUPPORTED_VERSION", "UNKNOWN_DEVICE"} <= set(answers)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(KEYS), _json, max_size=6).map(lambda value: {"v": 1, "tenant": "acme", **value}))
def test_any_json_is_answered(value: dict[str, Any]) -> None:
    answer(context_json.parse, json.dumps(value).encode())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_answered(data: bytes) -> None:
    answer(context_json.parse, data)
    answer(context_protobuf.parse, data)


def test_the_gate_answers_each_producer_and_keeps_nothing(tmp_path: Path) -> None:
    """Through the socket: everyone who sent something gets one JSON object or is admitted; then there is nothing to do."""
    chance = Random(9)
    reactor = Reactor()
    listener = seqpacket.listen(tmp_path / "tunnel.sock", 0o600)
    admitted: list[ContextRequest] = []
    codes: Counter[str] = Counter()

    def admit(sock: Any, peer: Peer, request: ContextRequest) -> None:
        admitted.append(request)
        sock.close()

    gate = Gate(
        reactor,
        listener,
        context_json.parse,
        Grants([(os.getuid(), ["acme", "other"])]),
        admit,
        lambda code: codes.update([code]),
        timeout_s=60,
        max_pending=64,
        max_pending_per_uid=64,
    )
    gate.open()
    before = len(list(Path("/proc/self/fd").iterdir()))
    rounds, each = 100, 20
    for _ in range(rounds):
        producers = [seqpacket.connect(tmp_path / "tunnel.sock") for _ in range(each)]
        for sock in producers:
            kind = chance.random()
            if kind < 0.9:
                sock.send(mutant(chance) or b"x")
            elif kind < 0.93:
                sock.send(b"")
            elif kind < 0.96:
                sock.send(b"y" * (MAX_CONTEXT + chance.randrange(1, 5000)))
            else:
                sock.close()
        for _ in range(10):
            reactor._turn(0)
        assert reactor._epoll.poll(0) == []
        assert gate._pending == {}
        for sock in producers:
            if sock.fileno() >= 0:
                data, _ = seqpacket.receive(sock, 65536) or (b"", [])
                assert not data or set(json.loads(data)["error"]) == {"code", "message"}
                sock.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(admitted) + codes.total() == rounds * each
    assert codes[Code.GONE] > 0
    assert codes[Code.TOO_LARGE] > 0
    listener.close()
    reactor.stop()
    reactor.run()
