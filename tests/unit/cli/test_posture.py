"""Facts, read from a tree that looks like a machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from falkirk.cli.posture import collect


def machine(root: Path, *, mounts: str, blocks: dict[str, str], slaves: dict[str, list[str]]) -> Path:
    """A machine with these mounts, block devices (with their dm uuid, or none), and which lie on which."""
    files = {
        "etc/os-release": 'NAME="Debian GNU/Linux"\nID=debian\nVERSION_ID="12"\n# comment\n',
        "sys/class/dmi/id/product_serial": "ABC-123\n",
        "proc/self/mounts": mounts,
    }
    for name, uuid in blocks.items():
        files[f"sys/class/block/{name}/dm/uuid" if uuid else f"sys/class/block/{name}/size"] = uuid
        files[f"dev/{name}"] = ""
    for name, below in slaves.items():
        for each in below:
            files[f"sys/class/block/{name}/slaves/{each}/size"] = ""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_files_say(tmp_path: Path) -> None:
    facts = collect(machine(tmp_path, mounts="/dev/sda1 / ext4 rw 0 0\n", blocks={"sda1": ""}, slaves={}))
    assert (facts["os"], facts["os_version"], facts["serial"]) == ("debian", "12", "ABC-123")
    assert facts["disk_encryption"] == "no"
    assert set(facts) == {"os", "os_version", "kernel", "arch", "hostname", "client", "serial", "disk_encryption"}


@pytest.mark.parametrize(
    ("mounts", "blocks", "slaves", "encrypted"),
    [
        ("/dev/dm-0 / ext4 rw 0 0\n", {"dm-0": "CRYPT-LUKS2-1"}, {}, "yes"),
        # LVM on dm-crypt.
        ("/dev/dm-1 / ext4 rw 0 0\n", {"dm-1": "LVM-1", "dm-0": "CRYPT-LUKS2-1"}, {"dm-1": ["dm-0"]}, "yes"),
        # dm-crypt elsewhere is no help to /.
        ("/dev/dm-0 /home ext4 rw 0 0\n/dev/sda1 / ext4 rw 0 0\n", {"dm-0": "CRYPT-LUKS2-1", "sda1": ""}, {}, "no"),
        # The last mount on / is the one that is seen.
        ("/dev/sda1 / ext4 rw 0 0\n/dev/dm-0 / ext4 rw 0 0\n", {"dm-0": "CRYPT-1", "sda1": ""}, {}, "yes"),
        # A container: nobody knows.
        ("overlay / overlay rw 0 0\n", {}, {}, None),
        ("/dev/vda / ext4 rw 0 0\n", {}, {}, None),
    ],
)
def test_disk_encryption(
    tmp_path: Path, mounts: str, blocks: dict[str, str], slaves: dict[str, list[str]], encrypted: str | None
) -> None:
    assert collect(machine(tmp_path, mounts=mounts, blocks=blocks, slaves=slaves)).get("disk_encryption") == encrypted


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert set(collect(tmp_path)) == {"os", "kernel", "arch", "hostname", "client"}
