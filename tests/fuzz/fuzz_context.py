"""Fuzz target: first datagrams. Every one is admitted or refused with a code, by both parsers, and the answer is one JSON object."""

from __future__ import annotations

import json
import sys
from typing import Any

from falkirk.onramp import context_json, context_protobuf
from falkirk.onramp.admission import Grants, admit, greeting, resumed, review
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.tables import DeviceRow, NetworkRow, Tables, TenantRow, UserRow
from falkirk.wire.handover import Adopt, encode

UID = 1000
TABLES = Tables()
TABLES.apply(
    (
        TenantRow("t", "acme", 50),
        NetworkRow("n", "t", "default", True),
        NetworkRow("m", "t", "lab"),
        UserRow("u", "t", "ann", ("staff",)),
        UserRow("w", "t", "bob", disabled=True),
        DeviceRow(
            "d", "t", "laptop", "ann", ("b",), (b"\x64\x60\x00\x02", bytes(15) + b"\x01"), posture={"disk": "yes"}
        ),
        DeviceRow("o", "t", "off", disabled=True),
        DeviceRow("b", "t", "bobs", "bob"),
        TenantRow("x", "other"),
        NetworkRow("xn", "x", "default", True),
        DeviceRow("xd", "x", "laptop", addresses=(b"\x64\x60\x00\x02",)),
        TenantRow("z", "secret"),
    )
)
GRANTS = Grants([(UID, ["acme", "other", "ghost"])])
ANSWER_LIMIT = 4096


def answer(parse: Any, data: bytes) -> str:
    """What becomes of one datagram: "admitted" or the code of its refusal."""
    try:
        request = parse(data)
        assert isinstance(request, ContextRequest)
        GRANTS.check(UID, request.tenant, request.transport)
        admission = admit(TABLES, request)
    except Refusal as refusal:
        said = refusal.answer()
        told = json.loads(said)["error"]
        assert told["code"] in list(Code)
        assert told["message"]
        # A producer's own words don't make our answers long.
        assert len(said) < ANSWER_LIMIT
        return str(refusal.code)
    context = admission.context
    assert context.tenant in ("acme", "other")
    assert context.tenant == request.tenant
    assert context.device == request.device == "laptop"
    assert review(TABLES, admission) is admission
    assert resumed(TABLES, context).context == context
    assert json.loads(greeting(1, context, 1500, request.framing))["admitted"]["framing"] in ("raw", "vnet")
    # It can be handed over.
    encode([Adopt(1, context, request.framing, 1500)])
    return "admitted"


def one(data: bytes) -> None:
    """First byte: which parser; the rest is the datagram."""
    if data:
        answer(context_json.parse if data[0] & 1 else context_protobuf.parse, data[1:])


if __name__ == "__main__":
    from tests.fuzz.coverage import script

    sys.exit(script("context", sys.argv[1:]))
