"""What the doctor says of an interpreter, and of echo."""

from __future__ import annotations

import pytest

from falkirk.cli.checks import echo, interpreter

PLAIN = {"CONFIG_ARGS": "'--prefix=/root/.pyenv/versions/3.11.7' '--enable-shared'", "PY_CORE_CFLAGS": "-O3 -Wall"}


@pytest.mark.parametrize(
    ("variables", "prefix", "state"),
    [
        (PLAIN, "/root/.pyenv/versions/3.11.7", "warning"),
        ({"CONFIG_ARGS": None, "PY_CORE_CFLAGS": None}, "/opt/python", "warning"),
        (
            PLAIN | {"PGO_PROF_USE_FLAG": "-fprofile-use"},
            "/opt/python",
            "warning",
        ),  # what it would use, not what it did
        (PLAIN | {"CONFIG_ARGS": "'--prefix=/usr/local' '--enable-optimizations'"}, "/usr/local", "ok"),
        (PLAIN | {"PY_CFLAGS_NODIST": "-fprofile-use -fprofile-correction"}, "/opt/conda", "ok"),
        (PLAIN | {"PY_CORE_CFLAGS": "-fprofile-instr-use=code.profclangd"}, "/opt/python", "ok"),
        ({"CONFIG_ARGS": "'--prefix=/usr'"}, "/usr", "ok"),  # Debian's names no profile, and has one
    ],
)
def test_an_interpreter_without_optimisation_is_warned_of(
    variables: dict[str, object], prefix: str, state: str
) -> None:
    check = interpreter(variables, prefix)
    assert (check.name, check.state) == ("python", state)
    assert ("--enable-optimizations" in check.remedy) == (state == "warning")


@pytest.mark.parametrize(("kind", "state"), [("ping", "ok"), ("raw", "ok"), ("", "warning")])
def test_how_echo_leaves_is_told(kind: str, state: str) -> None:
    check = echo(kind)
    assert (check.name, check.state) == ("echo", state)
    assert ("ping_group_range" in check.remedy) == (state != "ok")
