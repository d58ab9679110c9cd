"""A device's files: kept as they were written, for their owner only, and refused by name where they can't be used."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from falkirk.cli.device_state import BadState, Enrolled, Place, State, Tunnel, default_folder
from falkirk.linux.wireguard.request import PeerRequest, decode

KEY = bytes(range(32))
TUNNEL = Tunnel(
    addresses=("100.96.0.7", "fd00::7"),
    dns=("100.96.0.53",),
    search=("acme.falkirk",),
    peers=(PeerRequest(public_key=bytes(32), endpoints=("192.0.2.1:51820",), allowed=("100.96.0.0/12",)),),
)
ENROLLED = Enrolled(
    private_key=KEY, place=Place(run_dir="/run/falkirk"), device_id="d", tenant="acme", name="laptop", tunnel=TUNNEL
)


def test_written_is_read_and_nobody_elses(tmp_path: Path) -> None:
    state = State(tmp_path / "device")
    assert state.read() is None
    state.write(msgspec.structs.replace(ENROLLED, device_id=""))
    state.write(ENROLLED)
    assert state.read() == ENROLLED
    assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
    state.write_interface(ENROLLED, "", dns=True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in state.folder.iterdir()} == {0o600}
    assert sorted(path.name for path in state.folder.iterdir()) == ["device.json", "interface.json"]


@pytest.mark.parametrize("dns", [True, False])
def test_an_interface_has_host_addresses_and_dns_where_wanted(tmp_path: Path, dns: bool) -> None:
    state = State(tmp_path)
    request = state.write_interface(ENROLLED, "wg7", dns=dns)
    assert decode(state.interface.read_bytes()) == request
    assert request.addresses == ("100.96.0.7/32", "fd00::7/128")
    assert (request.name, request.control) == ("wg7", str(state.socket))
    assert (request.dns, request.search) == ((TUNNEL.dns, TUNNEL.search) if dns else ((), ()))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"private_key": 1}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "device.json").write_text(text)
    with pytest.raises(BadState, match=r"device\.json"):
        State(tmp_path).read()


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.write(msgspec.structs.replace(ENROLLED, version=2))
    with pytest.raises(BadState, match="version 2"):
        state.read()


def test_a_tunnel_that_cannot_be_is_refused(tmp_path: Path) -> None:
    bad = msgspec.structs.replace(ENROLLED, tunnel=msgspec.structs.replace(TUNNEL, mtu=100))
    with pytest.raises(BadState, match="mtu: 100"):
        State(tmp_path).write_interface(bad, "", dns=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadState, match="file"):
        State(tmp_path / "file" / "device").write(ENROLLED)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALKIRK_DEVICE_DIR", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("FALKIRK_DEVICE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_folder() == tmp_path / "falkirk" / "device"
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_folder() == Path("/var/lib/falkirk/device")
