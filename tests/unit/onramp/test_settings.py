"""Settings of the on-ramp."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from falkirk.onramp.settings import Settings
from falkirk.runtime.settings import SettingsError, load

HEAD = "apiVersion: falkirk.dev/v1alpha1\nkind: Settings\n"


def read(tmp_path: Path, section: str) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(HEAD + section)
    return load(path, "onramp", Settings, run_dir=tmp_path, data_dir=tmp_path)[1]


def test_defaults_let_in_the_own_uid_and_root(tmp_path: Path) -> None:
    assert dict(read(tmp_path, "").grants()) == {0: ("*",), os.getuid(): ("*",)}
    assert set(read(tmp_path, "").device_uids()) == {0, os.getuid()}


def test_grants(tmp_path: Path) -> None:
    section = "onramp:\n  tunnels:\n  - {uid: 1000, tenants: [acme]}\n  - {uid: 1001}\n  mtu: 9000\n"
    found = read(tmp_path, section)
    assert found.grants() == ((1000, ("acme",)), (1001, ("*",)))
    assert found.device_uids() == ()
    assert found.mtu == 9000


@pytest.mark.parametrize(
    "wrong", ["mtu: 1279", "max_pending: 0", "tunnel_mode: 0o1777", "tunnels: [{user: 0}]", "x: 1"]
)
def test_wrong_settings_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(SettingsError):
        read(tmp_path, f"onramp: {{{wrong}}}")
