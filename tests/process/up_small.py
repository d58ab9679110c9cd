"""`falkirk up` and `falkirk doctor` with one small service in place of six: the first argument is the command, the rest its options."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from falkirk.cli import checks, doctor, supervisor, up
from falkirk.runtime.settings import Section

SERVICE = Path(__file__).with_name("runtime_service.py")


def main() -> None:
    app = typer.Typer()
    for module in (up, doctor, checks):
        module.__dict__["SERVICES"] = ("registry",)
    checks.section_kind = lambda service: Section
    supervisor._module = lambda service: [sys.executable, str(SERVICE)]
    up.register(app)
    doctor.register(app)
    app()


if __name__ == "__main__":
    main()
