"""`falkirk login` as people use it: with a token, with an issuer's ID token, and what it leaves on disk. A registry and an issuer, each a process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner, Result

from falkirk.api.registry.v1 import tenant_service_pb2
from falkirk.cli.main import app
from falkirk.decide.callers import Caller
from falkirk.registry import issue
from falkirk.registry.authority import Authority
from falkirk.registry.sealing import Seal
from falkirk.registry.settings import AuthoritySettings
from falkirk.registry.store import open_database
from falkirk.runtime import certificates
from tests.process import oidc_issuer, service_process
from tests.process.registry_process import Registry, running
from tests.process.test_roles_over_tcp import ports
from tools.netlab import wait_for

AUDIENCE = "falkirk-tests"


class World(NamedTuple):
    """What the tests talk to."""

    registry: Registry
    issuer: oidc_issuer.Running
    address: str
    fingerprint: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    address, policy = (f"127.0.0.1:{port}" for port in ports(2))
    with oidc_issuer.running() as issuer:
        settings = f"""listen_tcp: {{registry: "{address}", policy: "{policy}"}}
registry:
  oidc:
    - issuer: "{issuer.url}"
      audience: {AUDIENCE}
      tenant: signed
      groups_claim: groups
      administrator_groups: [admins]
      auditor_groups: [auditors]
"""
        with running(tmp_path_factory.mktemp("r"), settings) as registry:
            tenant = tenant_service_pb2.Tenant()
            tenant.metadata.name = "signed"
            registry.stubs().tenant.Create(tenant_service_pb2.TenantServiceCreateRequest(tenant=tenant), timeout=10)
            shown = local(registry, "authority", "show")
            yield World(registry, issuer, address, shown.split()[-1])


def local(registry: Registry, *arguments: str) -> str:
    """A command on the registry's machine."""
    return run(arguments, {"FALKIRK_RUN_DIR": str(registry.run_dir), "FALKIRK_ADDRESS": ""}).stdout


def run(arguments: tuple[str, ...], environment: dict[str, str], given: str = "", status: int = 0) -> Result:
    """A command, which must end with this status."""
    done = CliRunner().invoke(app, arguments, input=given, env=environment)
    assert done.exit_code == status, done.output
    return done


def elsewhere(world: World, home: Path) -> dict[str, str]:
    """The environment of somebody on another machine: an empty run directory, a home of their own."""
    return {"FALKIRK_RUN_DIR": str(home / "run"), "XDG_CONFIG_HOME": str(home), "FALKIRK_ADDRESS": world.address}


def test_with_a_token(world: World, tmp_path: Path) -> None:
    far = elsewhere(world, tmp_path)
    token = local(world.registry, "authority", "token", "bob").strip()
    assert "NOT_LOGGED_IN" in run(("tenant", "list"), far, status=1).stderr
    wait_for("the certificate", lambda: (world.registry.data_dir / "registry" / "tls.pem").exists(), 20)
    assert "as bob, administrator" in run(("login", "--token-file", "-"), far, token).stdout
    (file,) = (tmp_path / "falkirk" / "logins").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in file.read_text()
    assert "signed" in run(("tenant", "list"), far).stdout
    assert "NOT_ON_TCP" in run(("flow", "list"), far, status=1).stderr
    assert "LOGIN_REFUSED" in run(("login", "--token-file", "-"), far, token, status=1).stderr
    # A token of another mesh: its secret isn't sent.
    false = f"{token.rpartition('-')[0]}-{'0' * 64}"
    assert "FINGERPRINT_MISMATCH" in run(("login", "--token-file", "-"), far, false, status=1).stderr
    assert "INVALID_TOKEN" in run(("login", "--token-file", "-"), far, "hello", status=1).stderr
    run(("logout",), far)
    assert "NOT_LOGGED_IN" in run(("tenant", "list"), far, status=1).stderr


@pytest.mark.parametrize(
    ("groups", "role", "may"), [(["admins", "x"], "administrator", 0), (["auditors"], "auditor", 1), ([], "owner", 1)]
)
def test_with_an_id_token(world: World, tmp_path: Path, groups: list[str], role: str, may: int) -> None:
    far = elsewhere(world, tmp_path)
    now = int(time.time())
    token = world.issuer.token(
        {
            "iss": world.issuer.url,
            "aud": AUDIENCE,
            "sub": f"s-{role}",
            "iat": now,
            "exp": now + 300,
            "preferred_username": f"is-{role}",
            "groups": groups,
        }
    )
    wait_for("the certificate", lambda: (world.registry.data_dir / "registry" / "tls.pem").exists(), 20)
    assert "INVALID_FINGERPRINT" in run(("login", "--oidc-token-file", "-"), far, token, status=1).stderr
    sign_in = ("login", "--oidc-token-file", "-", "--fingerprint", world.fingerprint)
    assert f"as is-{role}, {role} of tenant signed" in run(sign_in, far, token).stdout
    assert run(("device", "list", "--tenant", "signed"), far).stdout
    assert "TENANT_FORBIDDEN" in run(("device", "list"), far, status=1).stderr
    refused = run(("user", "create", f"by-{role}", "--tenant", "signed"), far, status=may)
    assert ("ROLE_FORBIDDEN" in refused.stderr) == bool(may)


def aged(world: World, caller: Caller, elapsed: float, left: float) -> tuple[str, str]:
    """A certificate of the mesh's own root that was made `elapsed` seconds ago, and its key."""
    directory = world.registry.data_dir / "registry"
    authority = Authority(Seal(directory / "authority.key", None), AuthoritySettings())
    connection = open_database(directory / "falkirk.db")
    issuer = authority._signer(connection, caller.mesh)[1]
    connection.close()
    key, now = certificates.new_key(), time.time()
    dated = replace(caller, begin=now - elapsed, end=now + left)
    return issue.pem(issue.leaf(issuer, key.public_key(), dated, ())), certificates.key_pem(key)


def test_a_login_renews_itself(world: World, tmp_path: Path) -> None:
    far = elsewhere(world, tmp_path)
    wait_for("the certificate", lambda: (world.registry.data_dir / "registry" / "tls.pem").exists(), 20)
    run(("login", "--token-file", "-"), far, local(world.registry, "authority", "token", "carol"))
    (file,) = (tmp_path / "falkirk" / "logins").iterdir()
    login = json.loads(file.read_text())
    caller = certificates.caller_of_pem(login["chain"])
    run(("tenant", "list"), far)
    assert json.loads(file.read_text())["chain"] == login["chain"]
    chain, key = aged(world, caller, 7 * 3600, 5 * 3600)
    file.write_text(json.dumps({**login, "chain": chain, "key": key}))
    assert "signed" in run(("tenant", "list"), far).stdout
    renewed = certificates.caller_of_pem(json.loads(file.read_text())["chain"])
    assert (renewed.id, renewed.name) == (caller.id, "carol")
    assert renewed.end > time.time() + 11 * 3600
    chain, key = aged(world, caller, 12 * 3600, -1)
    file.write_text(json.dumps({**login, "chain": chain, "key": key}))
    assert "LOGIN_EXPIRED" in run(("tenant", "list"), far, status=1).stderr


def test_a_node_renews_itself(world: World) -> None:
    """A certificate of which two thirds are gone is replaced, also where the service has just started."""
    file = world.registry.data_dir / "registry" / "tls.pem"
    wait_for("the certificate", file.exists, 20)
    caller = certificates.caller_of_pem(file.read_text())
    young = file.read_text()
    world.registry.stop()
    world.registry.start()
    assert file.read_text() == young
    world.registry.stop()
    file.write_text("".join(aged(world, caller, 17 * 3600, 7 * 3600)))
    world.registry.start()
    wait_for("the next one", lambda: certificates.caller_of_pem(file.read_text()).end > time.time() + 23 * 3600, 10)


def test_tcp_goes_on_without_the_registry(world: World, tmp_path: Path) -> None:
    """A service that starts while the registry is away knows callers by what it has kept."""
    far = elsewhere(world, tmp_path)
    run(("login", "--token-file", "-"), far, local(world.registry, "authority", "token", "dora"))
    registry = world.registry
    policy = partial(service_process.running, "policy", registry.run_dir, registry.data_dir, registry.config)
    with policy():
        wait_for("its certificate", lambda: (registry.data_dir / "policy" / "tls.pem").exists(), 20)
    registry.stop()
    try:
        with policy():
            service_process.until_serving("policy", registry.run_dir)
            wait_for("an answer", lambda: CliRunner().invoke(app, ("audit", "query"), env=far).exit_code == 0, 10)
            stranger = {**far, "XDG_CONFIG_HOME": str(tmp_path / "nobody")}
            assert "NOT_LOGGED_IN" in run(("audit", "query"), stranger, status=1).stderr
    finally:
        registry.start()


def test_an_id_token_of_somebody_else(world: World, tmp_path: Path) -> None:
    far = elsewhere(world, tmp_path)
    now = int(time.time())
    claims = {"iss": world.issuer.url, "aud": "another", "sub": "s", "iat": now, "exp": now + 300, "groups": ["admins"]}
    wait_for("the certificate", lambda: (world.registry.data_dir / "registry" / "tls.pem").exists(), 20)
    sign_in = ("login", "--oidc-token-file", "-", "--fingerprint", world.fingerprint)
    assert "SIGN_IN_REFUSED" in run(sign_in, far, world.issuer.token(claims), status=1).stderr
