"""What is refused to whom: slots that are used up, sockets and tenants that aren't a user's."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.netns.fidelity import DEADLINE_S, FAMILIES, Way, World, begin, open_world, receive
from tools.mesh import SERVICES, resource

pytestmark = pytest.mark.netns
SLOTS = 64
NOBODY, OTHER = 65534, 65533
"""Two unprivileged users."""
GROUP = 65532
"""The group of the second one."""
PAYLOAD = 1024
AS_USER = Path(__file__).with_name("as_user.py")


@pytest.fixture(scope="module", params=[1, 3], ids=["1-worker", "3-workers"])
def strict(request: pytest.FixtureRequest) -> Iterator[World]:
    """A mesh with few slots, read/ for a group only, and a user who may speak for tenant bravo only."""
    settings = {
        "flow": {"slots": SLOTS},
        "roads": {"read": {"mode": 0o750, "group": str(GROUP)}},
        "onramp": {"tunnels": [{"uid": 0}, {"uid": NOBODY, "tenants": ["bravo"]}]},
    }
    with open_world(request.param, settings) as world:
        world.apply([*world.tenant("bravo"), resource("Device", "phone", "bravo", user="alice")])
        yield world


def as_user(world: World, uid: int, groups: list[int], *contexts: dict[str, Any]) -> dict[str, Any]:
    """What that user gets of the mesh: see as_user.py."""
    request = {
        "uid": uid,
        "gid": uid,
        "groups": groups,
        "run_dir": str(world.mesh.run_dir),
        "contexts": contexts,
        "services": SERVICES,
    }
    done = subprocess.run(
        [sys.executable, str(AS_USER), json.dumps(request)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRPC_ENABLE_FORK_SUPPORT": "0"},
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def context(tenant: str, device: str) -> dict[str, Any]:
    return {"v": 1, "tenant": tenant, "device": device}


def expected(read: str) -> dict[str, str]:
    """What connect() says to an unprivileged user: nothing but read/ may be open."""
    closed = {f"{road}/{service}": "EACCES" for road in ("admin", "mesh") for service in SERVICES}
    return closed | {f"read/{service}": read for service in SERVICES}


@pytest.mark.parametrize("framing", ["vnet", "raw"])
def test_the_flow_beyond_the_last_slot_is_refused_and_none_is_crossed(strict: World, framing: str) -> None:
    ways = [Way(strict, strict.client(framing), family) for family in FAMILIES]
    with ExitStack() as stack:
        listeners = {way.family: stack.enter_context(way.listener()) for way in ways}
        ports = {family: int(listener.getsockname()[1]) for family, listener in listeners.items()}
        clients = []
        servers = []
        for number in range(SLOTS):
            way = ways[number % len(ways)]
            clients.append(stack.enter_context(way.connect(ports[way.family])))
            servers.append(stack.enter_context(listeners[way.family].accept()[0]))

        def exchange() -> None:
            payloads = [os.urandom(PAYLOAD) for _ in clients]
            for client, payload in zip(clients, payloads, strict=True):
                client.sendall(payload)
            for server in servers:
                server.sendall(hashlib.sha256(receive(server, PAYLOAD)).digest())
            for client, payload in zip(clients, payloads, strict=True):
                assert receive(client, 32) == hashlib.sha256(payload).digest()

        exchange()
        for way in ways:
            beyond = stack.enter_context(way.client.socket(way.family))
            begin(beyond, way.server, ports[way.family])
            record = strict.recorded("denied", ports[way.family], way.server)
            assert record["reason"] == "slots_exhausted"
            listeners[way.family].setblocking(False)
            with pytest.raises(BlockingIOError):
                listeners[way.family].accept()
        exchange()


@pytest.mark.parametrize(("uid", "groups"), [(NOBODY, []), (OTHER, [GROUP])])
def test_by_default_everybody_may_read_and_nothing_else(world: World, uid: int, groups: list[int]) -> None:
    answer = as_user(world, uid, groups, context("acme", "device0"))
    assert answer["sockets"] == expected("ok")
    assert answer["reads"] == dict.fromkeys(SERVICES, "SERVING")
    assert answer["admin"] == ["PERMISSION_DENIED", "ROAD_FORBIDDEN"]
    assert answer["contexts"][0]["error"]["code"] == "UID_FORBIDDEN"


def test_a_directory_for_a_group_is_for_that_group(strict: World) -> None:
    outside, inside = as_user(strict, NOBODY, []), as_user(strict, OTHER, [GROUP])
    assert outside["sockets"] == expected("EACCES")
    assert inside["sockets"] == expected("ok")
    assert inside["reads"] == dict.fromkeys(SERVICES, "SERVING")
    assert inside["admin"] == ["PERMISSION_DENIED", "ROAD_FORBIDDEN"]


def test_a_user_speaks_for_the_tenants_that_he_may_and_learns_nothing_of_others(strict: World) -> None:
    own, foreign, unknown, others_device = as_user(
        strict,
        NOBODY,
        [],
        context("bravo", "phone"),
        context("acme", "device0"),
        context("nobodys", "device0"),
        context("bravo", "device0"),
    )["contexts"]
    assert own["admitted"]["addresses"]
    assert foreign["error"]["code"] == unknown["error"]["code"] == "TENANT_FORBIDDEN"
    assert foreign["error"]["message"].replace("acme", "nobodys") == unknown["error"]["message"]
    assert others_device["error"]["code"] == "UNKNOWN_DEVICE"
    (stranger,) = as_user(strict, OTHER, [], context("bravo", "phone"))["contexts"]
    assert stranger["error"]["code"] == "UID_FORBIDDEN"
