"""`falkirk login` as people use it: with a token, with an issuer's ID token, and what it leaves on disk. A registry and an issuer, each a process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner, Result

from falkirk.api.registry.v1 import tenant_service_pb2
from falkirk.cli.main import app
from tests.process import oidc_issuer
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
    (port,) = ports(1)
    address = f"127.0.0.1:{port}"
    with oidc_issuer.running() as issuer:
        settings = f"""listen_tcp: {{registry: "{address}"}}
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


def test_an_id_token_of_somebody_else(world: World, tmp_path: Path) -> None:
    far = elsewhere(world, tmp_path)
    now = int(time.time())
    claims = {"iss": world.issuer.url, "aud": "another", "sub": "s", "iat": now, "exp": now + 300, "groups": ["admins"]}
    wait_for("the certificate", lambda: (world.registry.data_dir / "registry" / "tls.pem").exists(), 20)
    sign_in = ("login", "--oidc-token-file", "-", "--fingerprint", world.fingerprint)
    assert "SIGN_IN_REFUSED" in run(sign_in, far, world.issuer.token(claims), status=1).stderr
