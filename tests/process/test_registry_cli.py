"""The command line against a real registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from falkirk.cli import resources
from tests.process.registry_process import Registry, running

HEAD = "apiVersion: falkirk.dev/v1alpha1\n"


class Shell:
    """Types commands."""

    def __init__(self, registry: Registry, files: Path) -> None:
        self._app = typer.Typer()
        resources.register(self._app)
        self._environment = {"FALKIRK_RUN_DIR": str(registry.run_dir)}
        self._files = files

    def run(self, *words: str, text: str | None = None) -> Result:
        """Run a command line."""
        return CliRunner().invoke(self._app, words, env=self._environment, input=text, catch_exceptions=False)

    def ok(self, *words: str, text: str | None = None) -> str:
        """What a command that succeeds prints."""
        result = self.run(*words, text=text)
        assert result.exit_code == 0, result.output
        return result.stdout

    def refused(self, *words: str, text: str | None = None) -> str:
        """What a command that is refused says."""
        result = self.run(*words, text=text)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        return result.stderr

    def json(self, *words: str) -> Any:
        """What a command prints for programs."""
        return json.loads(self.ok(*words, "--json"))

    def file(self, name: str, text: str) -> str:
        """A file of some text."""
        (self._files / name).write_text(text)
        return str(self._files / name)


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("r")) as started:
        yield started


@pytest.fixture
def shell(registry: Registry, tmp_path: Path) -> Shell:
    return Shell(registry, tmp_path)


def test_a_mesh_is_described_by_hand(shell: Shell) -> None:
    assert shell.ok("tenant", "create", "acme", "--display-name", "Acme Ltd") == "tenant/acme created\n"
    shell.ok("user", "create", "--tenant", "acme", "ann", "--group", "eng", "--group", "sre")
    made = shell.ok("device", "create", "--tenant", "acme", "--user", "ann", "laptop")
    assert made.startswith("device/acme/laptop created with 100.96.0.2, fd")
    shell.ok("vnet", "create", "--tenant", "acme", "blue", "--comment", "second")
    added = (
        "route",
        "add",
        "--tenant",
        "acme",
        "--vnet",
        "blue",
        "10.1.0.0/16",
        "internet",
        "--egress-address4",
        "192.0.2.1",
    )
    assert shell.ok(*added) == "route/acme/blue-10-1-0-0-16 created\n"
    shell.ok("route", "create", "--tenant", "acme", "v6", "--prefix", "::/0", "--target", "blackhole")
    table = shell.ok("route", "list", "--tenant", "acme").splitlines()
    assert table[0].split() == ["TENANT", "NAME", "VNET", "PREFIX", "TARGET", "COMMENT", "CHANGED"]
    assert "blue-10-1-0-0-16  blue     10.1.0.0/16  internet from 192.0.2.1" in table[1]
    assert [route["prefix"] for route in shell.json("route", "list")["routes"]] == ["10.1.0.0/16", "::/0"]
    shell.ok("device", "update", "--tenant", "acme", "laptop", "--rename", "old", "--disabled", "--vnet", "blue")
    device = shell.json("device", "get", "--tenant", "acme", "old")
    assert (device["disabled"], device["virtualNetwork"], device["user"]) == (True, "blue", "ann")
    shell.ok("user", "update", "--tenant", "acme", "ann", "--group", "")
    assert shell.json("user", "get", "--tenant", "acme", "ann")["groups"] == []
    assert shell.ok("device", "delete", "--tenant", "acme", "old") == "device/acme/old deleted\n"
    assert shell.json("device", "list", "--tenant", "acme")["devices"] == []


def test_refusals_say_why_and_what_to_do(shell: Shell, tmp_path: Path) -> None:
    shell.ok("tenant", "create", "acme")
    shell.ok("route", "add", "--tenant", "acme", "10.1.0.0/16", "internet")
    assert shell.refused("route", "add", "--tenant", "acme", "--name", "x", "10.1.0.0/16", "blackhole").startswith(
        "error: virtual network default already has a route for exactly 10.1.0.0/16 (PREFIX_TAKEN)\n  change the route"
    )
    assert "(IN_USE)" in shell.refused("tenant", "delete", "acme")
    assert "(IS_DEFAULT)" in shell.refused("vnet", "delete", "--tenant", "acme", "default")
    assert "(NOT_FOUND)" in shell.refused("user", "get", "--tenant", "acme", "ann")
    away = shell.refused("tenant", "list", "--run-dir", str(tmp_path / "nowhere"))
    assert "(SERVICE_UNREACHABLE)" in away
    assert "falkirk up" in away


def test_wrong_usage_is_status_2(shell: Shell) -> None:
    for words in (
        ("user", "create"),
        ("tenant", "frobnicate"),
        ("route", "add", "--tenant", "a", "::/0", "nowhere"),
        ("apply",),
    ):
        assert shell.run(*words).exit_code == 2
    labels = ("tenant", "create", "acme", "--label", "no-equals")
    assert shell.run(*labels).exit_code == 2


def test_apply_is_idempotent_and_get_prints_what_it_takes(shell: Shell) -> None:
    text = f"""\
{HEAD}kind: Device
metadata: {{name: laptop, tenant: acme}}
spec: {{user: ann}}
---
{HEAD}kind: User
metadata: {{name: ann, tenant: acme}}
---
{HEAD}kind: Tenant
metadata: {{name: acme}}
"""
    file = shell.file("all.yaml", text)
    assert "tenant/acme created (dry run)" in shell.ok("apply", "-f", file, "--dry-run")
    assert shell.json("tenant", "list")["tenants"] == []
    assert shell.ok("apply", "-f", file) == "device/acme/laptop created\nuser/acme/ann created\ntenant/acme created\n"
    assert shell.ok("apply", "-f", "-", text=text).count("unchanged") == 3
    shown = shell.ok("device", "get", "--tenant", "acme", "laptop")
    assert shell.ok("apply", "-f", "-", text=shown) == "device/acme/laptop unchanged\n"


def test_what_the_registry_refuses_is_shown_in_the_file(shell: Shell) -> None:
    shell.ok("tenant", "create", "acme")
    good = f"{HEAD}kind: User\nmetadata: {{name: ann, tenant: acme}}\n---\n"
    rules = f"""\
{good}{HEAD}kind: Policy
metadata: {{name: p, tenant: acme}}
spec:
  rules:
  - {{name: ok, when: "true", action: allow}}
  - name: bad
    when: net.prt == 443
    action: allow
"""
    file = shell.file("p.yaml", rules)
    refusal = shell.refused("apply", "-f", file)
    assert refusal.startswith(f"error: {file}:12: rule bad, line 1, column ")
    assert "(RULE_INVALID)" in refusal
    file = shell.file("d.yaml", f"{good}{HEAD}kind: Device\nmetadata: {{name: d, tenant: acme}}\nspec:\n  user: bob\n")
    assert shell.refused("apply", "-f", file).startswith(
        f"error: {file}:9: user: there is no user called 'bob' in tenant acme"
    )
    assert shell.json("user", "list")["users"] == []
    file = shell.file(
        "r.yaml",
        f"{HEAD}kind: Route\nmetadata: {{name: r, tenant: acme}}\nspec: {{prefix: '::/0', target: {{node: {{node: x}}}}}}\n",
    )
    assert f"{file}:4: target.node" in shell.refused("apply", "-f", file)
    assert "(INVALID_MANIFEST)" in shell.refused("apply", "-f", shell.file("bad.yaml", "kind: ["))


def test_policies_are_created_from_files(shell: Shell) -> None:
    shell.ok("tenant", "create", "acme")
    text = f"{HEAD}kind: Policy\nmetadata: {{name: p, tenant: acme}}\nspec: {{rules: [{{name: all, when: 'true', action: allow}}]}}\n"
    assert shell.ok("policy", "create", "-f", "-", text=text) == "policy/acme/p created\n"
    assert "(NAME_TAKEN)" in shell.refused("policy", "create", "-f", "-", text=text)
    assert shell.ok("policy", "update", "--tenant", "acme", "p", "--priority", "5") == "policy/acme/p updated\n"
    assert shell.json("policy", "get", "--tenant", "acme", "p")["rules"][0]["when"] == "true"
    assert "not a policy" in shell.refused(
        "policy", "create", "-f", "-", text=f"{HEAD}kind: Tenant\nmetadata: {{name: x}}\n"
    )


def test_watch_shows_the_state_and_every_change(shell: Shell, registry: Registry) -> None:
    shell.ok("tenant", "create", "acme")
    shell.ok("user", "create", "--tenant", "acme", "ann")
    program = "import typer; from falkirk.cli import resources; app = typer.Typer(); resources.register(app); app()"
    command = [sys.executable, "-c", program, "user", "watch", "--tenant", "acme", "--run-dir", str(registry.run_dir)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        assert [watch.stdout.readline() for _ in range(2)] == ["2 exists user/acme/ann\n", "2 synced\n"]
        shell.ok("user", "create", "--tenant", "acme", "bob")
        shell.ok("user", "update", "--tenant", "acme", "bob", "--disabled")
        shell.ok("user", "delete", "--tenant", "acme", "bob")
        lines = [watch.stdout.readline() for _ in range(3)]
        assert lines == ["3 created user/acme/bob\n", "4 changed user/acme/bob\n", "5 removed user/acme/bob\n"]
        registry.stop()
        assert watch.wait(20) == 1
        assert "(DRAINING)" in watch.stderr.read()
    registry.start()


def test_a_large_mesh_is_applied_at_once(shell: Shell) -> None:
    """10,000 routes and 1,000 rules, as the bench has them."""
    documents = [f"{HEAD}kind: Tenant\nmetadata: {{name: acme}}\n"]
    documents += [
        f"{HEAD}kind: Route\nmetadata: {{name: r{number}, tenant: acme}}\n"
        f"spec: {{prefix: 10.{number // 250}.{number % 250}.0/24, target: {{internet: {{egressAddress4: 192.0.2.1}}}}}}\n"
        for number in range(10_000)
    ]
    rules = "".join(
        f"  - {{name: r{number}, when: 'net.port == {number} && net.dst.inCidr(\"10.0.0.0/8\")', action: allow}}\n"
        for number in range(1000)
    )
    documents.append(f"{HEAD}kind: Policy\nmetadata: {{name: p, tenant: acme}}\nspec:\n  rules:\n{rules}")
    file = shell.file("large.yaml", "---\n".join(documents))
    table = shell.ok("apply", "-f", file).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["policy", "created", "1"],
        ["route", "created", "10000"],
        ["tenant", "created", "1"],
    ]
    assert len(shell.json("route", "list", "--tenant", "acme")["routes"]) == 10_000
    assert "route   unchanged  10000" in shell.ok("apply", "-f", file)
