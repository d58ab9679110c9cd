"""`falkirk up` as whoever starts it: an ordinary user, one who may not open the device, one with wrong settings; and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests.netns.conftest import ServerNamespace
from tests.process.cli_shell import Output
from tests.process.running_mesh import descendants, resources
from tools.load import http_server
from tools.mesh import API, SERVICES
from tools.netlab import wait_for

ORDINARY = [sys.executable, str(Path(__file__).with_name("ordinary_user.py"))]
FALKIRK = [sys.executable, "-m", "falkirk.cli.main"]
NAMES = {
    *SERVICES,
    "upgrader.helper",
    "upgrader.lower_helper",
    *(f"{service}.worker.0" for service in ("upgrader", "flow", "onramp", "router")),
}


class Place:
    """A directory for a mesh, and commands in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FALKIRK_RUN_DIR": str(directory / "run"),
            "FALKIRK_DATA_DIR": str(directory / "data"),
        }

    def run(
        self, *words: str, user: Sequence[str] = ORDINARY, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command to its end, as the user."""
        return subprocess.run(
            [*user, *FALKIRK, *words],
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self.environment,
        )

    def sockets(self) -> list[Path]:
        """Socket files that are there."""
        return [path for path in self.directory.rglob("*") if path.is_socket()]


class Up:
    """A running `falkirk up` of an ordinary user, all SERVING."""

    def __init__(self, place: Place) -> None:
        self.process = subprocess.Popen(
            [*ORDINARY, *FALKIRK, "up"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=place.environment,
        )
        assert self.process.stdout is not None
        self.output = Output(self.process.stdout)
        self.output.wait("SERVING", seconds=60)
        report = json.loads(place.run("doctor", "--json").stdout)
        self.pids = {process["name"]: process["pid"] for process in report["mesh"]["processes"]}
        self.namespaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in self.pids.values()}

    def gone(self) -> bool:
        """No process of it is left, and no namespace that it made."""
        return not any(alive(pid) for pid in self.pids.values()) and not self.namespaces_left()

    def namespaces_left(self) -> set[Path]:
        """Network namespaces of the mesh, other than ours, that a process still lives in."""
        here = Path("/proc/self/ns/net").readlink()
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    found.add((entry / "ns" / "net").readlink())
                except OSError:
                    continue
        return (self.namespaces - {here}) & found

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()
        self.output.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="fk-") as directory:
        yield Place(Path(directory))


@pytest.fixture
def up(place: Place) -> Iterator[Up]:
    found = Up(place)
    yield found
    found.kill()
    wait_for("its processes to be gone", found.gone, 20)


def test_an_ordinary_user_runs_a_mesh_and_connects_through_it(place: Place, up: Up, server_ns: ServerNamespace) -> None:
    assert set(up.pids) == NAMES
    (nursery,) = set(descendants(up.process.pid)) - set(up.pids.values())
    assert b"falkirk.cli.nursery" in Path(f"/proc/{nursery}/cmdline").read_bytes()
    # Its own, and one each for lifting and for lowering.
    assert len(up.namespaces) == 3
    done = place.run("apply", "-f", "-", text=yaml.safe_dump_all(resources()))
    assert done.returncode == 0, done.stderr
    server = server_ns.popen(
        [sys.executable, str(Path(http_server.__file__).resolve())], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline().startswith("ready")
    lower = ("lower", "--tenant", "acme", "--device", "laptop", "--")
    done = place.run(*lower, "curl", "--silent", "--show-error", "--noproxy", "*", f"http://{server_ns.address4}/")
    server.stdout.close()
    assert done.stdout.startswith("Hello from the server"), done.stderr

    second = place.run("up")
    assert (second.returncode, second.stdout) == (2, "")
    assert f"up already runs in {place.directory}/run (pid {up.process.pid})" in second.stderr
    assert "choose another --run-dir" in second.stderr

    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(45) == 0
    up.output.wait("falkirk is down")
    assert up.gone()
    assert place.sockets() == []
    ended = [line for path in (place.directory / "data" / "policy").rglob("*.ndjson") for line in path.open()]
    assert sum('"event":"ended"' in line for line in ended) == 1


def test_nothing_outlives_a_killed_up(place: Place, up: Up) -> None:
    up.kill()
    wait_for("its processes to be gone", up.gone, 20)


def test_without_the_device_it_says_what_mends_it_and_leaves_nothing(place: Place) -> None:
    done = place.run("up", user=[*ORDINARY, "--no-tun"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "/dev/net/tun may not be opened by uid 1000" in done.stderr
    assert "remedy: as root: chmod 0666 /dev/net/tun" in done.stderr
    assert list(place.directory.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"flows": {}}, "flows: unknown key"),
        ({"flow": {"max_flow": 1}}, "flow.max_flow: unknown key"),
        ({"policy": {"audit": {"segments": 1}}}, "policy.audit.segments: unknown key"),
        ({"flow": {"slots": "many"}}, "flow.slots: Expected `int`, got `str`"),
        ({"onramp": {"tunnels": [{"uid": "me"}]}}, "onramp.tunnels[0].uid: Expected `int`, got `str`"),
        ({"workers": 0}, "workers must lie between 1 and 64"),
        ({"upgrader": {"mtu": 500}}, "upgrader: mtu must lie between 1280 and 65535"),
        ({"telemetry": {"otlp_endpoint": "somewhere"}}, "telemetry: otlp_endpoint: 'somewhere' is not host:port"),
        ({"metrics": {"flow": "9090"}}, "metrics.flow: '9090' is not host:port"),
    ],
)
def test_wrong_settings_are_refused_with_file_and_path(place: Place, settings: dict[str, object], where: str) -> None:
    config = place.directory / "falkirk.yaml"
    config.write_text(yaml.safe_dump({"apiVersion": API, "kind": "Settings", **settings}))
    done = place.run("up", "--config", str(config), user=())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{config}: " in done.stderr
    assert where in done.stderr
    assert list(place.directory.iterdir()) == [config]


def test_doctor_has_a_remedy_for_each_failure(place: Place) -> None:
    place.directory.chmod(0o555)
    config = place.directory.parent / f"{place.directory.name}.yaml"
    config.write_text(yaml.safe_dump({"apiVersion": API, "kind": "Settings", "nonsense": 1}))
    try:
        done = place.run("doctor", "--json", "--config", str(config), user=[*ORDINARY, "--no-tun"])
    finally:
        config.unlink()
        place.directory.chmod(0o755)
    assert done.returncode == 1, done.stderr
    failed = {check["name"]: check for check in json.loads(done.stdout)["checks"] if check["state"] == "failed"}
    assert set(failed) == {"settings", "tun", "run_dir", "data_dir"}
    assert all(check["detail"] and check["remedy"] for check in failed.values())
    assert "--run-dir" in failed["run_dir"]["remedy"]
    assert "chmod 0666 /dev/net/tun" in failed["tun"]["remedy"]
    assert str(config) in failed["settings"]["detail"]
