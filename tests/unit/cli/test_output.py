"""Tables and JSON."""

from __future__ import annotations

import json

import pytest

from falkirk.api.net.v1.net_pb2 import Counter
from falkirk.cli.output import joined, print_json, print_table


def test_a_table_is_as_wide_as_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "disabled", "note"], [["a", True, ""], ["longer", False, "x"], ["日本", None, 7]])
    assert capsys.readouterr().out.splitlines() == [
        "NAME    DISABLED  NOTE",
        "a       yes",
        "longer            x",
        "日本              7",
    ]


def test_a_cell_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["x"], [["\x1b[2J\n"]])
    assert capsys.readouterr().out == "X\n\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\n"


def test_json_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(Counter(name="é"), line=True)
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert json.loads(text) == {"name": "é", "value": "0"}
    print_json(Counter(name="b", value=1))
    assert json.loads(capsys.readouterr().out) == {"name": "b", "value": "1"}


def test_a_list_is_one_cell() -> None:
    assert joined(["a", "b"]) == "a,b"
