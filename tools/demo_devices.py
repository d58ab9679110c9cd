"""The demo's two devices: `phone` is stock wireguard-go by wg-quick's file, `desk` is `falkirk device enroll` and `up`.

Each is in a namespace of its own, cabled to the machine. The phone pings a server behind Falkirk and the desk, takes a page from the desk by name,
logs in there by ssh (where dropbear and ssh are installed), is denied one of its ports by a rule that names who it is, and is disabled in the
middle of a download.

Names are looked up at the tenant's resolver, by an /etc/resolv.conf that only the commands run here see: the machine's own DNS isn't touched.

Limits: needs root, wireguard-go and wireguard-tools; without them the demo goes on without devices, and says so.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from tools.load import http_server
from tools.mesh import Mesh, resource, rule
from tools.netlab import Lab, LabError, Namespace, stop, wait_for
from tools.own_device import OwnDevice
from tools.wg_device import StockDevice

TENANT: Final = "acme"
RESOLVER: Final = "100.96.0.53"
"""Of a tenant that has chosen no pool."""
HTTP: Final = 80
ADMINS: Final = 8443
SSH: Final = 22
RULE: Final = "desk-for-admins"
FLOWING: Final = 32 << 20
"""Bytes after which a download is on its way."""
ENDLESS: Final = 1 << 40
PATIENCE_S: Final = 20.0
QUIET_S: Final = 0.5
"""Nothing for so long, with its flows ended: nothing comes any more."""


def missing() -> str:
    """What isn't installed; empty where the devices can be shown."""
    return ", ".join(name for name in ("wireguard-go", "wg", "ping") if shutil.which(name) is None)


class Devices:
    """Both, and what they show. `head` and `line` print for people."""

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        mesh: Mesh,
        server: str,
        head: Callable[[str], None],
        line: Callable[[str], None],
    ) -> None:
        self._mesh, self._server, self._head, self._line = mesh, server, head, line
        self._directory = directory / "devices"
        self._directory.mkdir(mode=0o700)
        self.phone = StockDevice(lab, "phone", self._directory)
        self._desk = OwnDevice(lab, "desk", self._directory, mesh)
        self.desk: Namespace = self._desk.namespace
        net = f"198.19.{lab.number}"
        for at, namespace in ((0, self.phone.namespace), (4, self.desk)):
            lab.cable(None, namespace, [f"{net}.{at + 1}/30"], [f"{net}.{at + 2}/30"])
            namespace.run("ip", "route", "add", "default", "via", f"{net}.{at + 1}")
        self._address, self._port = f"{net}.1", _free_port(f"{net}.1")
        self._addresses: dict[str, list[str]] = {}
        self.result: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """What the on-ramp is told."""
        endpoint = f"{self._address}:{self._port}"
        return {"wireguard": {"address": self._address, "port": self._port, "endpoints": [endpoint]}}

    def resources(self) -> Iterator[dict[str, Any]]:
        """The phone, whose key comes with its file; the desk comes by a token."""
        yield resource("User", "bob", TENANT, groups=["staff"])
        yield resource("Device", "phone", TENANT, user="bob")

    @staticmethod
    def rules() -> Iterator[dict[str, str]]:
        """Who reaches which port of whom."""
        when = f'net.dst_device == "desk" && net.port == {ADMINS} && !("admins" in identity.groups)'
        yield rule(RULE, when, "deny")

    def show(self) -> dict[str, Any]:
        """Every step; what --json prints of them."""
        try:
            for step in (self._join, self._ping, self._page, self._ssh, self._denied, self._revoked):
                step()
        finally:
            # A demo whose namespaces are kept leaves no client in them.
            self._desk.down()
        return self.result

    def good(self) -> bool:
        """True where every step did what it should; ssh may be missing."""
        found = self.result
        return (
            all(found[step] for step in ("wireguard_go_ping", "by_name_http", "denied"))
            and found["ssh"] is not False
            and found["revoked_ms"] is not None
            and found["revoked_ms"] < 1000
        )

    def _join(self) -> None:
        self._head("Two devices: phone is stock wireguard-go, desk is falkirk device")
        wait_for("the node, by the registry", lambda: bool(self._mesh.ask_json("nodes", "node", "list")), PATIENCE_S)
        file = self._directory / "phone.conf"
        words = ("device", "config", "phone", "--tenant", TENANT, "--out", str(file))
        self._mesh.ask(*words)
        self._line(f"phone (bob's): falkirk {' '.join(words)}")
        self._addresses["phone"] = self._given("phone")
        self.phone.join_by(file)
        for text in file.read_text().splitlines():
            self._line(f"    {text}" if not text.startswith("PrivateKey") else "    PrivateKey = ...")
        self._enrol()
        self._addresses["desk"] = self._given("desk")
        script = str(Path(http_server.__file__).resolve())
        for port in (HTTP, ADMINS):
            self.desk.start(sys.executable, script, "--port", str(port))

        def listening() -> bool:
            shown = self.desk.run("ss", "-Hltn")
            return all(f":{port} " in shown for port in (HTTP, ADMINS))

        wait_for("the desk's HTTP server", listening, PATIENCE_S)

    def _enrol(self) -> None:
        """The desk makes its own key, and shows a token."""
        token, enroll = self._desk.enroll("--tenant", TENANT, "--user", "alice")
        self._line(f"desk (alice's): {token}")
        for command in (enroll, self._desk.up()):
            self._line(f"$ {command}")

    def _given(self, name: str) -> list[str]:
        return [str(one) for one in self._device(name)["addresses"]]

    def _device(self, name: str) -> dict[str, Any]:
        return self._mesh.ask_json("devices", "device", "get", "--tenant", TENANT, name)[0]

    # What they show.

    def _ping(self) -> None:
        mine = self._addresses["desk"][0]
        reached = [self.phone.ping(address, seconds=5) for address in (self._server, mine)]
        self.result["wireguard_go_ping"] = all(reached)
        for what, address, answered in zip(("the server", "desk"), (self._server, mine), reached, strict=True):
            self._line(f"phone pings {what} at {address}: {'answered' if answered else 'NO ANSWER'}")

    def _page(self) -> None:
        self._head("By name: phone takes a page from desk.acme.falkirk")
        done = self._named("curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "10", "http://desk/")
        own = self._addresses["phone"]
        self.result["by_name_http"] = done.returncode == 0 and any(f"see you as {one}." in done.stdout for one in own)
        self._line((done.stdout or done.stderr).strip())

    def _ssh(self) -> None:
        self.result["ssh"] = None
        if absent := [name for name in ("dropbear", "ssh", "ssh-keygen") if shutil.which(name) is None]:
            self._line(f"ssh isn't shown: {', '.join(absent)} isn't installed")
            return
        for name in ("host", "user"):
            path = str(self._directory / f"{name}.key")
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
        host, user = self._directory / "host.key", self._directory / "user.key"
        _run("dropbearconvert", "openssh", "dropbear", str(host), f"{host}.dropbear")
        # Its own /root, with the one key that may come in: the machine's isn't touched.
        home = (
            "mount -t tmpfs -o mode=700 none /root && mkdir -m 700 /root/.ssh && "
            'cp "$1" /root/.ssh/authorized_keys && chmod 600 /root/.ssh/authorized_keys && shift && exec "$@"'
        )
        daemon = ("dropbear", "-F", "-s", "-r", f"{host}.dropbear", "-p", str(SSH), "-P", "")
        self.desk.start("unshare", "--mount", "sh", "-c", home, "sh", f"{user}.pub", *daemon)
        wait_for("the desk's ssh server", lambda: f":{SSH} " in self.desk.run("ss", "-Hltn"), PATIENCE_S)
        known = self._directory / "known_hosts"
        known.write_text(f"desk {Path(f'{host}.pub').read_text()}")
        options = ["-F", "none", "-i", str(user), "-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes"]
        options += ["-o", "IdentitiesOnly=yes", "-o", "HostKeyAlias=desk", "-o", "ConnectTimeout=10"]
        done = self._named("ssh", *options, "root@desk", "echo $SSH_CONNECTION")
        ends = done.stdout.split()
        self.result["ssh"] = (
            done.returncode == 0
            and len(ends) == 4
            and ends[0] in self._addresses["phone"]
            and ends[2] in self._addresses["desk"]
        )
        self._line(f"phone logs in at desk by ssh: {done.stdout.strip() or done.stderr.strip()}")

    def _named(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run at the phone, with names from the tenant's resolver."""
        files = {
            "resolv.conf": f"search {TENANT}.falkirk\nnameserver {RESOLVER}\noptions timeout:2 attempts:2\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        }
        script = 'exec "$@"'
        for name, text in files.items():
            path = self._directory / name
            path.write_text(text)
            script = f"mount --bind '{path}' /etc/{name} && {script}"
        whole = self.phone.namespace.command("unshare", "--mount", "sh", "-c", script, "sh", *command)
        try:
            return subprocess.run(
                whole, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(command)} at the phone: not done in time") from None

    def _denied(self) -> None:
        self._head(f"A port of desk that only admins reach (rule {RULE})")
        address = self._addresses["desk"][0]
        begin = time.monotonic()
        command = (
            "curl",
            "--silent",
            "--show-error",
            "--noproxy",
            "*",
            "--max-time",
            "10",
            f"http://{address}:{ADMINS}/",
        )
        done = subprocess.run(
            self.phone.namespace.command(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        self._line(f"{done.stderr.strip()} ({(time.monotonic() - begin) * 1000:.0f} ms)")

        def recorded() -> bool:
            return RULE in self._mesh.ask("audit", "query", "--json")

        wait_for("the denial's record", recorded, PATIENCE_S)
        self.result["denied"] = done.returncode == 7

    def _revoked(self) -> None:
        self._head("phone is disabled in the middle of a download")
        with _Download(self.phone.namespace, f"http://{self._server}/bytes/{ENDLESS}") as download:
            wait_for("a download on its way", lambda: download.size > FLOWING, PATIENCE_S)
            self._mesh.ask("device", "update", "--tenant", TENANT, "phone", "--disabled")
            changed = datetime.fromisoformat(str(self._device("phone")["metadata"]["updateTime"])).timestamp()
            wait_for("quiet", lambda: time.time() - download.last > QUIET_S, PATIENCE_S)
            milliseconds = round(max(0.0, download.last - changed) * 1000, 1)
            flows = [flow for flow in self._mesh.ask_json("flows", "flow", "list") if "phone" in str(flow)]
        silent = not self.phone.ping(self._server, seconds=1)
        self.result["revoked_ms"] = milliseconds if silent and not flows else None
        self._line(
            f"{download.size >> 20} MiB had come; the last byte {milliseconds} ms after the registry had stored it"
        )


class _Download:
    """Curl at a device: how much has come, and when the last of it (wall time, seconds)."""

    def __init__(self, namespace: Namespace, url: str) -> None:
        command = ["curl", "--silent", "--no-buffer", "--noproxy", "*", url]
        self._process = subprocess.Popen(
            namespace.command(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self.size, self.last = 0, time.time()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> _Download:
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read(1 << 18):
            self.size += len(data)
            self.last = time.time()

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        self._reader.join()


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _free_port(address: str) -> int:
    """A UDP port that nobody has at an address of ours."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
