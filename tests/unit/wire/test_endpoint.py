"""Endpoints as text, both ways."""

from __future__ import annotations

import pytest

from falkirk.wire.endpoint import endpoint_text, host_and_port


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("192.0.2.1", 51820), "192.0.2.1:51820"),
        (("::ffff:192.0.2.1", 51820, 0, 0), "192.0.2.1:51820"),
        (("2001:db8::1", 1, 0, 0), "[2001:db8::1]:1"),
    ],
)
def test_an_address_comes_back(address: tuple[object, ...], text: str) -> None:
    assert endpoint_text(address) == text
    assert host_and_port(text) == (str(address[0]).removeprefix("::ffff:"), address[1])


def test_none_is_empty_and_a_name_is_a_host() -> None:
    assert endpoint_text(None) == ""
    assert host_and_port("node.example:51820") == ("node.example", 51820)


@pytest.mark.parametrize(
    "text", ["", ":1", "a", "a:", "a:0", "a:65536", "a:-1", "a:x", "2001:db8::1:51820", "[::1]", "[]:1"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="isn't host:port"):
        host_and_port(text)
