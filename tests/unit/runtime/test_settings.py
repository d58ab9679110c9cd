"""Settings: one file, frozen values, every mistake named with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.runtime import settings
from falkirk.runtime.settings import Section, SettingsError


class Limits(Section, frozen=True, kw_only=True):
    """A nested section."""

    flows: int = 10


class Flow(Section, frozen=True, kw_only=True):
    """A section as services have it."""

    limits: Limits = Limits()
    names: tuple[str, ...] = ()
    spool: Path = Path("spool")


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FALKIRK_CONFIG", "FALKIRK_RUN_DIR", "FALKIRK_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


HEAD = "apiVersion: falkirk.dev/v1alpha1\nkind: Settings\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "falkirk.yaml"
    path.write_text(text)
    return path


def test_no_file_gives_defaults(tmp_path: Path) -> None:
    shell, flow = settings.load(None, "flow", Flow, run_dir=tmp_path / "run", data_dir=tmp_path / "data")
    assert (shell.node, shell.workers, flow) == ("local", 1, Flow())
    assert shell.socket("mesh", "flow") == tmp_path / "run/mesh/flow.sock"
    assert shell.data("flow") == tmp_path / "data/flow"


def test_a_whole_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        HEAD
        + f"run_dir: {tmp_path}/r\nnode: n1\nworkers: 3\nmesh_uids: [7]\nroads: {{read: {{mode: 0o750, group: staff}}}}\n"
        + "telemetry: {otlp_endpoint: 'localhost:4317', sample_ratio: 1}\nmetrics: {flow: '[::1]:9000'}\n"
        + "flow: {limits: {flows: 3}, names: [a, b], spool: /x}\nrouter: {not: judged here}\n",
    )
    shell, flow = settings.load(path, "flow", Flow, data_dir=tmp_path)
    assert shell.run_dir == tmp_path / "r"
    assert (shell.roads.read.mode, shell.roads.read.group, shell.roads.admin.mode) == (0o750, "staff", 0o700)
    assert (shell.workers, shell.mesh_uids, shell.telemetry.sample_ratio) == (3, (7,), 1.0)
    assert flow == Flow(limits=Limits(flows=3), names=("a", "b"), spool=Path("/x"))


def test_argument_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, HEAD + "run_dir: /from/file\ndata_dir: /from/file\n")
    monkeypatch.setenv("FALKIRK_RUN_DIR", "/from/environment")
    monkeypatch.setenv("FALKIRK_DATA_DIR", "/from/environment")
    shell, _ = settings.load(path, "flow", Flow, run_dir=Path("/from/argument"))
    assert (str(shell.run_dir), str(shell.data_dir)) == ("/from/argument", "/from/environment")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: Settings\n", "apiVersion must be falkirk.dev/v1alpha1"),
        ("[]", "must be a mapping"),
        (HEAD + "flwo: {}\n", "flwo: unknown key"),
        (HEAD + "log: {levle: info}\n", "log.levle: unknown key"),
        (HEAD + "log: {level: loud}\n", "log.level: Invalid enum value"),
        (HEAD + "flow: {limits: {flosw: 1}}\n", "flow.limits.flosw: unknown key"),
        (HEAD + "flow: {limits: {flows: many}}\n", "flow.limits.flows: Expected `int`"),
        (HEAD + "flow: []\n", "flow: Expected `object`"),
        (HEAD + "node: a\nnode: b\n", "duplicate key 'node'"),
        (HEAD + "workers: 65\n", "workers must lie between 1 and 64"),
        (HEAD + "telemetry: {sample_ratio: 2}\n", "sample_ratio must lie"),
        (HEAD + "metrics: {flow: nonsense}\n", "is not host:port"),
        (HEAD + "run_dir: /" + "x" * 90 + "\n", "choose a shorter directory"),
        (HEAD + "a: b: c\n", "mapping values are not allowed"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load(write(tmp_path, text), "flow", Flow)
    assert said in str(caught.value)
    assert "falkirk.yaml" in str(caught.value) or "run_dir" in str(caught.value)


def test_unknown_keys_are_refused_even_where_a_struct_would_tolerate_them(tmp_path: Path) -> None:
    import msgspec

    class Lax(msgspec.Struct, frozen=True):
        limits: dict[str, Limits] = {}

    path = write(tmp_path, HEAD + "flow: {limits: {a: {flows: 1}, b: {flwos: 1}}}\n")
    with pytest.raises(SettingsError, match=r"flow\.limits\.b\.flwos: unknown key"):
        settings.load(path, "flow", Lax)


def test_arguments_end_the_process_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.arguments("flow", Flow, ["--config", str(write(tmp_path, HEAD + "x: 1\n"))])
    assert caught.value.code == 2
    assert "x: unknown key" in capsys.readouterr().err


def test_arguments(tmp_path: Path) -> None:
    shell, flow = settings.arguments("flow", Flow, ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)])
    assert (shell.run_dir, flow) == (tmp_path, Flow())
