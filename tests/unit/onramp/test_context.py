"""What holds for every parser's result."""

from __future__ import annotations

from typing import Any

import pytest

from falkirk.onramp.context import Code, ContextRequest, Refusal, checked, shown


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": ""},
        {"device": ""},
        {"tenant": 1},
        {"virtual_network": "\ud800"},
        {"framing": "raw"},
        {"attributes": {"a": 1}},
        {"attributes": {1: "a"}},
        {"attributes": ["a"]},
    ],
)
def test_wrong_requests_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        checked(ContextRequest(**{"tenant": "a", "device": "b", **fields}))
    assert caught.value.code is Code.INVALID_CONTEXT


def test_shown_is_short_and_escaped() -> None:
    assert shown("a\n\x1b[31m") == '"a\\n\\u001b[31m"'
    assert len(shown("x" * 10_000)) <= 80
