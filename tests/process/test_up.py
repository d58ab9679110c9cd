"""`falkirk up`: start, restart, drain, refusal, and no child left; `falkirk doctor` beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from falkirk.cli.nursery import Nursery, Stillborn

SMALL = Path(__file__).with_name("up_small.py")
DEADLINE = 20.0


def command(name: str, run_dir: Path, *options: str) -> list[str]:
    return [sys.executable, str(SMALL), name, "--run-dir", str(run_dir), "--data-dir", str(run_dir / "data"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)  # between looks at /proc, which tells nobody of changes
    raise AssertionError(f"not within {DEADLINE} s: {what}")


def doctor(run_dir: Path) -> dict[str, Any]:
    done = subprocess.run(
        command("doctor", run_dir, "--json"), capture_output=True, text=True, timeout=30, check=False, env=environment()
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    return report


def service(run_dir: Path) -> int:
    """The service's process id, by its lock."""
    lock = run_dir / ".registry.lock"
    return int(lock.read_text() or "0") if lock.exists() else 0


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Up:
    """A running `falkirk up`, its standard output read up to the greeting."""

    def __init__(self, run_dir: Path) -> None:
        self.process = subprocess.Popen(
            command("up", run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r") / "run"


@pytest.fixture
def up(run_dir: Path) -> Iterator[Up]:
    found = Up(run_dir)
    yield found
    pid = service(run_dir)
    found.process.kill()
    found.process.communicate(timeout=10)
    until(lambda: not pid or gone(pid), "the service dies with its supervisor")


def test_it_says_when_all_serve_and_drains_when_told(up: Up, run_dir: Path) -> None:
    assert "SERVING" in up.greeting
    pid = service(run_dir)
    up.process.send_signal(signal.SIGTERM)
    stdout, stderr = up.process.communicate(timeout=20)
    assert (up.process.returncode, stdout.splitlines()[-1]) == (0, "falkirk is down"), stderr
    assert '"event":"draining"' in stderr
    assert gone(pid)


def test_a_killed_service_is_started_again(up: Up, run_dir: Path) -> None:
    first = service(run_dir)
    os.kill(first, signal.SIGKILL)
    second = until(lambda: (pid := service(run_dir)) != first and pid, "a new service")
    report = until(lambda: (found := doctor(run_dir))["ok"] and found, "a healthy mesh")
    assert report["mesh"]["services"] == {"registry": "SERVING"}
    (process,) = report["mesh"]["processes"]
    assert (process["name"], process["pid"], process["generation"], process["alive"]) == ("registry", second, 2, True)
    assert process["rss_bytes"] > 1_000_000


def nursery_of(up: Up) -> int:
    """The process that services are forked from: the child of `falkirk up` that isn't the service."""
    children = Path(f"/proc/{up.process.pid}/task/{up.process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"--control-fd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def descriptors(pid: int) -> set[str]:
    """What they are of."""
    return {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def test_a_service_is_what_it_would_be_by_itself(up: Up, run_dir: Path) -> None:
    pid = service(run_dir)
    own = command("up", run_dir)[3:]
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
    assert words == [sys.executable, "-m", "falkirk.registry", *own]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["PPid"]) == up.process.pid
    assert os.getpgid(pid) == pid
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    nursery = nursery_of(up)
    assert len(list(Path(f"/proc/{nursery}/task").iterdir())) == 1, "it forks, so it must have no other thread"
    control = {name for name in descriptors(nursery) if name.startswith("socket:")}
    assert control
    assert not control & descriptors(pid)


def test_a_killed_nursery_takes_nothing_with_it_and_is_replaced(up: Up, run_dir: Path) -> None:
    first, nursery = service(run_dir), nursery_of(up)
    os.kill(nursery, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{nursery}").exists(), "its end is noticed")
    assert doctor(run_dir)["ok"]
    assert service(run_dir) == first
    os.kill(first, signal.SIGKILL)
    until(lambda: service(run_dir) not in (0, first) and doctor(run_dir)["ok"], "a new service of a new nursery")
    assert nursery_of(up) != nursery


REFUSING = """
import sys, types
from falkirk.cli import nursery
sys.modules["refusing"] = types.SimpleNamespace(main=lambda: 2)
sys.exit(nursery.main({"registry": "refusing"}))
"""


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("raise SystemExit('no such library')", 1, "falkirk up: registry can't be started"),
        (REFUSING, 2, "falkirk up: registry refuses to start, see above"),
    ],
    ids=["a nursery that ends", "a service that refuses"],
)
def test_what_never_comes_up_is_said(run_dir: Path, tmp_path: Path, program: str, status: int, said: str) -> None:
    script = tmp_path / "nursery.py"
    script.write_text(program)
    done = subprocess.run(
        command("up", run_dir),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment() | {"UP_SMALL_NURSERY": str(script)},
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr


def test_a_nursery_without_an_interpreter_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(Stillborn, match=r"the nursery can't be started: .*/nonexistent/python"):
        Nursery(()).start()


def test_children_die_with_a_killed_supervisor(up: Up, run_dir: Path) -> None:
    pid = service(run_dir)
    up.process.kill()
    until(lambda: gone(pid), "the service dies with its supervisor")


def test_a_second_mesh_in_the_same_directory_is_refused(up: Up, run_dir: Path) -> None:
    done = subprocess.run(
        command("up", run_dir), capture_output=True, text=True, timeout=30, check=False, env=environment()
    )
    assert done.returncode == 2
    assert f"pid {up.process.pid}" in done.stderr


def test_wrong_settings_are_refused_before_anything_starts(run_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "falkirk.yaml"
    config.write_text("apiVersion: falkirk.dev/v1alpha1\nkind: Settings\nregistry: {nonsense: 1}\n")
    done = subprocess.run(
        command("up", run_dir, "--config", str(config)),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert "registry.nonsense: unknown key" in done.stderr
    assert not run_dir.exists()


def test_doctor_without_a_mesh(run_dir: Path) -> None:
    report = doctor(run_dir)
    assert report["mesh"] is None
    names = {check["name"] for check in report["checks"]}
    assert {"settings", "tun", "namespaces", "nofile", "python", "run_dir", "data_dir"} <= names
    assert all(check["remedy"] for check in report["checks"] if check["state"] != "ok")


def test_doctor_waits_for_a_mesh(run_dir: Path, request: pytest.FixtureRequest) -> None:
    waiting = subprocess.Popen(
        command("doctor", run_dir, "--json", "--wait", "20"), stdout=subprocess.PIPE, text=True, env=environment()
    )
    request.getfixturevalue("up")
    report = json.loads(waiting.communicate(timeout=30)[0])
    assert (waiting.returncode, report["mesh"]["services"]) == (0, {"registry": "SERVING"})


def test_doctor_waits_no_longer_than_it_is_told(run_dir: Path) -> None:
    done = subprocess.run(
        command("doctor", run_dir, "--wait", "0.2"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=environment(),
    )
    assert done.returncode == 1
    assert f"none answers in {run_dir} after 0.2 s" in done.stdout


def test_doctor_names_what_is_wrong_with_its_remedy(up: Up, run_dir: Path) -> None:
    (run_dir / "admin").chmod(0o755)
    report = doctor(run_dir)
    assert not report["ok"]
    (check,) = (check for check in report["checks"] if check["state"] == "failed")
    assert (check["name"], check["remedy"]) == ("road_admin", f"chmod 0700 {run_dir}/admin")
