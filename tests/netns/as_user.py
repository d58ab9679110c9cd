"""What an unprivileged user can do with a mesh: `python as_user.py REQUEST`, started by root, prints one JSON object.

REQUEST is {"uid", "gid", "groups", "run_dir", "contexts": [...], "services": [...]}. Everything is imported before the
uid is given up, so it doesn't matter where Python is installed and who may read it.

Answers: "sockets": what connect() says to each socket of each road ("ok", or the errno's name); "reads": for each
service that could be reached on read/, the code of a health check; "admin": code and reason of a method that only
admin/ allows, asked on read/; "contexts": the on-ramp's answer to each first datagram.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from falkirk.api.flow.v1 import flow_service_pb2, flow_service_pb2_grpc
from falkirk.linux import seqpacket
from falkirk.runtime.errors import FalkirkError, from_rpc

ROADS = ("admin", "mesh", "read")
SECONDS = 20.0


def connect(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "ok"


def health(path: Path) -> str:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def terminate(path: Path) -> list[str]:
    """FlowService.Terminate needs admin/."""
    with grpc.insecure_channel(f"unix:{path}") as channel:
        request = flow_service_pb2.TerminateRequest(id="0" * 32)
        try:
            flow_service_pb2_grpc.FlowServiceStub(channel).Terminate(request, timeout=SECONDS)
        except grpc.RpcError as error:
            told = from_rpc(error)
            assert isinstance(told, FalkirkError)
            return [told.code.name, told.reason]
    return ["OK", ""]


def introduce(path: Path, context: dict[str, Any]) -> dict[str, Any]:
    with seqpacket.connect(path) as tunnel:
        tunnel.setblocking(True)
        tunnel.settimeout(SECONDS)
        # It may have hung up already; what it said before can still be read.
        with contextlib.suppress(BrokenPipeError):
            tunnel.send(json.dumps(context).encode())
        answer: dict[str, Any] = json.loads(tunnel.recv(16384))
        return answer


def main() -> None:
    request = json.loads(sys.argv[1])
    run_dir = Path(request["run_dir"])
    os.setgroups(request["groups"])
    os.setresgid(request["gid"], request["gid"], request["gid"])
    os.setresuid(request["uid"], request["uid"], request["uid"])
    answer: dict[str, Any] = {
        "sockets": {
            f"{road}/{service}": connect(run_dir / road / f"{service}.sock")
            for road in ROADS
            for service in request["services"]
        },
        "contexts": [introduce(run_dir / "tunnel.sock", context) for context in request["contexts"]],
    }
    reached = [name for name in request["services"] if answer["sockets"][f"read/{name}"] == "ok"]
    answer["reads"] = {name: health(run_dir / "read" / f"{name}.sock") for name in reached}
    answer["admin"] = terminate(run_dir / "read" / "flow.sock") if "flow" in reached else []
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
