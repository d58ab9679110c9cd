"""The names of every tenant's virtual networks, as the resolver looks them up. PURE.

The router compiles devices and zones into one snapshot (`falkirk.router.name_book`), which the resolver's process loads. In a virtual network there are

    DEVICE.TENANT.falkirk      the addresses of the devices that are in it, and their reverse names
    private zones              records, or other resolvers to ask; the longest domain that fits a name wins
    nothing else of ours       names below falkirk., reverse names of private addresses and of the tenant's pools, and the names by which clients
                               would find a way around their resolver, exist here and nowhere: the world isn't asked about them
    the world                  all other names

Names are text in lower case without the last dot. A name that exists without a record of the asked type is told apart from one that doesn't exist
(RFC 2308 2.1, 2.2), and so is one that only has names below it (RFC 8020).

Limit: all names are in memory, 0.5 kB a device; a snapshot of 100,000 devices takes 0.4 s to load, in which the resolver waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import msgspec

from falkirk.decide import resolver

VERSION: Final = 1
TTL: Final = 60
"""Seconds that a device's address may be kept: it can change, and the tunnel to ask again is always there."""
ZONE_TTL: Final = 300
"""Of a zone's record that doesn't say."""
_ELSEWHERE: Final = frozenset(("resolver.arpa", "use-application-dns.net", "local", "onion", "invalid", "home.arpa"))
"""RFC 9462 6.4 and the canary of browsers (ways around the network's resolver), RFC 6762 12, RFC 7686, RFC 6761 6.4, RFC 8375."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record: type as text, value as the registry keeps it (`falkirk.registry.fields.zone_record`)."""

    name: str
    type: str
    value: str
    ttl: int


class Zone(msgspec.Struct, frozen=True, array_like=True):
    """A private zone."""

    domain: str
    records: list[Record]
    forward_to: list[str]


class Network(msgspec.Struct, frozen=True, array_like=True):
    """A virtual network's names."""

    id: str
    tenant: str
    pools: list[str]
    """The tenant's device pools."""
    devices: list[tuple[str, tuple[str, ...]]]
    """Name and addresses of those that are in this network."""
    zones: list[Zone]


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """All networks."""

    version: int
    networks: list[Network]


class UnreadableNames(ValueError):
    """Bytes that aren't a snapshot of this version."""


class Local(msgspec.Struct, frozen=True):
    """A name that is known here, or known not to exist."""

    apex: str
    """The domain whose authority this is."""
    exists: bool
    records: tuple[Record, ...] = ()
    source: str = "device"
    """What audit calls it: device, zone or reserved."""


class Elsewhere(msgspec.Struct, frozen=True):
    """A name that other resolvers know; `forward_to` is empty for the world."""

    forward_to: tuple[str, ...] = ()


def encode(networks: Iterable[Network]) -> bytes:
    """A snapshot."""
    return msgspec.msgpack.encode(Snapshot(VERSION, list(networks)))


class _Names:
    """Records and nodes of one authority."""

    def __init__(self, apex: str, source: str) -> None:
        self.apex, self.source = apex, source
        self._records: dict[str, list[Record]] = {}
        self._nodes: set[str] = {apex}

    def add(self, record: Record) -> None:
        self._records.setdefault(record.name, []).append(record)
        name = record.name
        while name not in self._nodes:
            # RFC 8020: what has names below it exists.
            self._nodes.add(name)
            name = name.partition(".")[2]

    def find(self, name: str) -> Local:
        return Local(self.apex, name in self._nodes, tuple(self._records.get(name, ())), self.source)


class _Network:
    """One virtual network, indexed."""

    def __init__(self, said: Network) -> None:
        self._apex = resolver.search_domain(said.tenant)
        self._below = f".{self._apex}"
        # Records are made when they are asked for: there are many devices, and few are asked for between two changes.
        self._devices = dict(said.devices)
        self._owners = {address: name for name, addresses in said.devices for address in addresses}
        self._pools = [ip_network(pool) for pool in said.pools if pool]
        self._zones: dict[str, _Names | Elsewhere] = {}
        for zone in said.zones:
            if zone.forward_to:
                self._zones[zone.domain] = Elsewhere(tuple(zone.forward_to))
                continue
            names = self._zones[zone.domain] = _Names(zone.domain, "zone")
            for record in zone.records:
                names.add(record)

    def find(self, name: str) -> Local | Elsewhere:
        if _within(name, resolver.DOMAIN):
            if _within(name, self._apex):
                addresses = self._devices.get(name.removesuffix(self._below), ())
                records = tuple(Record(name, "A" if "." in text else "AAAA", text, TTL) for text in addresses)
                return Local(self._apex, name == self._apex or bool(records), records)
            # Other tenants' names look like names that nobody has.
            return Local(resolver.DOMAIN, name == resolver.DOMAIN)
        address = _reversed(name)
        owner = self._owners.get(str(address)) if address is not None else None
        if owner is not None:
            return Local(_reverse_apex(name), True, (Record(name, "PTR", owner + self._below, TTL),))
        domain = name
        while domain:
            zone = self._zones.get(domain)
            if zone is not None:
                return zone if isinstance(zone, Elsewhere) else zone.find(name)
            domain = domain.partition(".")[2]
        if address is not None and (address.is_private or any(_holds(pool, address) for pool in self._pools)):
            # RFC 6303: reverse names of private addresses mean nothing to the world.
            return Local(_reverse_apex(name), False, source="reserved")
        for special in (name.rpartition(".")[2], ".".join(name.rsplit(".", 2)[-2:])):
            if special in _ELSEWHERE:
                return Local(special, name == special, source="reserved")
        return Elsewhere()


class NameTable:
    """All names in force."""

    def __init__(self) -> None:
        """A table without names."""
        self._networks: dict[str, _Network] = {}

    @classmethod
    def load(cls, data: bytes | memoryview) -> NameTable:
        """Read a snapshot. Raises UnreadableNames."""
        try:
            snapshot = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnreadableNames(str(error)) from error
        if snapshot.version != VERSION:
            raise UnreadableNames(f"names of version {snapshot.version}; this program reads version {VERSION}")
        table = cls()
        try:
            table._networks = {network.id: _Network(network) for network in snapshot.networks}
        except ValueError as error:
            raise UnreadableNames(str(error)) from error
        return table

    def find(self, virtual_network_id: str, name: str) -> Local | Elsewhere | None:
        """What a name is in a virtual network; None where that isn't known (yet)."""
        network = self._networks.get(virtual_network_id)
        return network.find(name) if network is not None else None

    def knows(self, virtual_network_id: str) -> bool:
        """Whether a virtual network's names are known."""
        return virtual_network_id in self._networks


_decoder: Final = msgspec.msgpack.Decoder(Snapshot)


def _within(name: str, domain: str) -> bool:
    return name == domain or name.endswith(f".{domain}")


def _holds(pool: IPv4Network | IPv6Network, address: IPv4Address | IPv6Address) -> bool:
    # Of the other version it isn't, which `in` says without an error.
    return address in pool


def _reverse_apex(name: str) -> str:
    """The /16 or /64 around a reverse name."""
    labels = name.split(".")
    return ".".join(labels[-4:] if labels[-2] == "in-addr" else labels[-18:])


def _reversed(name: str) -> IPv4Address | IPv6Address | None:
    """The address of a whole reverse name; None for any other name."""
    head, _, tail = name.removesuffix(".arpa").rpartition(".")
    try:
        if not name.endswith(".arpa"):
            return None
        labels = head.split(".")
        if tail == "in-addr" and len(labels) == 4:
            return ip_address(".".join(reversed(labels)))
        if tail == "ip6" and len(labels) == 32:
            digits = "".join(reversed(labels))
            return ip_address(":".join(digits[at : at + 4] for at in range(0, 32, 4)))
    except ValueError:
        return None
    return None
