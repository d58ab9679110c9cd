"""What a device that is here and says nothing takes in each process, in bytes that the interpreter allocates for it.

Bounds are a tenth above what they were when they were written; who must raise one says why. `tools/bench wireguard` measures whole processes.
"""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec

from falkirk.flow import control
from falkirk.flow.directory import Attachment, Directory
from falkirk.flow.roster import Roster
from falkirk.flow.table import NOBODY, DeviceCounts, Tunnel
from falkirk.onramp import admission
from falkirk.onramp.tables import DeviceRow, NetworkRow, Row, Tables, TenantRow
from falkirk.wire.context import Framing, TunnelContext, shared
from falkirk.wireguard.guard import Guard
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals

N = 500
TENANT, NETWORK = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-000000000001"


def identity(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def addresses(number: int) -> tuple[bytes, ...]:
    return (0x64600000 + number).to_bytes(4, "big"), (0xFD << 120 | number).to_bytes(16, "big")


def row(number: int, key: bytes = b"") -> DeviceRow:
    key = key or number.to_bytes(32, "big")
    return DeviceRow(identity(number), TENANT, f"idle-{number}", addresses=addresses(number), public_key=key)


def context(number: int) -> TunnelContext:
    where = TENANT, "acme", identity(number), f"idle-{number}", NETWORK, "default", addresses(number)
    return TunnelContext(*where, attributes={"onramp": "wireguard"}, packed=True)


def allocated(make: Callable[[], Any]) -> float:
    """Bytes a device of what `make` makes for all, and of all that this holds."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return size / N


def decoded(kind: Any, values: list[Any]) -> Callable[[], list[Any]]:
    """A function that makes them anew, as a process that was told of them: nothing is common to two of them."""
    encoded = [msgspec.msgpack.encode(value) for value in values]
    decoder = msgspec.msgpack.Decoder(kind)
    return lambda: [decoder.decode(one) for one in encoded]


def filled(devices: Callable[[], list[Row]]) -> Tables:
    tables = Tables()
    tables.apply([TenantRow(TENANT, "acme"), NetworkRow(NETWORK, TENANT, "default", True)])
    tables.apply(devices())
    return tables


def test_in_the_tables_of_an_onramp() -> None:
    devices = decoded(Row, [row(number) for number in range(N)])
    assert allocated(lambda: filled(devices)) < 620


def test_admitted() -> None:
    tables = filled(lambda: [row(number) for number in range(N)])
    admitted = [tables.device_by_id(identity(number)) for number in range(N)]
    assert allocated(lambda: [admission.admit_device(tables, one) for one in admitted if one is not None]) < 200


def test_a_peer_whose_session_carries_nothing() -> None:
    server = Node(os.urandom(32), rng=os.urandom, guard=Guard(1e9))
    clients = [Node(os.urandom(32), rng=os.urandom) for _ in range(N)]
    peers = [client.add_peer(server.public_key, endpoint=("192.0.2.1", 51820)) for client in clients]
    keys = [client.public_key for client in clients]
    initiations = [client.initiate(peer, 1.0, 1) for client, peer in zip(clients, peers, strict=True)]
    answers: list[bytes] = []

    def receive(datagrams: list[list[bytes]], now: float) -> None:
        arrivals = Arrivals()
        for number, (datagram,) in enumerate(datagrams):
            server.receive(datagram, ("192.0.2.2", 1024 + number), now, 1, arrivals)
        answers.extend(datagram for _, datagram in arrivals.datagrams)

    def begin() -> None:
        for key in keys:
            server.add_peer(key)
        receive(initiations, 2.0)

    size = allocated(begin) - sum(map(sys.getsizeof, answers)) / N
    firsts = []
    for client, answer in zip(clients, answers, strict=True):
        arrivals = Arrivals()
        client.receive(answer, ("192.0.2.1", 51820), 3.0, 3, arrivals)
        firsts.append([datagram for _, datagram in arrivals.datagrams])
    size += allocated(lambda: receive(firsts, 4.0))
    assert all(peer.current is not None for peer in server.peers.values())
    assert size < 1270


def test_a_tunnel_in_a_flow_worker() -> None:
    contexts = decoded(TunnelContext, [context(number) for number in range(N)])

    def adopt() -> Any:
        directory, tunnels, devices = Directory(), dict[int, Tunnel](), dict[str, DeviceCounts]()
        for number, one in enumerate(contexts(), 1000):
            counts = devices.setdefault(shared(one).device_id, DeviceCounts())
            tunnels[number] = Tunnel(number, one, Framing.RAW, 1420, NOBODY, 0, counts)
            fields = one.tenant_id, one.device_id, one.virtual_network_id
            directory.opened(Attachment(number, 0, *fields, Framing.RAW, 1420))
        return directory, tunnels

    assert allocated(adopt) < 1030


def test_a_tunnel_in_the_flow_service() -> None:
    opened = [control.TunnelOpened(1000 + number, context(number), Framing.RAW, 1420) for number in range(N)]
    messages = decoded(control.TunnelOpened, opened)

    def tell() -> Roster:
        roster = Roster(1, lambda worker, data, descriptors: True, lambda worker: True)
        for message in messages():
            roster.opened(0, message)
        return roster

    assert allocated(tell) < 590
