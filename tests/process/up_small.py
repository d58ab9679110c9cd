"""`falkirk up` and `falkirk doctor` with one small service in place of six: the first argument is the command, the rest its options.

UP_SMALL_NURSERY is another program to fork from.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from falkirk.cli import checks, doctor, nursery, up
from falkirk.runtime.settings import Section

NURSERY = Path(__file__).with_name("small_nursery.py")


def main() -> None:
    app = typer.Typer()
    for module in (up, doctor, checks):
        module.__dict__["SERVICES"] = ("registry",)
    checks.section_kind = lambda service: Section
    nursery.Nursery.program = (os.environ.get("UP_SMALL_NURSERY", str(NURSERY)),)
    up.register(app)
    doctor.register(app)
    app()


if __name__ == "__main__":
    main()
