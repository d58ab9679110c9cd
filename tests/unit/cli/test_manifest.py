"""YAML documents: what they become, and where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from falkirk.cli import manifest
from falkirk.cli.fields import SPECS
from falkirk.cli.manifest import KINDS, ManifestError

HEAD = "apiVersion: falkirk.dev/v1alpha1\n"
POLICY = f"""\
# A comment above.
{HEAD}kind: Policy
metadata:
  name: web
  tenant: acme
  labels: {{team: "7"}}
spec:
  priority: -5
  rules:
  - name: https
    when: |
      net.port == 443 &&
      net.protocol == "tcp"
    action: allow
    treatment: l4
  - {{name: rest, when: "true", action: deny}}
---
{HEAD}kind: Route
metadata: {{name: r, tenant: acme}}
spec:
  prefix: 10.0.0.0/8
  target: {{blackhole: }}
"""


def test_documents_become_resources() -> None:
    policy, route = manifest.parse("f.yaml", POLICY)
    assert (policy.kind, policy.value.metadata.name, policy.value.metadata.labels["team"]) == ("policy", "web", "7")
    assert (policy.value.priority, [rule.action for rule in policy.value.rules]) == (-5, [1, 2])
    assert policy.value.rules[0].when == 'net.port == 443 &&\nnet.protocol == "tcp"\n'
    assert route.value.target.WhichOneof("target") == "blackhole"


def test_a_field_is_found_in_its_document() -> None:
    policy, route = manifest.parse("f.yaml", POLICY)
    assert policy.locate("rules[0].when") == "f.yaml:12"
    assert policy.locate("rules[1].action") == "f.yaml:17"
    assert policy.locate("metadata.name") == "f.yaml:5"
    assert policy.locate("comment") == "f.yaml:8"
    assert policy.locate("") == "f.yaml:8"
    assert route.locate("target.blackhole") == "f.yaml:24"


def test_what_is_rendered_is_what_was_read() -> None:
    for document in manifest.parse("f.yaml", POLICY):
        (again,) = manifest.parse("again", manifest.render(document.value))
        assert again.resource == document.resource


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}kind: User\nmetadata: {{name: a, tenant: t}}\nspec: {{emial: x}}", "f.yaml:4: spec.emial: unknown key; did you mean email?"),
        (f"{HEAD}kind: User\nmetadata: {{name: a, id: x}}", "f.yaml:3: metadata.id: unknown key"),
        (f"{HEAD}kind: User\nmetadata: {{name: 7}}", "f.yaml:3: metadata.name: must be text; quote it: '7'"),
        (f"{HEAD}kind: Usr\nmetadata: {{name: a}}", "f.yaml:2: kind: must be Tenant or User"),
        ("apiVersion: v1\nkind: User\nmetadata: {name: a}", "f.yaml:1: apiVersion: must be falkirk.dev/v1alpha1"),
        ("kind: User", "f.yaml:1: apiVersion: is missing"),
        (f"{HEAD}kind: User", "f.yaml:1: metadata: is missing"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\nspek: {{}}", "f.yaml:4: spek: unknown key; did you mean spec?"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\nspec:\n  groups: x", "f.yaml:5: spec.groups: must be a list"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\nspec:\n  groups: [[x]]", "f.yaml:5: spec.groups[0]: must be a single value"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\nspec:\n  disabled: yes", "f.yaml:5: spec.disabled: must be true or false"),
        (f"{HEAD}kind: Device\nmetadata: {{name: a}}\nspec:\n  maxFlows: -1", "f.yaml:5: spec.maxFlows: must be a whole number from 0"),
        (f"{HEAD}kind: Device\nmetadata: {{name: a}}\nspec:\n  maxFlows: 010", "f.yaml:5: spec.maxFlows: must be a whole number"),
        (f"{HEAD}kind: Device\nmetadata: {{name: a}}\nspec:\n  posture: {{a: 1}}", "f.yaml:5: spec.posture.a: must be text"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\nspec:\n  email: a\n  email: b", "f.yaml:6: spec.email: is given twice"),
        (f"{HEAD}kind: Policy\nmetadata: {{name: a}}\nspec:\n  rules: [{{action: permit}}]", "f.yaml:5: spec.rules[0].action: must be allow or deny"),
        (f"{HEAD}kind: Route\nmetadata: {{name: a}}\nspec:\n  target:\n    internet: {{}}\n    blackhole: {{}}", "f.yaml:7: spec.target.blackhole: can't stand beside internet"),
        (f"{HEAD}kind: User\nmetadata: {{name: a}}\n---\n- x", "f.yaml:5: document: must be a mapping"),
        ("a: [", "f.yaml:"),
        ("a: b: c", "f.yaml:1:"),
        ("? [a]\n: b", "f.yaml:1: document: has a key"),
        ("\x00", "f.yaml"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_line_and_field(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.parse("f.yaml", text)
    assert str(caught.value).startswith(message)


def test_directories_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(f"{HEAD}kind: Tenant\nmetadata: {{name: b}}\n---\n")
    (tmp_path / "a.yml").write_text(f"---\n{HEAD}kind: Tenant\nmetadata: {{name: a}}\n")
    (tmp_path / "c.txt").write_text("not read")
    assert [document.value.metadata.name for document in manifest.read([tmp_path])] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    for path, message in [("empty", "holds no"), ("missing", "No such file"), ("latin.yaml", "isn't UTF-8")]:
        (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe")
        with pytest.raises(ManifestError, match=message):
            manifest.read([tmp_path / path])


def test_the_table_of_commands_knows_every_kind() -> None:
    assert [spec.name for spec in SPECS] == [*KINDS.values()]
    for spec in SPECS:
        value: Any = getattr(spec.messages, spec.service.removesuffix("Service"))()
        for show in spec.columns.values():
            show(value)
