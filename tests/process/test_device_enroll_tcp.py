"""`falkirk device enroll --address`: a machine that has nothing of the mesh but a token, a place and a fingerprint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from falkirk.api.registry.v1 import device_service_pb2, device_token_service_pb2, device_token_service_pb2_grpc
from falkirk.api.registry.v1.tenant_service_pb2 import Tenant, TenantServiceCreateRequest
from falkirk.cli.device_registry import refresh
from falkirk.cli.device_state import State
from falkirk.runtime.errors import FalkirkError
from falkirk.wireguard import primitives, proof
from tests.process import registry_process
from tests.process.test_load import free_port

DEADLINE_S = 20.0


def falkirk(state: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`falkirk ...`, with no run directory to find anything in."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FALKIRK_DEVICE_DIR": str(state)}
    environment.pop("FALKIRK_RUN_DIR", None)
    command = [sys.executable, "-m", "falkirk.cli.main", *arguments]
    return subprocess.run(
        command, env=environment, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_over_tcp_with_a_fingerprint(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with registry_process.running(tmp_path, f'listen_tcp: {{registry: "{address}"}}\n') as registry:
        tenant = Tenant()
        tenant.metadata.name = "acme"
        registry.stubs().tenant.Create(TenantServiceCreateRequest(tenant=tenant))
        stub = device_token_service_pb2_grpc.DeviceTokenServiceStub(registry.channel())
        token = device_token_service_pb2.DeviceToken(tenant="acme")
        secret = stub.Create(device_token_service_pb2.DeviceTokenServiceCreateRequest(token=token)).secret
        shown = falkirk(tmp_path, "authority", "show", "--json", "--run-dir", str(registry.run_dir))
        fingerprint = json.loads(shown.stdout)["trust"]["roots"][0]["fingerprint"]
        state = State(tmp_path / "device")
        enroll = ("device", "enroll", "--address", address, "--token-file", "-")
        # Somebody else's fingerprint: the token isn't shown to whoever answers.
        other = "0" * 64
        done = falkirk(state.folder, *enroll, "--fingerprint", other, stdin=secret)
        assert done.returncode == 1
        assert "FINGERPRINT_MISMATCH" in done.stderr
        assert state.read() is None
        assert falkirk(state.folder, *enroll, stdin=secret).returncode == 2
        done = falkirk(state.folder, *enroll, "--fingerprint", fingerprint, "--name", "far", stdin=secret)
        assert done.returncode == 0, done.stderr
        enrolled = state.read()
        assert enrolled is not None
        assert (enrolled.name, enrolled.place.address) == ("far", address)
        # It speaks for itself by its key, over the same way; another key is refused.
        assert refresh(state, enrolled).tunnel.addresses == enrolled.tunnel.addresses
        known = (
            registry.stubs().device.Get(device_service_pb2.DeviceServiceGetRequest(tenant="acme", name="far")).device
        )
        assert known.public_key == proof.text_of(primitives.public_key(enrolled.private_key))
        with pytest.raises(FalkirkError):
            refresh(state, msgspec.structs.replace(enrolled, private_key=bytes(range(32))))
