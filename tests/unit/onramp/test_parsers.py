"""Parsers by name, and third-party parsers that fail."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from falkirk.onramp import context_json, parsers
from falkirk.onramp.context import Code, ContextRequest, Refusal


def test_built_in_parsers() -> None:
    assert parsers.load("json") is context_json.parse
    assert parsers.load("protobuf").__module__ == "falkirk.onramp.context_protobuf"


def test_unknown_parser_is_told_with_those_that_there_are() -> None:
    with pytest.raises(parsers.UnknownParser, match="json"):
        parsers.load("nothing")


def test_entry_points_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_parser.py").write_text(
        "from falkirk.onramp.context import ContextRequest\n"
        "def parse(data):\n    tenant, device = data.decode().split('/')\n    return ContextRequest(tenant, device)\n"
    )
    info = tmp_path / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[falkirk.context_parsers]\nacme = acme_parser:parse\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    parse = parsers.load("acme")
    assert parse(b"a/b") == ContextRequest("a", "b")
    for wrong in (b"ab", b"/", b"\xff"):
        with pytest.raises(Refusal):
            parse(wrong)


def raising(error: Exception) -> Any:
    def parse(_: bytes) -> Any:
        raise error

    return parse


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), TypeError("x"), RecursionError(), ZeroDivisionError()]
)
def test_a_parser_that_fails_refuses(error: Exception) -> None:
    with pytest.raises(Refusal) as caught:
        parsers.guarded(raising(error))(b"x")
    assert caught.value.code is Code.INVALID_CONTEXT
    assert type(error).__name__ in caught.value.message


def test_a_parser_may_refuse_by_itself() -> None:
    with pytest.raises(Refusal) as caught:
        parsers.guarded(raising(Refusal(Code.UNSUPPORTED_VERSION, "v")))(b"x")
    assert caught.value.code is Code.UNSUPPORTED_VERSION


def test_a_parser_that_gives_something_else_refuses() -> None:
    with pytest.raises(Refusal):
        parsers.guarded(lambda _: {"tenant": "a"})(b"x")
