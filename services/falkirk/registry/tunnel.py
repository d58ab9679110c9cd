"""What a device needs to set its tunnel up: from the tenant, its virtual network's routes and the nodes, as they are now.

The tunnel takes the tenant's address pools (other devices and the resolver), what the device's virtual network routes, the addresses that nodes speak from (their ICMP errors), and nothing else: a tenant with a
default route takes everything, one without leaves the rest of the machine's traffic where it was. Prefixes within others are left out.
Several nodes are peers with the same prefixes; those that report presence come first, then the others by name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from falkirk.api.registry.v1.device_service_pb2 import Device, TunnelConfig
from falkirk.api.registry.v1.node_service_pb2 import Node
from falkirk.api.registry.v1.route_service_pb2 import Route
from falkirk.api.registry.v1.tenant_service_pb2 import Tenant
from falkirk.decide import resolver
from falkirk.registry import engine, kinds
from falkirk.registry.kinds import BY_NAME

MTU = 1420
"""An Ethernet frame's 1500 less an IPv6 and a UDP header (48) and WireGuard's own 32."""
KEEPALIVE_S = 25
"""Below the 30 s that the most impatient address translators keep a UDP mapping for (RFC 4787 REQ-5 asks for 120 s)."""


def describe(
    connection: sqlite3.Connection,
    device: Device,
    registry_key: str,
    alive: Callable[[str], bool],
    node_addresses: Iterable[str] = (),
) -> TunnelConfig:
    """The configuration of a device's tunnel; `alive` says of a node whether it reports, `node_addresses` are those that nodes speak from."""
    tenant = engine.by_id(connection, BY_NAME["tenant"], device.metadata.tenant_id)
    assert isinstance(tenant, Tenant)
    nodes = [node for node in _nodes(connection) if node.public_key and node.endpoints]
    nodes.sort(key=lambda node: (not alive(node.metadata.name), node.metadata.name))
    pools = [pool for pool in (tenant.device_pool4, tenant.device_pool6) if pool]
    allowed = prefixes([*pools, *_routed(connection, device), *node_addresses])
    config = TunnelConfig(
        addresses=device.addresses,
        mtu=min((node.mtu or MTU for node in nodes), default=MTU),
        dns_servers=resolver.addresses(tenant.device_pool4, tenant.device_pool6),
        search_domains=[resolver.search_domain(tenant.metadata.name)],
        registry_key=registry_key,
    )
    for node in nodes:
        config.peers.add(
            node=node.metadata.name,
            public_key=node.public_key,
            endpoints=node.endpoints,
            allowed_prefixes=allowed,
            keepalive_s=KEEPALIVE_S,
        )
    return config


def prefixes(given: Iterable[str]) -> list[str]:
    """As few prefixes as cover the same addresses, IPv4 first, in order."""
    parsed = [ip_network(text) for text in given]
    four = [network for network in parsed if isinstance(network, IPv4Network)]
    six = [network for network in parsed if isinstance(network, IPv6Network)]
    return [str(network) for network in (*collapse_addresses(four), *collapse_addresses(six))]


def _nodes(connection: sqlite3.Connection) -> list[Node]:
    rows = connection.execute("SELECT body FROM resource WHERE kind = ?", (BY_NAME["node"].number,))
    return [Node.FromString(body) for (body,) in rows]


def _routed(connection: sqlite3.Connection, device: Device) -> list[str]:
    """The prefixes of the virtual network that the device has selected, else of the tenant's default one."""
    tenant_id = device.metadata.tenant_id
    row = (
        connection.execute(
            "SELECT target FROM reference WHERE source = ? AND field = 'virtual_network'", (device.metadata.id,)
        ).fetchone()
        or connection.execute(
            "SELECT holder FROM claim WHERE scope = ? AND key = ''", (kinds.default_scope(tenant_id),)
        ).fetchone()
    )
    rows = connection.execute(
        "SELECT body FROM reference JOIN resource ON resource.id = reference.source WHERE target = ? AND field = 'virtual_network' AND kind = ?",
        (row[0], BY_NAME["route"].number),
    )
    return [Route.FromString(body).prefix for (body,) in rows]
