"""A whole mesh in a directory: settings, `falkirk up`, resources, and questions to it through the CLI.

Used by the demo, the bench and tests. Everything is asked the way a user would: by the `falkirk` command and by gRPC
health checks on the sockets in read/. Limit: waits are bounded; a mesh that doesn't come up shows the end of its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.netlab import Lab, LabError, Namespace, run, wait_for

SERVICES = ("onramp", "flow", "policy", "upgrader", "router", "registry")
UP_S = 60.0
"""How long all services may take to be SERVING."""
DRAIN_S = 45.0
"""How long they may take to drain, one after another."""
APPLY_S = 120.0
"""How long resources may take to be stored."""
API = "falkirk.dev/v1alpha1"


def resource(kind: str, name: str, tenant: str = "", **spec: Any) -> dict[str, Any]:
    """One document for `falkirk apply`."""
    metadata = {"name": name, "tenant": tenant} if tenant else {"name": name}
    return {"apiVersion": API, "kind": kind, "metadata": metadata, "spec": spec}


def rule(name: str, when: str, action: str) -> dict[str, str]:
    """One rule of a policy; action is allow or deny."""
    return {"name": name, "when": when, "action": action}


def records(text: str, key: str) -> list[dict[str, Any]]:
    """What a command's --json printed: a list, an object that holds one under `key`, or one object a line."""
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(value, list):
        return value
    listed = value.get(key, value)
    return listed if isinstance(listed, list) else [listed]


class Mesh:
    """A mesh that runs in `namespace` (None: where we are), its sockets and data under `directory`."""

    def __init__(self, lab: Lab, directory: Path, namespace: Namespace | None = None) -> None:
        self.run_dir = directory / "run"
        self.data_dir = directory / "data"
        self.config = directory / "falkirk.yaml"
        self.log = directory / "falkirk.log"
        self._lab = lab
        self._directory = directory
        self._prefix = namespace.command() if namespace else []
        # Not the console script: a tree that is first in PYTHONPATH is the one that runs.
        self._falkirk = (sys.executable, "-m", "falkirk.cli.main")
        self._up: subprocess.Popen[bytes] | None = None

    def start(self, settings: Mapping[str, Any], *, dies_with_us: bool = True) -> int:
        """`falkirk up`; returns its process id once every service is SERVING. Raises LabError with the log's end."""
        self.config.write_text(yaml.safe_dump({"apiVersion": API, "kind": "Settings", **settings}, sort_keys=False))
        command = [*self._prefix, *self._falkirk, "up", *self._options("--config")]
        with self.log.open("ab") as log:
            self._up = self._lab.start(command, log=log, dies_with_us=dies_with_us, stop_s=DRAIN_S)
        try:
            wait_for("all services SERVING", self._serving, UP_S)
        except LabError as error:
            raise LabError(f"{error}; {self.services()}; the log ends:\n{self._log_end()}") from None
        return self._up.pid

    @property
    def pid(self) -> int:
        """Of `falkirk up`, or what stands around it; every service is below."""
        assert self._up is not None
        return self._up.pid

    def stop(self) -> None:
        """End `falkirk up` and wait for it."""
        if self._up is not None and self._up.poll() is None:
            self._up.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._up.wait(DRAIN_S)

    def _options(self, *names: str) -> list[str]:
        values = {"--config": self.config, "--run-dir": self.run_dir, "--data-dir": self.data_dir}
        return [part for name in (*names, "--run-dir", "--data-dir") for part in (name, str(values[name]))]

    def _log_end(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else "(no log)"

    def _serving(self) -> bool:
        if self._up is not None and self._up.poll() is not None:
            raise LabError(f"falkirk up ended with {self._up.returncode}")
        return all(state == "SERVING" for state in self.services().values())

    def services(self) -> dict[str, str]:
        """Each service's health: SERVING, NOT_SERVING, or why it couldn't be asked."""
        return {service: health(self.run_dir / "read" / f"{service}.sock") for service in SERVICES}

    @property
    def environment(self) -> dict[str, str]:
        """What lets `falkirk` commands find this mesh."""
        return {**os.environ, "FALKIRK_RUN_DIR": str(self.run_dir), "FALKIRK_DATA_DIR": str(self.data_dir)}

    def ask(self, *arguments: str, timeout: float = 30, accept: Sequence[int] = (0,)) -> str:
        """`falkirk ...`; its standard output. Raises LabError where its exit code isn't one of `accept`."""
        return run([*self._falkirk, *arguments], timeout, self.environment, accept)

    def ask_json(self, key: str, *arguments: str) -> list[dict[str, Any]]:
        """`falkirk ... --json`, as a list of objects."""
        return records(self.ask(*arguments, "--json"), key)

    def apply(self, documents: Iterable[Mapping[str, Any]], name: str = "resources") -> None:
        """`falkirk apply`: all or none."""
        path = self._directory / f"{name}.yaml"
        path.write_text(yaml.dump_all(documents, Dumper=_dumper(), sort_keys=False))
        self.ask("apply", "-f", str(path), timeout=APPLY_S)

    def lower(
        self,
        device: str,
        command: Sequence[str],
        *,
        tenant: str = "acme",
        framing: str = "device",
        congestion: str = "",
        options: Sequence[str] = (),
    ) -> list[str]:
        """The command line that runs `command` as that device. `framing`: "raw" or "vnet" over the tunnel's socket, or "device", the
        default of the tool: super-packets by a TUN device that is handed over. `options` are further ones of the tool."""
        more = [*(["--congestion", congestion] if congestion else []), *options]
        tunnel = [
            "--tunnel",
            str(self.run_dir / "tunnel.sock"),
            "--tenant",
            tenant,
            "--device",
            device,
            "--framing",
            "vnet" if framing == "device" else framing,
            "--transport",
            "device" if framing == "device" else "socket",
        ]
        return [*self._prefix, *self._falkirk, "lower", *tunnel, *more, "--", *command]


def _dumper() -> Any:
    """libyaml's where it is there: 10,000 routes take a second with it and ten without."""
    return getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def health(socket: Path) -> str:
    """Ask grpc.health.v1 on a unix socket; never raises."""
    if not socket.exists():
        return "NO_SOCKET"
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=2)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
