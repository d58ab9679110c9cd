"""Every RPC of a whole mesh over TCP: without a certificate, with one of another authority, expired, early, revoked, of each wrong role, of another tenant.

The mesh is `falkirk up` with a TCP port for each service; roles log in as people do. Certificates of the wrong time are made with the mesh's own root.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from falkirk.api.net.v1 import access_pb2
from falkirk.api.policy.v1 import policy_service_pb2, policy_service_pb2_grpc
from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
from falkirk.decide.callers import Caller, Role
from falkirk.registry import issue
from falkirk.registry.authority import Authority
from falkirk.registry.sealing import Seal
from falkirk.registry.settings import AuthoritySettings
from falkirk.registry.store import open_database
from falkirk.runtime import access, certificates, client, remote
from falkirk.runtime.errors import FalkirkError, from_rpc
from tests.unit.test_roles import METHODS, path_of
from tools.mesh import SERVICES, Mesh, resource
from tools.netlab import Lab, wait_for

PEOPLE = {
    # name: role, tenant
    "root": (Role.ADMINISTRATOR, ""),
    "reader": (Role.AUDITOR, ""),
    "acme-root": (Role.ADMINISTRATOR, "acme"),
    "acme-reader": (Role.AUDITOR, "acme"),
    "alice": (Role.OWNER, "acme"),
    "agent": (Role.CONNECTOR, "acme"),
}
GATE = {
    "CERTIFICATE_NEEDED",
    "CERTIFICATE_FOREIGN",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_NOT_YET_VALID",
    "CERTIFICATE_REVOKED",
    "ROLE_FORBIDDEN",
    "TENANT_FORBIDDEN",
}

Pair = tuple[str, str]
"""Chain and key, PEM."""


@dataclass
class Remote:
    """A mesh with TCP ports, and who has logged in to it."""

    mesh: Mesh
    addresses: dict[str, str]
    roots: str
    token: str
    """What `falkirk up` has printed."""
    people: dict[str, Pair]

    def channel(self, service: str, pair: Pair | None, roots: str = "") -> grpc.Channel:
        """A channel to a service."""
        return remote.channel(self.addresses[service], roots or self.roots, pair)

    def authority(self) -> tuple[Authority, Any]:
        """The mesh's own, on its files, with a connection."""
        directory = self.mesh.data_dir / "registry"
        return Authority(Seal(directory / "authority.key", None), AuthoritySettings()), open_database(
            directory / "falkirk.db"
        )

    def dated(self, role: Role, begin: float, end: float, key_id: str = "somebody") -> Pair:
        """A certificate of the mesh's root with times of our choice."""
        authority, connection = self.authority()
        mesh = authority.ensure(connection, time.time_ns())
        key = certificates.new_key()
        caller = Caller(mesh, role, key_id, "somebody", begin=begin, end=end)
        leaf = issue.leaf(authority._signer(connection, mesh)[1], key.public_key(), caller, ())
        connection.close()
        return issue.pem(leaf), certificates.key_pem(key)


def ports(count: int) -> list[int]:
    """Free ones."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def log_in(channel: grpc.Channel, token: str) -> Pair:
    """With a token, as `falkirk login` does."""
    key = certificates.new_key()
    secret = token.removeprefix("fk-login-").partition("-")[0]
    request = pb.AuthorityServiceLoginRequest(secret=secret, request=certificates.request(key))
    answer = pb_grpc.AuthorityServiceStub(channel).Login(request, timeout=10)
    return answer.credentials.chain, certificates.key_pem(key)


@pytest.fixture(scope="module")
def far() -> Iterator[Remote]:
    with tempfile.TemporaryDirectory(prefix="fk-") as name, Lab() as lab:
        addresses = {service: f"127.0.0.1:{port}" for service, port in zip(SERVICES, ports(len(SERVICES)), strict=True)}
        mesh = Mesh(lab, Path(name))
        mesh.start({"listen_tcp": addresses})
        mesh.apply(
            [
                resource("Tenant", "acme"),
                resource("Tenant", "other"),
                resource("User", "alice", "acme"),
                resource("Device", "laptop", "acme", user="alice"),
                resource("Device", "printer", "acme"),
                resource("Device", "theirs", "other"),
            ]
        )
        wait_for("the first token", lambda: "fk-login-" in mesh.log.read_text(), 20)
        token = next(word for word in mesh.log.read_text().split() if word.startswith("fk-login-"))
        roots = remote.roots(addresses["registry"], token.rpartition("-")[2])
        found = Remote(mesh, addresses, roots, token, {})
        with client.sync_channel(mesh.run_dir, "registry") as local:
            stub = pb_grpc.AuthorityServiceStub(local)
            with found.channel("registry", None) as outside:
                for person, (role, tenant) in PEOPLE.items():
                    made = stub.CreateLogin(
                        pb.AuthorityServiceCreateLoginRequest(name=person, role=f"ROLE_{role.upper()}", tenant=tenant)
                    )
                    found.people[person] = log_in(outside, made.token)
            key = certificates.new_key()
            node = stub.SignNode(pb.AuthorityServiceSignNodeRequest(node="far-node", request=certificates.request(key)))
            found.people["node"] = (node.credentials.chain, certificates.key_pem(key))
        for service, address in addresses.items():
            wait_for(f"{service}'s certificate", partial(_shakes_hands, address), 20)
        yield found


def _shakes_hands(address: str) -> bool:
    try:
        return bool(remote._bundle(address))
    except FalkirkError:
        return False


def service_of(method: MethodDescriptor) -> str:
    """Which service has it."""
    return str(method.full_name.split(".")[2])


def request_of(method: MethodDescriptor, tenant: str = "") -> Message:
    """A request; with a tenant, its first path names that one."""
    request: Any = message_factory.GetMessageClass(method.input_type)()
    rule = access.rule_of(method)
    if tenant and rule is not None and rule.tenant:
        message = request
        *path, last = rule.tenant[0].split(".")
        for step in path:
            if step == "*":
                message = getattr(message, message.DESCRIPTOR.oneofs[0].fields[2].name)
                continue
            value = getattr(message, step)
            message = value.add() if message.DESCRIPTOR.fields_by_name[step].is_repeated else value
        setattr(message, last, tenant)
    return request  # type: ignore[no-any-return]


def call(channel: grpc.Channel, method: MethodDescriptor, tenant: str = "") -> FalkirkError | None:
    """What a call is refused with; None where it is answered, or a stream begins."""
    request = request_of(method, tenant)
    encode: Any = type(request).SerializeToString
    options = {"request_serializer": encode, "response_deserializer": lambda data: data}
    requests: Any = iter([request]) if method.client_streaming else request
    path = path_of(method)
    kind: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    running = kind(path, **options)(requests, timeout=10)
    try:
        if method.server_streaming:
            try:
                next(running)
            finally:
                running.cancel()
    except StopIteration:
        return None
    except grpc.RpcError as error:
        return from_rpc(error)
    return None


def call_unary_or_stream(channel: grpc.Channel, method: MethodDescriptor, tenant: str = "") -> str:
    """The reason of the refusal; empty where there was none."""
    try:
        error = call(channel, method, tenant)
    except grpc.RpcError as failed:
        error = from_rpc(failed)
    return error.reason if error is not None else ""


def refusals(far: Remote, pair: Pair | None, tenant: str = "", only: Any = None) -> dict[str, str]:
    """The reason that each RPC of the mesh is refused with."""
    found = {}
    channels = {service: far.channel(service, pair) for service in SERVICES}
    try:
        for method in METHODS:
            if only is None or only(method):
                found[path_of(method)] = call_unary_or_stream(channels[service_of(method)], method, tenant)
    finally:
        for channel in channels.values():
            channel.close()
    return found


def rule_of(method: MethodDescriptor) -> Any:
    rule = access.rule_of(method)
    assert rule is not None
    return rule


def closed(method: MethodDescriptor) -> bool:
    """Whether it needs a certificate."""
    return Role.ANYONE not in rule_of(method).roles


def test_without_a_certificate(far: Remote) -> None:
    found = refusals(far, None)
    assert {reason for path, reason in found.items() if closed(_method(path))} == {"CERTIFICATE_NEEDED"}
    opened = {path for path, reason in found.items() if reason != "CERTIFICATE_NEEDED"}
    assert opened == {path_of(method) for method in METHODS if not closed(method)}


@pytest.mark.parametrize(
    ("begin", "end", "reason"), [(-7200, -1, "CERTIFICATE_EXPIRED"), (3600, 7200, "CERTIFICATE_NOT_YET_VALID")]
)
def test_out_of_time(far: Remote, begin: float, end: float, reason: str) -> None:
    now = time.time()
    for role in (Role.ADMINISTRATOR, Role.NODE):
        found = refusals(far, far.dated(role, now + begin, now + end))
        assert set(found.values()) == {reason}


@pytest.mark.parametrize("person", [*PEOPLE, "node"])
def test_each_wrong_role(far: Remote, person: str) -> None:
    """Refused where the table doesn't name the role, and not refused by the gate where it does."""
    role, tenant = PEOPLE.get(person, (Role.NODE, ""))
    found = refusals(far, far.people[person], only=lambda method: role not in rule_of(method).roles and closed(method))
    assert found
    assert set(found.values()) == {"ROLE_FORBIDDEN"}
    may = [
        method
        for method in METHODS
        if role in rule_of(method).roles
        and not method.server_streaming
        and not method.client_streaming
        and method.name in ("List", "Get", "Show", "Stats", "ListPrincipals", "Explain")
        and (not tenant or rule_of(method).tenant)
    ]
    answers = refusals(far, far.people[person], tenant, only=lambda method: method in may)
    assert set(answers.values()) & GATE == set()


@pytest.mark.parametrize("person", [person for person, (_, tenant) in PEOPLE.items() if tenant])
def test_another_tenant(far: Remote, person: str) -> None:
    """Whoever is bound to a tenant: nothing of another one, nothing without saying which, nothing of the whole mesh."""
    role = PEOPLE[person][0]
    for tenant in ("other", ""):
        found = refusals(
            far, far.people[person], tenant, only=lambda method: role in rule_of(method).roles and closed(method)
        )
        assert found
        assert set(found.values()) == {"TENANT_FORBIDDEN"}


def test_another_authority(far: Remote) -> None:
    """A certificate that says all the right things, signed by somebody else: the handshake fails, and that is recorded."""
    key = certificates.new_key()
    mesh = remote.mesh_of(far.roots)
    now = time.time()
    root = issue.root(mesh, 1, key, now - 60, now + 3600)
    caller = Caller(mesh, Role.ADMINISTRATOR, "x", "x", begin=now - 60, end=now + 3600)
    leaf = issue.leaf(issue.Issuer(root, key), key.public_key(), caller, ())
    for service in SERVICES:
        with far.channel(service, (issue.pem(leaf), certificates.key_pem(key))) as channel:
            method = next(method for method in METHODS if service_of(method) == service and method.name == "Stats")
            error = call_error(channel, method)
            assert error.code is grpc.StatusCode.UNAVAILABLE
    wait_for(
        "the records",
        lambda: (
            {
                record["service"]
                for record in audit(far, "connection_refused")
                if record["reason"] == "CERTIFICATE_UNTRUSTED"
            }
            == set(SERVICES)
        ),
        20,
    )


def test_a_false_server_is_not_believed(far: Remote, tmp_path: Path) -> None:
    """Somebody in between with a root of the same name: the fingerprint doesn't match, and no secret is sent."""
    with pytest.raises(FalkirkError) as caught:
        remote.roots(far.addresses["registry"], "0" * 64)
    assert caught.value.reason == "FINGERPRINT_MISMATCH"
    key = certificates.new_key()
    now = time.time()
    other = issue.pem(issue.root(remote.mesh_of(far.roots), 1, key, now - 60, now + 3600))
    with far.channel("registry", None, other) as channel:
        method = next(method for method in METHODS if path_of(method).endswith("AuthorityService/Login"))
        assert call_error(channel, method).code is grpc.StatusCode.UNAVAILABLE


def test_plain_text_and_old_tls_get_nothing(far: Remote) -> None:
    host, _, port = far.addresses["registry"].rpartition(":")
    with grpc.insecure_channel(far.addresses["registry"]) as channel:
        method = next(method for method in METHODS if path_of(method).endswith("AuthorityService/Show"))
        assert call_error(channel, method).code is grpc.StatusCode.UNAVAILABLE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), 5) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)


def test_the_socket_behind_the_front_lets_nobody_in(far: Remote) -> None:
    """Not even who may enter admin/: without a name that the front knows there is no caller."""
    with grpc.insecure_channel(f"unix:{far.mesh.run_dir}/admin/registry.tcp.sock") as channel:
        for method in METHODS:
            if service_of(method) == "registry":
                assert call_unary_or_stream(channel, method) == "CERTIFICATE_NEEDED"


def test_the_first_token_is_for_one_login(far: Remote) -> None:
    with far.channel("registry", None) as channel:
        pair = log_in(channel, far.token)
        with pytest.raises(grpc.RpcError) as caught:
            log_in(channel, far.token)
    assert from_rpc(caught.value).reason == "LOGIN_REFUSED"
    assert certificates.caller_of_pem(pair[0]).role is Role.ADMINISTRATOR
    with client.sync_channel(far.mesh.run_dir, "registry") as local, pytest.raises(grpc.RpcError) as again:
        pb_grpc.AuthorityServiceStub(local).CreateLogin(
            pb.AuthorityServiceCreateLoginRequest(name="x", role=access_pb2.ROLE_ADMINISTRATOR, first=True)
        )
    assert from_rpc(again.value).reason == "NOT_FIRST"


def test_an_owner_sees_own_devices_only(far: Remote) -> None:
    from falkirk.api.registry.v1 import device_service_pb2 as devices
    from falkirk.api.registry.v1 import device_service_pb2_grpc as devices_grpc

    with far.channel("registry", far.people["alice"]) as channel:
        stub = devices_grpc.DeviceServiceStub(channel)
        listed = stub.List(devices.DeviceServiceListRequest(tenant="acme"), timeout=10)
        assert [device.metadata.name for device in listed.devices] == ["laptop"]
        got = stub.Get(devices.DeviceServiceGetRequest(tenant="acme", name="laptop"), timeout=10)
        assert got.device.user == "alice"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Get(devices.DeviceServiceGetRequest(tenant="acme", name="printer"), timeout=10)
        assert from_rpc(caught.value).reason == "NOT_FOUND"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Delete(devices.DeviceServiceDeleteRequest(tenant="acme", name="printer"), timeout=10)
        assert from_rpc(caught.value).reason == "NOT_FOUND"


def test_revoked_everywhere_and_at_once(far: Remote) -> None:
    with client.sync_channel(far.mesh.run_dir, "registry") as local:
        stub = pb_grpc.AuthorityServiceStub(local)
        made = stub.CreateLogin(
            pb.AuthorityServiceCreateLoginRequest(name="leaver", role=access_pb2.ROLE_ADMINISTRATOR)
        )
        with far.channel("registry", None) as outside:
            pair = log_in(outside, made.token)
        stats = [method for method in METHODS if method.name == "Stats"]
        assert set(refusals(far, pair, only=lambda method: method in stats).values()) == {""}
        with far.channel("registry", pair) as open_before:
            watch = pb_watch(open_before)
            next(watch)
            stub.Revoke(pb.AuthorityServiceRevokeRequest(name="leaver"), timeout=10)
            with pytest.raises(grpc.RpcError):
                list(watch)  # its connection is closed
    wait_for(
        "every service to know",
        lambda: set(refusals(far, pair, only=lambda method: method in stats).values()) == {"CERTIFICATE_REVOKED"},
        5,
    )
    assert set(refusals(far, pair, only=closed).values()) == {"CERTIFICATE_REVOKED"}


def test_a_rotation_cuts_nobody_off(far: Remote) -> None:
    """Who knows only the old root verifies what the new one signs; what the old one signed is still good."""
    with far.channel("registry", far.people["root"]) as channel:
        trust = pb_grpc.AuthorityServiceStub(channel).Rotate(pb.AuthorityServiceRotateRequest(), timeout=10).trust
    assert len(trust.roots) == 2
    newest = trust.roots[-1].certificate

    def shown(service: str) -> bool:
        """Whether the service's certificate leads to the new root alone."""
        with far.channel(service, far.people["root"], newest) as channel:
            method = next(method for method in METHODS if service_of(method) == service and method.name == "Stats")
            return call_unary_or_stream(channel, method) == ""

    for service in SERVICES:
        wait_for(f"{service} to show a certificate of the new root", partial(shown, service), 10)
    stats = [method for method in METHODS if method.name == "Stats"]
    assert set(refusals(far, far.people["reader"], only=lambda method: method in stats).values()) == {""}


def test_every_refusal_is_in_the_audit_log(far: Remote) -> None:
    """For every RPC that needs a certificate: who was refused, and why; repetitions of what other tests tried are counted, not told again."""
    refusals(far, None)
    now = time.time()
    refusals(far, far.dated(Role.AUDITOR, now - 7200, now - 3600, "somebody-late"))
    refusals(far, far.people["agent"], only=lambda method: closed(method) and method.name != "Renew")
    refusals(far, far.people["acme-root"], "other")
    wanted = {
        *(("CERTIFICATE_NEEDED", path_of(method), "") for method in METHODS if closed(method)),
        *(("CERTIFICATE_EXPIRED", path_of(method), "somebody-late") for method in METHODS),
        *(
            ("ROLE_FORBIDDEN", path_of(method), "agent")
            for method in METHODS
            if closed(method) and method.name != "Renew"
        ),
        *(
            ("TENANT_FORBIDDEN", path_of(method), "acme-root")
            for method in METHODS
            if closed(method) and Role.ADMINISTRATOR in rule_of(method).roles
        ),
    }
    ids = {certificates.caller_of_pem(pair[0]).id: name for name, pair in far.people.items()}

    def missing() -> set[tuple[str, str, str]]:
        return wanted - {
            (
                record["reason"],
                f"/{record.get('method', '')}",
                ids.get(record.get("principal_id", ""), record.get("principal_id", "")),
            )
            for record in audit(far, "call_refused")
        }

    wait_for("every record", lambda: not missing(), 30)
    one = next(record for record in audit(far, "call_refused") if record["reason"] == "TENANT_FORBIDDEN")
    assert one["tenant"] == "acme"
    assert one["peer"].startswith("127.0.0.1:")
    assert one["service"] in SERVICES


def pb_watch(channel: grpc.Channel) -> Any:
    """A stream that stays open."""
    from falkirk.api.registry.v1 import tenant_service_pb2 as tenants
    from falkirk.api.registry.v1 import tenant_service_pb2_grpc as tenants_grpc

    stub: Any = tenants_grpc.TenantServiceStub(channel)
    return stub.Watch(tenants.TenantServiceWatchRequest(), timeout=30)


def call_error(channel: grpc.Channel, method: MethodDescriptor) -> FalkirkError:
    """What a call fails with."""
    try:
        error = call(channel, method)
    except grpc.RpcError as failed:
        error = from_rpc(failed)
    assert error is not None
    return error


def audit(far: Remote, event: str) -> list[dict[str, Any]]:
    """Records of an event, asked for over TCP by an auditor."""
    import msgspec

    with far.channel("policy", far.people["reader"]) as channel:
        stub = policy_service_pb2_grpc.AuditServiceStub(channel)
        request = policy_service_pb2.QueryRequest(filter=policy_service_pb2.AuditFilter(event=event), limit=100_000)
        return [msgspec.json.decode(answer.record.json) for answer in stub.Query(request, timeout=30)]


def _method(path: str) -> MethodDescriptor:
    return next(method for method in METHODS if path_of(method) == path)
