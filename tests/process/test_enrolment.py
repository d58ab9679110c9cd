"""Enrolment against a real registry and a real OIDC issuer, each a process: tokens, sign-ins, proofs, presence."""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from falkirk.api.registry.v1 import (
    device_service_pb2,
    device_token_service_pb2,
    node_service_pb2,
    presence_service_pb2,
    registry_service_pb2,
    tenant_service_pb2,
    user_service_pb2,
)
from falkirk.wireguard import proof
from tests.process import oidc_issuer
from tests.process.registry_process import DEADLINE_S, Registry, Stubs, refused, running

AUDIENCE = "falkirk-tests"


class World(NamedTuple):
    """What the tests talk to."""

    registry: Registry
    stubs: Stubs
    issuer: oidc_issuer.Running


class Key(NamedTuple):
    """A device's key pair."""

    private: bytes

    @property
    def public(self) -> str:
        return proof.text_of(proof.public_of(self.private))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One registry for the module; each test has a tenant of its own."""
    with oidc_issuer.running() as issuer:
        settings = f"""registry:
  oidc:
    - {{issuer: "{issuer.url}", audience: {AUDIENCE}, tenant: signed, groups_claim: groups, required_groups: [staff]}}
    - {{issuer: "{issuer.url}", audience: {AUDIENCE}, tenant: careful, needs_approval: true, device_lifetime_s: 3600}}
"""
        with running(tmp_path_factory.mktemp("r"), settings) as registry:
            world = World(registry, registry.stubs(), issuer)
            for name in ("signed", "careful"):
                make_tenant(world, name)
            node = {
                "metadata": {"name": "n1"},
                "public_key": Key(bytes([9] * 32)).public,
                "endpoints": ["192.0.2.1:51820"],
            }
            world.stubs.node.Announce(node_service_pb2.NodeServiceAnnounceRequest(node=node), timeout=DEADLINE_S)
            yield world


NUMBERS = itertools.count(1)


def make_tenant(world: World, name: str = "") -> str:
    """A new tenant's name."""
    name = name or f"t{next(NUMBERS)}"
    request = tenant_service_pb2.TenantServiceCreateRequest(tenant={"metadata": {"name": name}})
    world.stubs.tenant.Create(request, timeout=DEADLINE_S)
    return name


def make_token(world: World, tenant: str, **values: Any) -> device_token_service_pb2.DeviceTokenServiceCreateResponse:
    """A new enrolment token."""
    request = device_token_service_pb2.DeviceTokenServiceCreateRequest(token={"tenant": tenant, **values})
    answer: device_token_service_pb2.DeviceTokenServiceCreateResponse = world.stubs.token.Create(
        request, timeout=DEADLINE_S
    )
    return answer


def enroll(world: World, key: Key | None = None, **values: Any) -> device_service_pb2.DeviceServiceEnrollResponse:
    """Enrol a machine."""
    public_key = values.pop("public_key", (key or Key(os.urandom(32))).public)
    request = device_service_pb2.DeviceServiceEnrollRequest(public_key=public_key, **values)
    answer: device_service_pb2.DeviceServiceEnrollResponse = world.stubs.device.Enroll(request, timeout=DEADLINE_S)
    return answer


def devices(world: World, tenant: str) -> list[str]:
    """Names of a tenant's devices."""
    request = device_service_pb2.DeviceServiceListRequest(tenant=tenant)
    return [item.metadata.name for item in world.stubs.device.List(request, timeout=DEADLINE_S).devices]


def claims(subject: str, **more: Any) -> dict[str, Any]:
    """What an ID token says, good for 5 minutes."""
    now = int(time.time())
    standard = {"sub": subject, "aud": AUDIENCE, "iat": now, "exp": now + 300, "groups": ["staff"]}
    return {**standard, "preferred_username": subject, **more}


def test_a_token_gives_what_its_maker_said_and_works_once(world: World) -> None:
    tenant = make_tenant(world)
    user = {"metadata": {"name": "ann", "tenant": tenant}}
    world.stubs.user.Create(user_service_pb2.UserServiceCreateRequest(user=user), timeout=DEADLINE_S)
    made = make_token(world, tenant, user="ann", groups=["eng"], tags={"site": "berlin"}, device_lifetime_s=3600)
    key = Key(os.urandom(32))
    answer = enroll(world, key, token=made.secret, name="laptop", posture={"os": "linux"})
    device = answer.device
    assert (device.user, list(device.groups), device.metadata.labels["site"]) == ("ann", ["eng"], "berlin")
    assert (device.public_key, device.posture["os"], device.pending) == (key.public, "linux", False)
    assert 3500 < device.expire_time.seconds - time.time() < 3700
    tunnel = answer.tunnel
    assert list(tunnel.addresses) == list(device.addresses)
    assert (tunnel.mtu, list(tunnel.search_domains)) == (1420, [f"{tenant}.falkirk"])
    assert [(peer.node, list(peer.endpoints)) for peer in tunnel.peers] == [("n1", ["192.0.2.1:51820"])]
    assert "100.96.0.0/12" in tunnel.peers[0].allowed_prefixes
    again = enroll(world, key, token=made.secret, name="laptop")
    assert again.device == device, "an answer that was lost is given again"
    error = refused(lambda: enroll(world, token=made.secret, name="other"))
    assert (error.code.name, error.reason) == ("UNAUTHENTICATED", "TOKEN_USED")
    assert devices(world, tenant) == ["laptop"]


def test_a_reusable_token_names_devices_after_their_hosts(world: World) -> None:
    tenant = make_tenant(world)
    made = make_token(world, tenant, reusable=True, needs_approval=True)
    for _ in range(2):
        device = enroll(world, token=made.secret, posture={"hostname": "Build_Box.example.com"}).device
        assert device.pending
    enroll(world, token=made.secret)
    assert devices(world, tenant) == ["build-box-example-com", "build-box-example-com-2", "device"]
    request = device_service_pb2.DeviceServiceApproveRequest(tenant=tenant, name="device")
    assert not world.stubs.device.Approve(request, timeout=DEADLINE_S).device.pending
    listed = world.stubs.token.List(
        device_token_service_pb2.DeviceTokenServiceListRequest(tenant=tenant), timeout=DEADLINE_S
    )
    assert [token.uses for token in listed.tokens] == [3]
    assert made.secret not in str(listed)


@pytest.mark.parametrize(
    ("secret", "reason"), [("fkt_nothing", "TOKEN_UNKNOWN"), ("", "TOKEN_UNKNOWN"), ("x" * 100_000, "TOKEN_UNKNOWN")]
)
def test_what_isn_t_a_token_is_refused(world: World, secret: str, reason: str) -> None:
    assert refused(lambda: enroll(world, token=secret)).reason == reason


def test_a_revoked_and_an_ended_token_are_refused(world: World) -> None:
    tenant = make_tenant(world)
    first = make_token(world, tenant)
    revoke = device_token_service_pb2.DeviceTokenServiceRevokeRequest(tenant=tenant, id=first.token.id[:8])
    world.stubs.token.Revoke(revoke, timeout=DEADLINE_S)
    assert refused(lambda: enroll(world, token=first.secret)).reason == "TOKEN_UNKNOWN"
    second = make_token(world, tenant, expire_time={"seconds": int(time.time()) + 3})
    deadline = time.monotonic() + DEADLINE_S
    while time.time() < second.token.expire_time.seconds and time.monotonic() < deadline:
        assert devices(world, tenant) == []
    assert refused(lambda: enroll(world, token=second.secret)).reason == "TOKEN_EXPIRED"
    other = make_tenant(world)
    foreign = device_token_service_pb2.DeviceTokenServiceRevokeRequest(tenant=other, id=second.token.id)
    assert refused(lambda: world.stubs.token.Revoke(foreign, timeout=DEADLINE_S)).reason == "NOT_FOUND"


def test_a_token_lies_in_no_file_and_no_watch_in_the_clear(world: World) -> None:
    tenant = make_tenant(world)
    made = make_token(world, tenant)
    enroll(world, token=made.secret, name="laptop")
    for path in world.registry.data_dir.rglob("*"):
        if path.is_file():
            assert made.secret.encode() not in path.read_bytes(), path
    key = world.registry.data_dir / "registry" / "device.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"public_key": ""}, "public_key"),
        ({"public_key": "AAAA"}, "public_key"),
        ({"name": "No Name"}, "name"),
        ({"posture": {"": "x"}}, "posture[]"),
    ],
    ids=str,
)
def test_a_refused_machine_leaves_the_token_unused(world: World, values: dict[str, Any], field: str) -> None:
    tenant = make_tenant(world)
    made = make_token(world, tenant)
    assert refused(lambda: enroll(world, token=made.secret, **values)).metadata["field"] == field
    assert devices(world, tenant) == []
    enroll(world, token=made.secret)


def test_a_key_is_one_device_s_in_the_whole_mesh(world: World) -> None:
    key = Key(os.urandom(32))
    enroll(world, key, token=make_token(world, make_tenant(world)).secret)
    error = refused(lambda: enroll(world, key, token=make_token(world, make_tenant(world)).secret))
    assert (error.code.name, error.reason) == ("ALREADY_EXISTS", "KEY_TAKEN")
    node = Key(bytes([9] * 32))
    error = refused(lambda: enroll(world, node, token=make_token(world, make_tenant(world)).secret))
    assert error.reason == "KEY_TAKEN", "nor is it a node's"


def test_a_device_speaks_for_itself_by_its_key(world: World) -> None:
    tenant = make_tenant(world)
    old, new = Key(os.urandom(32)), Key(os.urandom(32))
    answer = enroll(world, old, token=make_token(world, tenant).secret, name="laptop")
    registry_key = proof.key_of(answer.tunnel.registry_key)
    times = itertools.count(time.time_ns())

    def word(key: Key, purpose: str, said: bytes = b"", at: int = 0) -> dict[str, Any]:
        at = at or next(times)
        mac = proof.make(key.private, registry_key, purpose, at, said)
        return {"device_id": answer.device.metadata.id, "time_ns": at, "mac": mac}

    def describe(word: dict[str, Any]) -> Any:
        return world.stubs.device.Describe(
            device_service_pb2.DeviceServiceDescribeRequest(proof=word), timeout=DEADLINE_S
        )

    first = word(old, proof.DESCRIBE)
    assert describe(first).tunnel == answer.tunnel
    assert "used before" in refused(lambda: describe(first)).message
    assert "5 minutes" in refused(lambda: describe(word(old, proof.DESCRIBE, at=time.time_ns() - 301 * 10**9))).message
    assert refused(lambda: describe(word(new, proof.DESCRIBE))).reason == "PROOF_REFUSED"
    assert refused(lambda: describe({**word(old, proof.DESCRIBE), "device_id": "nobody"})).reason == "PROOF_REFUSED"

    facts = {"os": "linux", "disk_encryption": "on"}
    report = device_service_pb2.DeviceServiceReportPostureRequest(
        proof=word(old, proof.POSTURE, proof.posture(facts)), posture=facts
    )
    assert dict(world.stubs.device.ReportPosture(report, timeout=DEADLINE_S).device.posture) == facts
    report.proof.CopyFrom(device_service_pb2.DeviceProof(**word(old, proof.POSTURE, proof.posture(facts))))
    report.posture["os"] = "another"
    assert refused(lambda: world.stubs.device.ReportPosture(report, timeout=DEADLINE_S)).reason == "PROOF_REFUSED"

    rotate = device_service_pb2.DeviceServiceRotateKeyRequest(
        proof=word(old, proof.ROTATE, proof.key_of(new.public)), public_key=new.public
    )
    assert world.stubs.device.RotateKey(rotate, timeout=DEADLINE_S).device.public_key == new.public
    assert refused(lambda: describe(word(old, proof.DESCRIBE))).reason == "PROOF_REFUSED", (
        "the old key is worth nothing"
    )
    assert describe(word(new, proof.DESCRIBE)).device.posture["os"] == "linux"


def test_a_sign_in_makes_the_user_and_owns_the_device(world: World) -> None:
    token = world.issuer.token(
        claims("ann", email="ann@example.com", email_verified=True, groups=["staff", "eng"]), key="ec"
    )
    device = enroll(world, oidc_token=token, tenant="signed", name="ann-laptop").device
    assert (device.metadata.tenant, device.user, device.pending) == ("signed", "ann", False)
    asked = user_service_pb2.UserServiceGetRequest(tenant="signed", name="ann")
    user = world.stubs.user.Get(asked, timeout=DEADLINE_S).user
    assert (user.email, list(user.groups)) == ("ann@example.com", ["staff", "eng"])
    # Set up anew: the same device with another key; and her groups are what the issuer says now.
    key = Key(os.urandom(32))
    later = enroll(world, key, oidc_token=world.issuer.token(claims("ann")), tenant="signed", name="ann-laptop").device
    assert (later.metadata.id, later.public_key) == (device.metadata.id, key.public)
    assert list(world.stubs.user.Get(asked, timeout=DEADLINE_S).user.groups) == ["staff"]
    # Another subject of the same name is another user, and gets nothing of hers.
    stranger = world.issuer.token({**claims("other-subject"), "preferred_username": "ann"})
    assert (
        refused(lambda: enroll(world, oidc_token=stranger, tenant="signed", name="ann-laptop")).reason == "NAME_TAKEN"
    )
    assert enroll(world, oidc_token=stranger, tenant="signed", name="mallory").device.user == "ann-2"


def test_an_issuer_of_several_tenants_needs_one_chosen(world: World) -> None:
    token = world.issuer.token(claims("zoe"))
    assert refused(lambda: enroll(world, oidc_token=token)).metadata["field"] == "tenant"
    assert refused(lambda: enroll(world, oidc_token=token, tenant="elsewhere")).reason == "SIGN_IN_REFUSED"
    device = enroll(world, oidc_token=token, tenant="careful").device
    assert device.pending
    assert 3500 < device.expire_time.seconds - time.time() < 3700


def test_a_disabled_user_signs_in_to_nothing(world: World) -> None:
    user = enroll(world, oidc_token=world.issuer.token(claims("eve")), tenant="signed", name="eve").device.user
    asked = user_service_pb2.UserServiceGetRequest(tenant="signed", name=user)
    stored = world.stubs.user.Get(asked, timeout=DEADLINE_S).user
    stored.disabled = True
    world.stubs.user.Update(user_service_pb2.UserServiceUpdateRequest(user=stored), timeout=DEADLINE_S)
    error = refused(lambda: enroll(world, oidc_token=world.issuer.token(claims("eve")), tenant="signed", name="eve2"))
    assert (error.reason, "disabled" in error.message) == ("SIGN_IN_REFUSED", True)


@pytest.mark.parametrize(
    ("changed", "how", "says"),
    [
        ({"aud": "another"}, {}, "audience"),
        ({"aud": [AUDIENCE, "another"]}, {}, "azp"),
        ({"azp": "another"}, {}, "azp"),
        ({"exp": 1}, {}, "expired"),
        ({"exp": None}, {}, "exp"),
        ({"iat": 32503680000}, {}, "clocks"),
        ({"nbf": 32503680000}, {}, "clocks"),
        ({"sub": ""}, {}, "sub"),
        ({"iss": "https://issuer.example"}, {}, "issuer"),
        ({"groups": []}, {}, "groups"),
        ({}, {"key": "stranger"}, "signed"),
        ({}, {"key": "none", "algorithm": "none"}, "algorithm"),
        ({}, {"key": "a shared secret that is long enough", "algorithm": "HS256"}, "algorithm"),
        ({}, {"kid": "made-up"}, "publish"),
        ({}, {"key": "ec", "kid": "rsa-1"}, "publish"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_sign_in(world: World, changed: dict[str, Any], how: dict[str, Any], says: str) -> None:
    token = world.issuer.token({**claims("bob"), **changed}, **how)
    error = refused(lambda: enroll(world, oidc_token=token, tenant="signed", name="bob"))
    assert (error.code.name, error.reason) == ("UNAUTHENTICATED", "SIGN_IN_REFUSED")
    assert says in error.message
    assert "bob" not in devices(world, "signed")


def test_presence_is_kept_under_a_lease_and_follows_names(world: World) -> None:
    tenant = make_tenant(world)
    device = enroll(world, token=make_token(world, tenant).secret, name="laptop").device
    watch = world.stubs.presence.Watch(
        presence_service_pb2.PresenceServiceWatchRequest(tenant=tenant), timeout=DEADLINE_S
    )
    assert next(watch).synced

    def report(**values: Any) -> Any:
        values = {"node": "n1", "lease_ms": 300_000, **values}
        return world.stubs.presence.Report(
            presence_service_pb2.PresenceServiceReportRequest(**values), timeout=DEADLINE_S
        )

    here = {"device_id": device.metadata.id, "endpoint": "198.51.100.7:4242", "path": "PRESENCE_PATH_WIREGUARD"}
    assert report(present=[here]).resync
    assert not report(present=[here, {"device_id": "gone"}], complete=True).resync
    (came,) = next(watch).present
    assert (came.tenant, came.device, came.node, came.endpoint) == (tenant, "laptop", "n1", "198.51.100.7:4242")
    device.metadata.name = "renamed"
    world.stubs.device.Update(device_service_pb2.DeviceServiceUpdateRequest(device=device), timeout=DEADLINE_S)
    (renamed,) = next(watch).present
    assert renamed.device == "renamed"
    report(lease_ms=1000)
    (gone,) = next(watch).absent
    assert (gone.device_id, gone.node) == (device.metadata.id, "n1")
    assert report(present=[here]).resync, "the lease ended: everything has to be said again"
    watch.cancel()
    asked = presence_service_pb2.PresenceServiceListRequest(tenant=tenant)
    report(present=[here], complete=True)
    assert [item.device for item in world.stubs.presence.List(asked, timeout=DEADLINE_S).presences] == ["renamed"]
    delete = device_service_pb2.DeviceServiceDeleteRequest(tenant=tenant, name="renamed")
    world.stubs.device.Delete(delete, timeout=DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while world.stubs.presence.List(asked, timeout=DEADLINE_S).presences:
        assert time.monotonic() < deadline


def test_nodes_announce_and_stay_who_they_are(world: World) -> None:
    def announce(**values: Any) -> Any:
        return world.stubs.node.Announce(node_service_pb2.NodeServiceAnnounceRequest(node=values), timeout=DEADLINE_S)

    one = {
        "metadata": {"name": "n2"},
        "public_key": Key(bytes([7] * 32)).public,
        "endpoints": ["vpn.example.com:51820"],
    }
    first = announce(**one)
    assert announce(**one).revision == first.revision, "nothing changed, nothing was written"
    moved = announce(**{**one, "endpoints": ["[2001:db8::1]:443"], "mtu": 1380})
    assert (moved.node.metadata.id, list(moved.node.endpoints)) == (first.node.metadata.id, ["[2001:db8::1]:443"])
    error = refused(lambda: announce(metadata={"name": "n3"}, public_key=one["public_key"]))
    assert error.reason == "KEY_TAKEN"
    tenant = make_tenant(world)
    answer = enroll(world, token=make_token(world, tenant).secret)
    assert {peer.node for peer in answer.tunnel.peers} >= {"n1", "n2"}
    assert answer.tunnel.mtu == 1380
    nodes = registry_service_pb2.WatchRequest(kinds=["KIND_NODE"])
    message = next(world.stubs.registry.Watch(nodes, timeout=DEADLINE_S))
    assert {item.node.metadata.name for item in message.changed} >= {"n1", "n2"}
    world.stubs.node.Delete(node_service_pb2.NodeServiceDeleteRequest(name="n2"), timeout=DEADLINE_S)


def test_keys_that_the_issuer_rotates_work_at_once_or_seconds_later(world: World) -> None:
    """A new key id has the set read again, but not more often than every 10 s: made-up ids cost the issuer nothing."""
    asked = world.issuer.ask("/asked")
    for _ in range(5):
        refused(lambda: enroll(world, oidc_token=world.issuer.token(claims("x"), kid="made-up"), tenant="signed"))
    assert world.issuer.ask("/asked") - asked <= 1
