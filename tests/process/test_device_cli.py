"""`falkirk device token|approve|rename|disable|expire|show|config|rotate` against a real registry."""

from __future__ import annotations

import base64
import json
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from falkirk.api.registry.v1 import device_service_pb2, presence_service_pb2
from falkirk.wireguard import proof
from tests.process.registry_process import DEADLINE_S, Registry, running
from tests.process.test_registry_cli import Shell

NODE_KEY = proof.text_of(proof.public_of(bytes([5] * 32)))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("r")) as started:
        yield started


@pytest.fixture(scope="module")
def shell(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    typed = Shell(registry, tmp_path_factory.mktemp("files"))
    typed.ok("tenant", "create", "acme")
    typed.ok("route", "add", "10.1.0.0/16", "internet", "--tenant", "acme")
    typed.ok("device", "create", "early", "--tenant", "acme")
    error = typed.refused("device", "config", "early", "--tenant", "acme")
    assert "NO_NODE" in error
    typed.ok(
        "node",
        "create",
        "n1",
        "--public-key",
        NODE_KEY,
        "--endpoint",
        "192.0.2.1:51820",
        "--endpoint",
        "[2001:db8::1]:51820",
    )
    return typed


def test_a_token_is_printed_alone_and_listed_without_its_secret(shell: Shell) -> None:
    secret = shell.ok("device", "token", "create", "--tenant", "acme", "--tag", "site=berlin", "--reusable").strip()
    assert re.fullmatch(r"fkt_[A-Za-z0-9_-]{43}", secret)
    listed = shell.ok("device", "token", "list", "--tenant", "acme")
    assert "site=berlin" in listed
    assert secret not in listed
    (token,) = shell.json("device", "token", "list", "--tenant", "acme")["tokens"]
    assert "revoked" in shell.ok("device", "token", "revoke", token["id"][:8], "--tenant", "acme")
    assert shell.json("device", "token", "list", "--tenant", "acme")["tokens"] == []
    assert "NOT_FOUND" in shell.refused("device", "token", "revoke", token["id"], "--tenant", "acme")


def test_a_configuration_is_what_wireguard_takes_and_is_shown_once(shell: Shell, tmp_path: Path) -> None:
    shell.ok("device", "create", "phone", "--tenant", "acme")
    out = tmp_path / "phone.conf"
    assert shell.ok("device", "config", "phone", "--tenant", "acme", "--out", str(out)) == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    text = out.read_text()
    values = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    device = shell.json("device", "get", "phone", "--tenant", "acme")
    private = base64.b64decode(values["PrivateKey"])
    assert proof.text_of(proof.public_of(private)) == device["publicKey"]
    assert values["Address"] == f"{device['addresses'][0]}/32, {device['addresses'][1]}/128"
    assert values["DNS"].startswith("100.96.0.53, fd")
    assert values["DNS"].endswith("::53, acme.falkirk")
    assert (values["PublicKey"], values["Endpoint"], values["MTU"]) == (NODE_KEY, "192.0.2.1:51820", "1420")
    assert values["AllowedIPs"].startswith("10.1.0.0/16, 100.96.0.0/12, 192.0.0.8/32, fd")
    assert "fd66:616c:6b69:726b::1/128" in values["AllowedIPs"], "where the nodes' ICMP errors come from"
    assert values["PersistentKeepalive"] == "25"
    stripped = subprocess.run(["wg-quick", "strip", str(out)], capture_output=True, text=True, timeout=10, check=False)
    assert stripped.returncode == 0, stripped.stderr
    assert "KEY_EXISTS" in shell.refused("device", "config", "phone", "--tenant", "acme")
    assert "FILE_EXISTS" in shell.refused("device", "rotate", "phone", "--tenant", "acme", "--out", str(out))
    assert shell.json("device", "get", "phone", "--tenant", "acme")["publicKey"] == device["publicKey"]


def test_rotation_replaces_the_key_and_json_has_every_endpoint(shell: Shell) -> None:
    shell.ok("device", "create", "server", "--tenant", "acme")
    shell.ok("device", "config", "server", "--tenant", "acme")
    before = shell.json("device", "get", "server", "--tenant", "acme")["publicKey"]
    found = json.loads(shell.ok("device", "rotate", "server", "--tenant", "acme", "--format", "json"))
    after = shell.json("device", "get", "server", "--tenant", "acme")["publicKey"]
    assert before != after == proof.text_of(proof.public_of(base64.b64decode(found["interface"]["privateKey"])))
    assert found["peers"][0]["endpoints"] == ["192.0.2.1:51820", "[2001:db8::1]:51820"]


def test_a_phone_s_camera_gets_a_code(shell: Shell) -> None:
    shell.ok("device", "create", "camera", "--tenant", "acme")
    code = shell.ok("device", "config", "camera", "--tenant", "acme", "--format", "qr")
    rows = code.splitlines()
    assert len(rows) > 25
    assert "█" in code or "▀" in code
    assert "PrivateKey" not in code


def test_what_administrators_do_with_a_device(shell: Shell, registry: Registry) -> None:
    secret = shell.ok("device", "token", "create", "--tenant", "acme", "--approval").strip()
    key = proof.text_of(proof.public_of(bytes([6] * 32)))
    request = device_service_pb2.DeviceServiceEnrollRequest(token=secret, public_key=key, name="laptop")
    registry.stubs().device.Enroll(request, timeout=DEADLINE_S)
    where = ("laptop", "--tenant", "acme")
    assert shell.json("device", "get", *where)["pending"]
    assert shell.ok("device", "approve", *where) == "device/acme/laptop approved\n"
    shell.ok("device", "disable", *where)
    assert shell.json("device", "get", *where)["disabled"]
    shell.ok("device", "enable", *where)
    shell.ok("device", "expire", "laptop", "2030-01-31T12:00:00Z", "--tenant", "acme")
    found = shell.json("device", "get", *where)
    assert (found["pending"], found["disabled"], found["expireTime"]) == (False, False, "2030-01-31T12:00:00Z")
    document = shell.ok("device", "get", *where)
    assert "unchanged" in shell.ok("apply", "-f", "-", text=document), "the document with its time reads back"
    shell.ok("device", "expire", "laptop", "never", "--tenant", "acme")
    assert shell.run("device", "expire", "laptop", "soon", "--tenant", "acme").exit_code == 2
    shell.ok("device", "rename", "laptop", "notebook", "--tenant", "acme")
    assert "expireTime" not in shell.json("device", "get", "notebook", "--tenant", "acme")
    assert "NOT_FOUND" in shell.refused("device", "approve", *where)


def test_list_and_show_tell_where_a_device_is(shell: Shell, registry: Registry) -> None:
    shell.ok("device", "create", "roamer", "--tenant", "acme")
    assert "attached nowhere" in shell.ok("device", "show", "roamer", "--tenant", "acme")
    device = shell.json("device", "get", "roamer", "--tenant", "acme")
    here = presence_service_pb2.Presence(
        device_id=device["metadata"]["id"],
        endpoint="198.51.100.7:4242",
        path="PRESENCE_PATH_WIREGUARD",
        last_handshake=Timestamp(seconds=1_900_000_000),
        received_bytes=4711,
    )
    request = presence_service_pb2.PresenceServiceReportRequest(
        node="n1", complete=True, present=[here], lease_ms=300_000
    )
    registry.stubs().presence.Report(request, timeout=DEADLINE_S)
    (line,) = [line for line in shell.ok("device", "list", "--tenant", "acme").splitlines() if "roamer" in line]
    assert "n1 198.51.100.7:4242" in line
    assert "2030-03-17" in line
    shown = shell.ok("device", "show", "roamer", "--tenant", "acme")
    assert "wireguard" in shown
    assert "4711" in shown
    both = shell.json("device", "show", "roamer", "--tenant", "acme")
    assert both["presences"][0]["endpoint"] == "198.51.100.7:4242"
