"""100,000 mutants of valid flows through a flow worker: it doesn't fall, doesn't spin, crosses nothing, and counts everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.counters import DROP_REASONS
from tests.fuzz.world import World

MUTANTS = 100_000
PARSER = (
    "too_short",
    "bad_version",
    "bad_header_length",
    "bad_total_length",
    "bad_ip_checksum",
    "bad_ip_options",
    "source_route",
    "bad_extension_header",
    "fragment",
    "empty_datagram",
    "second_context",
    "vnet_too_short",
)
"""Reasons for which a packet doesn't get past the IP parser."""
BY_LIMITS = {
    "audit_unwritable",
    "device_held_limit",
    "device_limit",
    "fragment",
    "fragment_memory",
    "fragment_packets",
    "fragment_too_many",
    "icmp_error_taken",
    "icmp_rate_limit",
    "lower_slots_exhausted",
    "not_ready",
    "onramp_away",
    "ports_in_use",
    "short_datagram",
    "sibling_full",
    "slots_exhausted",
    "socket_full",
    "table_full",
    "tenant_limit",
    "tun_write_error",
    "tunnel_closed",
    "tunnel_full",
    "unknown_tunnel",
}
"""Reasons that aren't about a packet; `test_drop_reasons` reaches them one by one."""
RESOLVERS = {"dns_malformed"}
"""Reasons of packets to the resolver, which few of these go to: reached there as well."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, seed=1)
    yield world
    world.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_hundred_thousand_mutants_of_valid_flows(world: World) -> None:
    rig = world.rig
    rounds = 0
    while world.mutants < MUTANTS:
        world.round(60)
        rounds += 1
        if rounds % 20 == 0:
            assert world.balance() == 0
    drops = rig.drops()
    received = rig.count("received")
    print(
        rounds,
        "rounds;",
        received,
        "received;",
        rig.count("forwarded"),
        "forwarded;",
        rig.count("answered"),
        "answered",
    )
    print(drops)
    print(world.seen)
    assert world.balance() == 0
    unparsed = sum(drops.get(reason, 0) for reason in PARSER)
    # Packed datagrams hold several packets, each counted: this is the harder way to see it.
    assert world.mutants - unparsed >= MUTANTS // 2
    missing = set(DROP_REASONS) - set(drops) - BY_LIMITS - RESOLVERS
    assert missing == set()
    assert world.seen["reached the kernel"] > 10_000
    assert world.seen["came back"] > 10_000
    assert world.seen["icmp errors"] > 100
    assert world.seen["sockets given"] > 100
    assert world.seen["reached the world"] > 100
    _idle(world)
    _all_over(world)


def _idle(world: World) -> None:
    """With nothing to do a turn does nothing."""
    worker, view = world.rig.worker, world.rig.counters.view
    now = worker.now
    worker.clock = lambda: now
    world.settle(50)
    world.rig.asked()
    before = bytes(view)
    for _ in range(100):
        assert worker._epoll.poll(0) == []
        worker.turn(0)
    assert bytes(view) == before
    assert world.rig.asked() == []


def _all_over(world: World) -> None:
    """Without tunnels there are no flows, no slots in use, no held SYNs, and each start has its one end."""
    rig = world.rig
    for producer in world.producers:
        producer.sock.close()
    world.settle(200)
    worker = rig.worker
    assert worker.tunnels == {}
    assert (worker.flow_count, world.held(), worker.tunnels.devices) == (0, 0, {})
    for producer in world.producers:
        lane = worker.lane(producer.framing)
        assert lane.pool.active == 0
        assert not any(lane.flows)
    events: dict[str, list[str]] = {}
    for record in rig.records():
        events.setdefault(record.flow_id, []).append(record.event)
    assert {tuple(order) for order in events.values()} == {("started", "ended"), ("denied",)}
    assert world.balance() == 0
