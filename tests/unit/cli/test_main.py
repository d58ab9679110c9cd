"""The command line's head: quick help, services by name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from falkirk.cli import main
from falkirk.runtime import settings


def test_services_are_the_settings_services() -> None:
    assert set(main.SERVICES) == set(settings.SERVICES)


@pytest.mark.parametrize(
    ("arguments", "service"),
    [
        ([], False),
        (["--help"], False),
        (["up"], False),
        (["registry"], True),
        (["registry", "--help"], True),
        (["flow"], True),
        (["flow", "--run-dir", "/x"], True),
        (["flow", "--config=/x"], True),
        (["flow", "--help"], False),
        (["flow", "list"], False),
        (["policy", "create"], False),
    ],
)
def test_which_words_start_a_service(arguments: list[str], service: bool) -> None:
    assert main._is_service(arguments) is service


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['falkirk', '--help']\n"
        "import falkirk.cli.main as m\n"
        "try: m.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'grpc', 'google.protobuf', 'rich', 'yaml', 'falkirk.cli.up'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for name in (*main.COMMANDS, *main.SERVICES):
        assert f"\n  {name} " in done.stdout
