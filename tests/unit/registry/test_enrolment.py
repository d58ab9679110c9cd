"""Enrolment as transcripts on a store: people, what goes with a removed resource, and what an owner sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from falkirk.api.registry.v1 import node_service_pb2
from falkirk.api.registry.v1.device_service_pb2 import (
    DeviceServiceDeleteRequest,
    DeviceServiceGetRequest,
    DeviceServiceListRequest,
)
from falkirk.api.registry.v1.device_token_service_pb2 import DeviceToken
from falkirk.decide.callers import Caller, Role
from falkirk.registry import enrolment, tokens, tunnel
from falkirk.registry.device_service import DeviceService, person_of, private_key
from falkirk.registry.engine import Surroundings
from falkirk.registry.enrolment import Machine, Person
from falkirk.registry.node_service import NodeService
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.service import Desk
from falkirk.registry.settings import OidcIssuer
from falkirk.registry.watch import Feed
from falkirk.runtime import callers, oidc
from falkirk.runtime.errors import FalkirkError
from falkirk.wireguard import proof
from tests.unit.registry.conftest import Ledger

ISSUER = "https://issuer.example"


def key(number: int) -> str:
    """A public key."""
    return proof.text_of(proof.public_of(bytes([number] * 32)))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(tmp_path / "db")
    made.create("tenant", "acme")
    yield made
    made.store.close()


def person(subject: str, **values: Any) -> Person:
    """Somebody whom the issuer signed in to acme."""
    standard: dict[str, Any] = {"username": subject, "email": "", "groups": None}
    return Person(tenant="acme", issuer=ISSUER, subject=subject, **{**standard, **values})


def sign_in(ledger: Ledger, who: Person) -> Any:
    """The user that somebody is."""
    return ledger.write(lambda work: enrolment.sign_in(work, who))


def enrol(ledger: Ledger, who: Person, number: int, name: str = "laptop") -> Any:
    """A device of somebody."""
    return ledger.write(lambda work: enrolment.by_person(work, who, Machine(name, key(number), {})))


def counted(ledger: Ledger, table: str) -> int:
    """Rows of a table."""
    return int(ledger.store.read(lambda c: c.execute(f"SELECT count(*) FROM {table}").fetchone()[0]).result(10))


def test_a_user_made_by_hand_is_taken_by_the_first_who_proves_the_mail_address(ledger: Ledger) -> None:
    made = ledger.create("user", "ann", "acme", email="Ann@Example.com", groups=["eng"])
    first = sign_in(ledger, person("s1", email="ann@example.com"))
    assert (first.metadata.id, list(first.groups)) == (made.metadata.id, ["eng"])
    second = sign_in(ledger, person("s2", username="ann", email="ann@example.com"))
    assert second.metadata.name == "ann-2", "the address changed hands at the issuer; what is hers stays hers"
    assert sign_in(ledger, person("s1", username="renamed")).metadata.id == made.metadata.id


def test_a_mail_address_that_nobody_vouches_for_opens_nothing(ledger: Ledger) -> None:
    made = ledger.create("user", "ann", "acme", email="ann@example.com")
    assert sign_in(ledger, person("mallory", username="ann")).metadata.id != made.metadata.id


def test_a_sign_in_without_a_change_writes_nothing(ledger: Ledger) -> None:
    sign_in(ledger, person("s1", groups=("a", "b")))
    revision = ledger.store.revision
    sign_in(ledger, person("s1", groups=("a", "b")))
    assert ledger.store.revision == revision


def test_another_key_of_the_same_device_waits_for_approval_again(ledger: Ledger) -> None:
    first = enrol(ledger, person("s1", needs_approval=True), 1)
    assert ledger.write(lambda work: enrolment.approve(work, "acme", "laptop")).pending is False
    assert enrol(ledger, person("s1", needs_approval=True), 1).pending is False, "the same key was approved"
    again = enrol(ledger, person("s1", needs_approval=True), 2)
    assert (again.metadata.id, again.pending) == (first.metadata.id, True)


def test_a_disabled_device_stays_disabled_however_often_it_enrols(ledger: Ledger) -> None:
    device = enrol(ledger, person("s1"), 1)
    device.disabled = True
    ledger.update("device", device)
    assert enrol(ledger, person("s1"), 2).disabled


def test_what_goes_with_a_user_a_device_and_a_tenant(ledger: Ledger) -> None:
    ledger.create("user", "ann", "acme")
    _, secret = ledger.write(lambda work: tokens.create(work, DeviceToken(tenant="acme", user="ann", reusable=True)))
    ledger.write(lambda work: enrolment.by_token(work, secret, Machine("one", key(1), {})))
    assert [counted(ledger, table) for table in ("enrolment_token", "enrolled")] == [1, 1]
    ledger.delete("device", "one", "acme")
    assert counted(ledger, "enrolled") == 0
    ledger.delete("user", "ann", "acme")
    assert counted(ledger, "enrolment_token") == 0, "her token would let devices in that nobody owns"
    sign_in(ledger, person("s1"))
    ledger.delete("user", "s1", "acme")
    assert counted(ledger, "subject") == 0
    ledger.write(lambda work: tokens.create(work, DeviceToken(tenant="acme")))
    ledger.delete("tenant", "acme")
    assert counted(ledger, "enrolment_token") == 0


def test_a_renamed_owner_s_token_still_is_the_owner_s(ledger: Ledger) -> None:
    user = ledger.create("user", "ann", "acme")
    _, secret = ledger.write(lambda work: tokens.create(work, DeviceToken(tenant="acme", user="ann")))
    user.metadata.name = "anna"
    ledger.update("user", user)
    assert ledger.write(lambda work: enrolment.by_token(work, secret, Machine("one", key(1), {}))).user == "anna"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"id": "x"}, "id"),
        ({"uses": 1}, "uses"),
        ({"tenant": ""}, "tenant"),
        ({"groups": ["a", "a"]}, "groups[1]"),
        ({"tags": {"": "x"}}, "tags[]"),
        ({"comment": "\x07"}, "comment"),
        ({"device_lifetime_s": 1 << 40}, "device_lifetime_s"),
        ({"expire_time": {"seconds": 1}}, "expire_time"),
        ({"expire_time": {"seconds": 200_000_000_000}}, "expire_time"),
    ],
    ids=str,
)
def test_tokens_that_are_refused(ledger: Ledger, values: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as caught:
        ledger.write(lambda work: tokens.create(work, DeviceToken(**{"tenant": "acme", **values})))
    assert caught.value.about["field"] == field


def test_prefixes_within_others_are_left_out() -> None:
    given = ["10.1.2.0/24", "fd00::/64", "10.1.0.0/16", "10.0.0.0/16", "fd00::/64"]
    assert tunnel.prefixes(given) == ["10.0.0.0/15", "fd00::/64"]
    assert tunnel.prefixes(["0.0.0.0/0", "10.0.0.0/8", "::/0", "fd00::/64"]) == ["0.0.0.0/0", "::/0"]


def test_the_tunnel_follows_the_selected_network(ledger: Ledger) -> None:
    ledger.create("virtual_network", "lab", "acme")
    ledger.create("route", "r1", "acme", prefix="10.1.0.0/16", target={"blackhole": {}})
    ledger.create("route", "r2", "acme", prefix="10.2.0.0/16", target={"blackhole": {}}, virtual_network="lab")
    for name, endpoint in (("n1", "h1:1"), ("n2", "h2:1"), ("deaf", "")):
        given = {"public_key": key(40 + len(name + endpoint) + ord(name[-1]))}
        ledger.create("node", name, **given, endpoints=[endpoint] if endpoint else [])
    for number, network in enumerate(("", "lab")):
        device = ledger.create("device", f"d{number}", "acme", virtual_network=network)
        read = partial(tunnel.describe, device=device, registry_key="k", alive=lambda node: node == "n2")
        found = ledger.store.read(read).result(10)
        assert [peer.node for peer in found.peers] == ["n2", "n1"], "the one that reports comes first"
        routed = [prefix for prefix in found.peers[0].allowed_prefixes if prefix.startswith("10.")]
        assert routed == [f"10.{number + 1}.0.0/16"]


class Services:
    """The services on a store, as a caller over TCP reaches them."""

    def __init__(self, ledger: Ledger) -> None:
        feed = Feed(ledger.store, 8)
        ledger.store.on_commit = feed.publish
        surroundings = Surroundings(lambda: 1, lambda: "00000000-0000-4000-8000-00000000ffff", bytes)
        desk = Desk(ledger.store, feed, surroundings)
        self.device = DeviceService(desk, bytes([8] * 32), (), oidc.Verifier(()), lambda node: False)
        self.node = NodeService(desk)

    @staticmethod
    def call(caller: Caller | None, method: Any, request: Any) -> Any:
        """One call as somebody; the reason where it is refused."""

        async def inside() -> Any:
            callers.current.set(caller)
            try:
                return await method(request, None)
            except FalkirkError as error:
                return error.reason

        return asyncio.run(inside())


def test_an_owner_sees_and_removes_its_own_devices_only(ledger: Ledger) -> None:
    mine, other = enrol(ledger, person("ann"), 1, "mine"), enrol(ledger, person("bob"), 2, "other")
    services = Services(ledger)
    ann = Caller("m" * 32, Role.OWNER, "id", "ann", mine.metadata.tenant_id, "acme")
    listing = DeviceServiceListRequest(tenant="acme")
    assert [item.metadata.name for item in services.call(ann, services.device.List, listing).devices] == ["mine"]
    assert len(services.call(None, services.device.List, listing).devices) == 2
    for method, request in (
        (services.device.Get, DeviceServiceGetRequest),
        (services.device.Delete, DeviceServiceDeleteRequest),
    ):
        asked = request(tenant="acme", name=other.metadata.name)
        assert services.call(ann, method, asked) == "NOT_FOUND"
        nobody = request(tenant="acme", name="nobody")
        assert services.call(ann, method, nobody) == "NOT_FOUND", "one that isn't there is refused in the same way"
    assert ledger.get("device", "other", "acme") is not None
    services.call(ann, services.device.Delete, DeviceServiceDeleteRequest(tenant="acme", name="mine"))
    assert ledger.get("device", "mine", "acme") is None


def test_a_node_speaks_for_itself_only(ledger: Ledger) -> None:
    services = Services(ledger)
    request = node_service_pb2.NodeServiceAnnounceRequest(node={"metadata": {"name": "n1"}})
    assert services.call(Caller("m" * 32, Role.NODE, "n2", "n2"), services.node.Announce, request) == "NODE_FORBIDDEN"
    done = services.call(Caller("m" * 32, Role.NODE, "n1", "n1"), services.node.Announce, request)
    assert done.node.metadata.name == "n1"


def test_the_registry_s_key_is_made_once_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    made = private_key(path)
    assert private_key(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("damaged")
    with pytest.raises(ValueError, match=r"device\.key"):
        private_key(path)
    assert path.read_text() == "damaged", "it is left for whoever can mend it"


def test_an_identity_is_a_person_by_the_settings() -> None:
    issuer = OidcIssuer(issuer=ISSUER, audience="app", tenant="acme", groups_claim="roles", required_groups=("staff",))
    claims = {"email": "ann@example.com", "roles": ["staff", "staff", 7, ""], "preferred_username": "Ann"}
    identity = oidc.Identity(ISSUER, "s1", ("app",), claims)
    found = person_of([issuer], identity, "")
    assert (found.email, found.groups, found.username) == ("", ("staff",), "Ann"), "the address isn't verified"
    verified = oidc.Identity(ISSUER, "s1", ("app",), {**claims, "email_verified": True})
    assert person_of([issuer], verified, "acme").email == "ann@example.com"
    for given, tenant in ((oidc.Identity(ISSUER, "s1", ("other",), claims), ""), (identity, "elsewhere")):
        with pytest.raises(Refused) as caught:
            person_of([issuer], given, tenant)
        assert caught.value.reason == Reason.SIGN_IN_REFUSED
