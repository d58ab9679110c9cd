"""The committed corpus is replayed whole; where atheris is installed, each target is then sought through for a few seconds."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.coverage import HERE, ROOT, TARGETS, corpus, environment

SECONDS = 2
MAX_BYTES = 300_000


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[[bytes], None]]]:
    module = importlib.import_module(f"tests.fuzz.fuzz_{request.param}")
    yield request.param, module.one
    getattr(module, "close", lambda: None)()


def test_the_whole_corpus_is_taken(target: tuple[str, Callable[[bytes], None]]) -> None:
    name, one = target
    inputs = sorted(corpus(name).iterdir())
    assert len(inputs) > 20
    for path in inputs:
        try:
            one(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.relative_to(HERE)}: {error!r}") from error


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in (HERE / "corpus").rglob("*") if path.is_file()) < MAX_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_seconds_of_search_find_nothing(name: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    if importlib.util.find_spec("atheris") is None:
        # atheris is a development requirement of some Pythons only: see pyproject.toml.
        assert sys.version_info >= (3, 14) or sys.platform != "linux"
        return
    limits = [f"-max_total_time={SECONDS}", "-timeout=20", "-max_len=3000", f"-artifact_prefix={tmp_path}/"]
    script = HERE / f"fuzz_{name}.py"
    run = subprocess.run(
        [sys.executable, str(script), *limits, str(found), str(corpus(name))],
        cwd=ROOT,
        env=environment(tempfile.gettempdir()),
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-4000:]
    assert b"Done " in run.stderr
