"""Who may enter, as a table."""

from __future__ import annotations

import json

import msgspec
import pytest

from falkirk.onramp import admission
from falkirk.onramp.admission import Grants, admit, review
from falkirk.onramp.context import Code, ContextRequest, Refusal
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, Tables, TenantRow, UserRow
from falkirk.wire.context import Transport, TunnelContext

LAPTOP = DeviceRow(
    "d",
    "t",
    "laptop",
    "ann",
    ("b", "a"),
    (b"\x64\x60\x00\x02", bytes(15) + b"\x01"),
    posture={"disk": "encrypted"},
    max_flows=5,
)
ROWS: tuple[Row, ...] = (
    TenantRow("t", "acme", 50),
    NetworkRow("n", "t", "default", True),
    NetworkRow("m", "t", "lab"),
    UserRow("u", "t", "ann", ("c", "a")),
    UserRow("w", "t", "bob", disabled=True),
    LAPTOP,
    DeviceRow("o", "t", "off", disabled=True),
    DeviceRow("b", "t", "bobs", "bob"),
    DeviceRow("g", "t", "ghosts", "ghost"),
    DeviceRow("s", "t", "selects", virtual_network="lab"),
    TenantRow("bare", "bare"),
    DeviceRow("x", "bare", "lost"),
)


def tables(*changed: Row, removed: tuple[str, ...] = ()) -> Tables:
    made = Tables()
    made.apply(ROWS)
    made.apply(changed, removed)
    return made


def test_the_context_of_an_admitted_device() -> None:
    found = admit(tables(), ContextRequest("acme", "laptop", attributes={"k": "v"}))
    assert not found.pinned
    assert found.context == TunnelContext(
        tenant_id="t",
        tenant="acme",
        device_id="d",
        device="laptop",
        virtual_network_id="n",
        virtual_network="default",
        addresses=LAPTOP.addresses,
        user_id="u",
        user="ann",
        groups=("a", "b", "c"),
        posture={"disk": "encrypted"},
        attributes={"k": "v"},
        device_max_flows=5,
        tenant_max_flows=50,
    )


@pytest.mark.parametrize(
    ("device", "asked", "given"),
    [("laptop", "", "default"), ("laptop", "lab", "lab"), ("selects", "", "lab"), ("selects", "default", "default")],
)
def test_the_virtual_network_is_the_asked_the_selected_or_the_default_one(device: str, asked: str, given: str) -> None:
    found = admit(tables(), ContextRequest("acme", device, asked))
    assert (found.context.virtual_network, found.pinned) == (given, bool(asked))


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ContextRequest("other", "laptop"), Code.UNKNOWN_TENANT),
        (ContextRequest("acme", "toaster"), Code.UNKNOWN_DEVICE),
        (ContextRequest("bare", "laptop"), Code.UNKNOWN_DEVICE),
        (ContextRequest("acme", "off"), Code.DEVICE_DISABLED),
        (ContextRequest("acme", "bobs"), Code.USER_DISABLED),
        (ContextRequest("acme", "ghosts"), Code.USER_DISABLED),
        (ContextRequest("acme", "laptop", "moon"), Code.UNKNOWN_VIRTUAL_NETWORK),
        (ContextRequest("bare", "lost"), Code.UNKNOWN_VIRTUAL_NETWORK),
    ],
)
def test_refusals(request_: ContextRequest, code: Code) -> None:
    with pytest.raises(Refusal) as caught:
        admit(tables(), request_)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("uid", "tenant", "code"),
    [
        (0, "acme", None),
        (0, "nobody", None),
        (1, "acme", None),
        (1, "beta", None),
        (1, "other", Code.TENANT_FORBIDDEN),
        (1, "*", Code.TENANT_FORBIDDEN),
        (2, "acme", Code.UID_FORBIDDEN),
    ],
)
def test_grants(uid: int, tenant: str, code: Code | None) -> None:
    grants = Grants([(0, ["*"]), (1, ["acme"]), (1, ["beta"])])
    assert grants.knows(uid) == (uid != 2)
    if code is None:
        grants.check(uid, tenant)
        return
    with pytest.raises(Refusal) as caught:
        grants.check(uid, tenant)
    assert caught.value.code is code


def test_a_device_is_handed_over_by_leave_only() -> None:
    grants = Grants([(0, ["*"]), (1, ["*"])], devices=[0])
    grants.check(0, "acme", Transport.DEVICE)
    grants.check(1, "acme", Transport.SOCKET)
    with pytest.raises(Refusal) as caught:
        grants.check(1, "acme", Transport.DEVICE)
    assert caught.value.code == Code.TRANSPORT_FORBIDDEN


@pytest.mark.parametrize(
    ("changed", "removed", "reason"),
    [
        ((), (), ""),
        ((UserRow("u", "t", "ann", ("a", "c")),), (), ""),
        ((), ("t",), "tenant_removed"),
        ((), ("d",), "device_removed"),
        ((), ("n",), "virtual_network_removed"),
        ((msgspec.structs.replace(LAPTOP, tenant_id="bare"),), (), "device_removed"),
        ((msgspec.structs.replace(LAPTOP, disabled=True),), (), "device_disabled"),
        ((UserRow("u", "t", "ann", ("a", "c"), disabled=True),), (), "user_disabled"),
        ((msgspec.structs.replace(LAPTOP, user="bob"),), (), "user_disabled"),
        ((msgspec.structs.replace(LAPTOP, addresses=()),), (), "context_changed"),
        ((msgspec.structs.replace(LAPTOP, virtual_network="lab"),), (), "context_changed"),
        ((NetworkRow("n", "t", "default"), NetworkRow("m", "t", "lab", True)), (), "context_changed"),
    ],
)
def test_reviews(changed: tuple[Row, ...], removed: tuple[str, ...], reason: str) -> None:
    admitted = admit(tables(), ContextRequest("acme", "laptop"))
    assert review(tables(*changed, removed=removed), admitted) == (reason or admitted)


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        (TenantRow("t", "renamed", 1), {"tenant": "renamed", "tenant_max_flows": 1}),
        (msgspec.structs.replace(LAPTOP, name="renamed", max_flows=1), {"device": "renamed", "device_max_flows": 1}),
        (NetworkRow("n", "t", "renamed", True), {"virtual_network": "renamed"}),
        (UserRow("u", "t", "ann", ("a",)), {"groups": ("a", "b")}),
        (msgspec.structs.replace(LAPTOP, user=""), {"user": "", "user_id": "", "groups": ("a", "b")}),
        (msgspec.structs.replace(LAPTOP, posture={}), {"posture": {}}),
    ],
    ids=["tenant", "device", "network", "groups", "user", "posture"],
)
def test_what_changes_under_an_open_tunnel(changed: Row, fields: dict[str, object]) -> None:
    admitted = admit(tables(), ContextRequest("acme", "laptop"))
    found = review(tables(changed), admitted)
    assert isinstance(found, admission.Admission)
    assert found.context == msgspec.structs.replace(admitted.context, **fields)
    assert not found.pinned


def test_what_the_producer_said_stays() -> None:
    admitted = admit(tables(), ContextRequest("acme", "laptop", attributes={"k": "v"}, packed=True))
    assert review(tables(), admitted) is admitted
    found = review(tables(msgspec.structs.replace(LAPTOP, posture={})), admitted)
    assert isinstance(found, admission.Admission)
    assert (found.context.packed, found.context.attributes) == (True, {"k": "v"})


def test_a_pinned_network_outlives_selections_but_not_itself() -> None:
    admitted = admit(tables(), ContextRequest("acme", "laptop", "lab"))
    assert review(tables(msgspec.structs.replace(LAPTOP, virtual_network="default")), admitted) is admitted
    assert review(tables(removed=("m",)), admitted) == "virtual_network_removed"


@pytest.mark.parametrize(("asked", "pinned"), [("", False), ("default", False), ("lab", True)])
def test_a_resumed_tunnel_is_pinned_where_it_must_have_been(asked: str, pinned: bool) -> None:
    context = admit(tables(), ContextRequest("acme", "laptop", asked)).context
    assert admission.resumed(tables(), context).pinned is pinned
    assert review(Tables(), admission.resumed(Tables(), context)) == "tenant_removed"


def test_the_greeting() -> None:
    context = admit(tables(), ContextRequest("acme", "laptop")).context
    assert json.loads(admission.greeting(7, context, 1400, "raw")) == {
        "admitted": {"tunnel_id": 7, "addresses": ["100.96.0.2", "::1"], "mtu": 1400, "framing": "raw"}
    }
