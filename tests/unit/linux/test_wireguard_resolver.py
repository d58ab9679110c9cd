"""DNS while an interface is up, on a file of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.linux.wireguard.resolver import Resolver

BEFORE = "nameserver 192.0.2.1\noptions edns0\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A resolv.conf on a machine without resolvconf."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    path = tmp_path / "resolv.conf"
    path.write_text(BEFORE)
    return path


def resolver(path: Path) -> Resolver:
    return Resolver("falkirk0", path.parent / "kept", path, path.parent / "nothing")


def test_the_file_is_ours_while_it_is_up_and_what_it_was_after(path: Path) -> None:
    inode = path.stat().st_ino
    ours = resolver(path)
    assert ours.set_up(["100.96.0.53", "fd00::53"], ["acme.falkirk"]) == str(path)
    assert path.read_text().splitlines()[1:] == ["search acme.falkirk", "nameserver 100.96.0.53", "nameserver fd00::53"]
    # It may be a mount: written in place.
    assert path.stat().st_ino == inode
    ours.tear_down()
    assert path.read_text() == BEFORE
    assert not (path.parent / "kept").exists()
    ours.tear_down()
    assert path.read_text() == BEFORE


def test_what_a_killed_one_left_is_put_back_first(path: Path) -> None:
    resolver(path).set_up(["100.96.0.53"], [])
    again = resolver(path)
    again.set_up(["100.96.0.54"], [])
    again.tear_down()
    assert path.read_text() == BEFORE


def test_resolvconf_and_resolved_are_asked_where_they_rule(path: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("resolvconf", "resolvectl"):
        (tools / name).write_text(
            f'#!/bin/sh\n{{ echo "{name} $*"; [ "$2" != falkirk0 ] || /bin/cat; }} >>{tmp_path}/asked </dev/stdin\n'
        )
        (tools / name).chmod(0o755)
    ours = resolver(path)
    assert ours.set_up(["100.96.0.53"], ["acme.falkirk"]) == "resolvconf"
    ours.tear_down()
    (tmp_path / "there").touch()
    resolved = Resolver("falkirk0", tmp_path / "kept", path, tmp_path / "there")
    assert resolved.set_up(["100.96.0.53"], ["acme.falkirk"]) == "systemd-resolved"
    resolved.tear_down()
    assert (tmp_path / "asked").read_text().splitlines() == [
        "resolvconf -a falkirk0",
        "search acme.falkirk",
        "nameserver 100.96.0.53",
        "resolvconf -d falkirk0",
        "resolvectl dns falkirk0 100.96.0.53",
        "resolvectl domain falkirk0 acme.falkirk ~.",
    ]
    assert path.read_text() == BEFORE


def test_a_tool_that_fails_is_told(path: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "resolvconf").write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    (tools / "resolvconf").chmod(0o755)
    with pytest.raises(OSError, match="resolvconf -a falkirk0: no such thing"):
        resolver(path).set_up(["100.96.0.53"], [])
