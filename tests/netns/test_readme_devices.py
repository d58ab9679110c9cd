"""The README's two devices, as they stand there: stock wireguard-go by the files that `falkirk device config` writes, each other's names.

Limit: the phone's file is written as the laptop's, since there is no camera; `wg-quick up` is done by hand, so that the machine's DNS stays
(`tools.wg_device`). Needs root, wireguard-go and wireguard-tools.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tools.netlab import Lab, wait_for
from tools.wg_device import StockDevice

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
NODE = "198.18.120.1"

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]


def blocks() -> list[str]:
    """The shell blocks of the section."""
    section = README.split("## Two devices in five minutes")[1].split("\n## ")[0]
    found = re.findall(r"^   ```sh\n(.*?)^   ```$", section, re.MULTILINE | re.DOTALL)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in found]


def test_from_nothing_to_a_ping_by_name() -> None:
    mesh, devices, use = blocks()
    with tempfile.TemporaryDirectory(prefix="fk-") as place, Lab() as lab:
        node = lab.namespace("node")
        phone, laptop = (StockDevice(lab, name, Path(place)) for name in ("phone", "laptop"))
        for number, device in enumerate((phone, laptop)):
            lab.cable(node, device.namespace, [f"198.18.{120 + number}.1/24"], [f"198.18.{120 + number}.2/24"])
        laptop.namespace.run("ip", "route", "add", f"{NODE}/32", "via", "198.18.121.1")
        # The user's .venv is the one that runs this test; the mesh goes where nobody else's is.
        shim = Path(place, "falkirk")
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m falkirk.cli.main "$@"\n')
        shim.chmod(0o755)
        setting = mesh.replace("/tmp/fk", place).replace("node.example", NODE)
        head, rest = setting.split(". .venv/bin/activate", 1)
        assert head.startswith("git clone")
        environment, apply = rest.split("cat > falkirk.yaml", 1)
        settings, apply = apply.split("falkirk up --config falkirk.yaml 2> falkirk.log &\n")
        inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        inherited["PYTHONPATH"] = os.pathsep.join(sys.path)

        def command(script: str) -> list[str]:
            return node.command("bash", "-euc", f"cd {place}\nexport PATH={place}:$PATH{environment}\n{script}")

        def shell(script: str) -> str:
            done = subprocess.run(
                command(script), capture_output=True, text=True, timeout=60, check=False, env=inherited
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        lab.start(
            command(f"cat > falkirk.yaml{settings}\nexec falkirk up --config falkirk.yaml"), env=inherited, stop_s=45
        )
        shell(apply)
        wait_for("the node, by the registry", lambda: "local" in shell("falkirk node list"), 20)
        assert "--format qr" in devices
        shell(devices.replace("--format qr", "--out phone.conf"))
        for device in (phone, laptop):
            file = Path(place, f"{device.name}.conf")
            assert file.stat().st_mode & 0o777 == 0o600
            device.join_by(file)
        assert "wg-quick up ./laptop.conf" in use
        ping = use.splitlines()[-1]
        name = ping.split()[1]
        assert ping == "ping phone.acme.falkirk"
        resolver = Path(place, "resolv.conf")
        found = re.search(r"^DNS = ([^,]+)", Path(place, "laptop.conf").read_text(), re.MULTILINE)
        assert found is not None
        resolver.write_text(f"nameserver {found[1]}\n")
        # The phone has to come first: its keepalive is what does it, every 25 s and at once.
        inside = f"mount --bind {resolver} /etc/resolv.conf && exec ping -c 1 -W 5 {name}"
        done = subprocess.run(
            laptop.namespace.command("unshare", "--mount", "sh", "-c", inside),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        show = "falkirk device list --tenant acme"
        assert show in README
        wait_for("both devices' presence", lambda: shell(show).count(" local ") == 2, 20)
        disable = "falkirk device disable phone --tenant acme"
        assert disable in README
        shell(disable)
        address = re.search(r"^Address = ([^/,]+)", Path(place, "phone.conf").read_text(), re.MULTILINE)
        assert address is not None
        assert not laptop.ping(address[1], seconds=1)
