"""Routes: which way a destination leaves a virtual network. PURE: the router and every packet worker run this same code.

The router compiles all routes of the mesh into one blob; a packet worker loads it a slice a loop turn, then swaps.
Nested prefixes are flattened at compile time into disjoint ranges, so that the longest match of any table is one binary
search, whatever prefix lengths it holds. A route knows the route that encloses it, which is all that `covering` needs.

    blob = head | networks | starts4 | values4 | starts6 high | starts6 low | values6 | offsets | parents | entries

Numbers are little-endian; a value is an entry's index + 1, and 0 where no route covers the range. Entries are MessagePack and
are decoded when a lookup first meets them.

Limits: 2^32 - 2 routes, 4 GiB of entries, 65,535 bytes a virtual network's id. A route takes about 130 bytes in the blob, which
is kept, and 20 more in memory; a binary search over 200,000 ranges takes about a microsecond. The blob's integrity is the
carrier's to check (SHA-256); `load` checks its shape, so that a lookup can't leave the arrays.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, Literal

import msgspec

from falkirk.decide.destination import DestinationDevice

Target = Literal["internet", "blackhole", "device", "resolver"]
"""Where a route leads. "resolver" is nobody's to write: the router adds it for the address of each tenant's resolver."""

DEFAULT_CONNECT_TIMEOUT_MS: Final = 10_000
"""What a route that says 0 takes."""

_MAGIC: Final = b"FALKRT\x00\x03"  # the last byte is the format's version
_HEAD: Final = struct.Struct("<8sIIIII")  # magic, networks' bytes, networks, ranges4, ranges6, entries
_NETWORK: Final = struct.Struct("<HII")  # bytes of the id, ranges4, ranges6
_BIG_ENDIAN: Final = array("H", b"\x00\x01")[0] == 1
_SLICE: Final = 4096
_NETWORKS_A_TURN: Final = 500
_LOW64: Final = (1 << 64) - 1


class RouteDataError(ValueError):
    """The compiled routes aren't what this version reads; the sender's fault (or another version's)."""


class RouteConflict(ValueError):
    """Two routes of one virtual network have the same prefix; the registry never lets that happen."""


class RouteEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a lookup answers."""

    route_id: str
    """Empty for a device's own address, to which nobody wrote a route."""
    name: str
    prefix: str
    """Canonical text form."""
    target: Target
    egress4: bytes = b""
    """IPv4 address to send from, packed; empty lets the kernel choose."""
    egress6: bytes = b""
    """IPv6 address to send from, packed; empty lets the kernel choose."""
    connect_timeout_ms: int = DEFAULT_CONNECT_TIMEOUT_MS
    device: DestinationDevice | None = None
    """Whom target `device` means."""

    @property
    def own_address(self) -> bool:
        """Whether it leads to a device because the prefix is that device's own address."""
        return self.device is not None and not self.route_id


Place = tuple[str, int, int, int]
"""A virtual network's id, and a prefix in it: 0 for IPv4 or 1 for IPv6, the first address, how many bits are the host's."""


class RouteSource:
    """A route to compile: its prefix parsed and its entry encoded once, so that a change costs no more than it must. The entry itself isn't kept beside that."""

    __slots__ = ("bits", "encoded", "family", "first", "route_id", "virtual_network_id")

    def __init__(self, virtual_network_id: str, entry: RouteEntry) -> None:
        """Raises ValueError for a prefix that isn't one, or has host bits set."""
        network = ip_network(entry.prefix)
        self.virtual_network_id, self.route_id = virtual_network_id, entry.route_id
        self.family = 0 if network.version == 4 else 1
        self.first = int(network.network_address)
        self.bits = network.max_prefixlen - network.prefixlen
        """Of the host."""
        self.encoded = msgspec.msgpack.encode(entry)

    @property
    def entry(self) -> RouteEntry:
        """What a lookup will answer."""
        return _decoder.decode(self.encoded)

    @property
    def place(self) -> Place:
        """Its prefix, and where: two routes can't have the same."""
        return self.virtual_network_id, self.family, self.first, self.bits


class _Ranges:
    """Disjoint ranges of one family, over all virtual networks, under construction."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.values: list[int] = []


_Prefix = tuple[int, int, int]  # first address, -last address, value, so that sorting puts outer before inner


def compile(routes: Iterable[RouteSource]) -> bytes:
    """The blob that `RouteTable.load` reads. The same routes in any order give the same bytes.

    Raises RouteConflict for a prefix that stands twice in one virtual network.
    """
    ordered = sorted(routes, key=lambda source: (source.virtual_network_id, source.route_id, *source.place))
    offsets, entries = array("I"), bytearray()
    prefixes: dict[str, tuple[list[_Prefix], list[_Prefix]]] = defaultdict(lambda: ([], []))
    for index, source in enumerate(ordered):
        last = source.first + (1 << source.bits) - 1
        prefixes[source.virtual_network_id][source.family].append((source.first, -last, index + 1))
        offsets.append(len(entries))
        entries += source.encoded
    parents = array("I", bytes(4 * len(ordered)))
    names, ranges = bytearray(), (_Ranges(), _Ranges())
    for network_id, families in prefixes.items():
        counts = []
        for family, found in enumerate(families):
            before = len(ranges[family].starts)
            _flatten(sorted(found), 32 if family == 0 else 128, ranges[family], parents, ordered)
            counts.append(len(ranges[family].starts) - before)
        encoded = network_id.encode()
        names += _NETWORK.pack(len(encoded), *counts) + encoded
    four, six = ranges
    head = _HEAD.pack(_MAGIC, len(names), len(prefixes), len(four.starts), len(six.starts), len(ordered))
    numbers = (
        array("I", four.starts),
        array("I", four.values),
        array("Q", (start >> 64 for start in six.starts)),
        array("Q", (start & _LOW64 for start in six.starts)),
        array("I", six.values),
        offsets,
        parents,
    )
    return b"".join((head, bytes(names), *(_little(part) for part in numbers), bytes(entries)))


def _flatten(found: list[_Prefix], bits: int, ranges: _Ranges, parents: array[int], ordered: list[RouteSource]) -> None:
    """Sweep the prefixes of one virtual network and family; prefixes nest or are disjoint, so a stack is enough."""
    base = len(ranges.starts)

    def boundary(start: int, value: int) -> None:
        if len(ranges.starts) > base and ranges.starts[-1] == start:
            ranges.values[-1] = value
        else:
            ranges.starts.append(start)
            ranges.values.append(value)

    stack: list[tuple[int, int]] = []  # (last address, value)
    previous: _Prefix | None = None
    for prefix in found:
        first, negative_last, value = prefix
        if previous is not None and previous[:2] == prefix[:2]:
            one, other = ordered[previous[2] - 1].entry, ordered[value - 1].entry
            raise RouteConflict(f"routes {one.name} and {other.name} both have the prefix {one.prefix}")
        previous = prefix
        while stack and stack[-1][0] < first:
            last, _ = stack.pop()
            boundary(last + 1, stack[-1][1] if stack else 0)
        if stack:
            parents[value - 1] = stack[-1][1]
        boundary(first, value)
        stack.append((-negative_last, value))
    while stack:
        last, _ = stack.pop()
        if last + 1 < 1 << bits:
            boundary(last + 1, stack[-1][1] if stack else 0)


def _little(numbers: array[int]) -> bytes:
    """Bytes of the numbers, little-endian."""
    if _BIG_ENDIAN:
        numbers = array(numbers.typecode, numbers)
        numbers.byteswap()
    return numbers.tobytes()


class RouteTable:
    """Loaded routes. `load` may run beside lookups in one thread: they see the old routes until it is through."""

    def __init__(self) -> None:
        """A table without routes."""
        self.routes = 0
        """Routes in it."""
        self.memory = 0
        """Bytes that it takes, entries that lookups decoded apart."""
        self._networks: dict[str, tuple[int, int, int, int]] = {}
        self._starts4, self._values4 = array("I"), array("I")
        self._high6, self._low6, self._values6 = array("Q"), array("Q"), array("I")
        self._offsets, self._parents = array("I"), array("I")
        self._data: bytes | memoryview = b""
        self._entries_at = 0
        self._decoded: dict[int, RouteEntry] = {}

    @classmethod
    def loaded(cls, data: bytes | memoryview) -> RouteTable:
        """A table with these routes, loaded at one go."""
        table = cls()
        for _ in table.load(data):
            pass
        return table

    def load(self, data: bytes | memoryview) -> Iterator[None]:
        """Load compiled routes, yielding after at most about a millisecond of work; then they replace the old ones at once.

        `data` is kept: the view of a mapped file is shared between processes.

        Raises RouteDataError, and the old routes stay.
        """
        try:
            magic, name_bytes, network_count, count4, count6, entry_count = _HEAD.unpack_from(data)
        except struct.error as error:
            raise RouteDataError("compiled routes are too short") from error
        if magic != _MAGIC:
            raise RouteDataError("compiled routes are of another version")
        sizes = (4 * count4, 4 * count4, 8 * count6, 8 * count6, 4 * count6, 4 * entry_count, 4 * entry_count)
        entries_at = _HEAD.size + name_bytes + sum(sizes)
        if entries_at > len(data):
            raise RouteDataError("compiled routes are cut off")
        networks: dict[str, tuple[int, int, int, int]] = {}
        names = bytes(data[_HEAD.size : _HEAD.size + name_bytes])
        yield from _read_networks(names, networks, network_count, count4, count6)
        position = _HEAD.size + name_bytes
        limits = (None, entry_count, None, None, entry_count, len(data) - entries_at, entry_count)
        parts: list[array[int]] = []
        for code, size, limit in zip("IIQQIII", sizes, limits, strict=True):
            part = array(code)
            for start in range(position, position + size, _SLICE * part.itemsize):
                piece = array(code, bytes(data[start : min(start + _SLICE * part.itemsize, position + size)]))
                if _BIG_ENDIAN:
                    piece.byteswap()
                if limit is not None and max(piece) > limit:
                    raise RouteDataError("compiled routes point outside of themselves")
                part.extend(piece)
                yield
            parts.append(part)
            position += size
        (self._starts4, self._values4, self._high6, self._low6, self._values6, self._offsets, self._parents) = parts
        self._networks, self._data, self._entries_at = networks, data, entries_at
        self._decoded, self.routes = {}, entry_count
        self.memory = (
            sum(part.itemsize * len(part) for part in parts)
            + len(data)
            + 400 * len(networks)  # CPython 3.11: the id, its spans, their place in the dict
        )

    def lookup(self, virtual_network_id: str, destination: bytes) -> RouteEntry | None:
        """The longest match for a packed address (4 or 16 bytes); None where no route covers it."""
        value = self._value(virtual_network_id, destination)
        return self._entry(value - 1) if value else None

    def covering(self, virtual_network_id: str, destination: bytes) -> list[RouteEntry]:
        """Every route that covers the address, longest prefix first."""
        value = self._value(virtual_network_id, destination)
        found: list[RouteEntry] = []
        while value and len(found) <= 128:
            found.append(self._entry(value - 1))
            value = self._parents[value - 1]
        return found

    def _value(self, virtual_network_id: str, destination: bytes) -> int:
        spans = self._networks.get(virtual_network_id)
        if spans is None:
            return 0
        if len(destination) == 4:
            low, high = spans[0], spans[1]
            at = bisect_right(self._starts4, int.from_bytes(destination, "big"), low, high)
            return self._values4[at - 1] if at > low else 0
        low, high = spans[2], spans[3]
        upper = int.from_bytes(destination[:8], "big")
        at = bisect_right(self._high6, upper, low, high)
        if at > low and self._high6[at - 1] == upper:
            first = bisect_left(self._high6, upper, low, at)
            at = bisect_right(self._low6, int.from_bytes(destination[8:], "big"), first, at)
        return self._values6[at - 1] if at > low else 0

    def _entry(self, index: int) -> RouteEntry:
        entry = self._decoded.get(index)
        if entry is None:
            start = self._entries_at + self._offsets[index]
            last = index + 1 == len(self._offsets)
            end = len(self._data) if last else self._entries_at + self._offsets[index + 1]
            entry = self._decoded[index] = _decoder.decode(self._data[start:end])
        return entry


_decoder: Final = msgspec.msgpack.Decoder(RouteEntry)


def _read_networks(
    data: bytes, networks: dict[str, tuple[int, int, int, int]], count: int, count4: int, count6: int
) -> Iterator[None]:
    """Read the table of virtual networks into `networks`: each one's spans in the arrays of ranges."""
    position = at4 = at6 = 0
    for index in range(count):
        try:
            length, ranges4, ranges6 = _NETWORK.unpack_from(data, position)
            position += _NETWORK.size + length
            network_id = data[position - length : position].decode()
        except (struct.error, UnicodeDecodeError) as error:
            raise RouteDataError("compiled routes have a broken table of virtual networks") from error
        networks[network_id] = (at4, at4 + ranges4, at6, at6 + ranges6)
        at4, at6 = at4 + ranges4, at6 + ranges6
        if index % _NETWORKS_A_TURN == 0:
            yield
    if (position, at4, at6, len(networks)) != (len(data), count4, count6, count):
        raise RouteDataError("compiled routes have a table of virtual networks that doesn't add up")


# Destinations that no route may send to the internet: each names where a socket of this node would mean something else
# than the client did. Reserved but forwardable blocks (documentation, benchmarking, private use) are left to routes.
_MARTIANS: Final = tuple(
    (int(network.network_address) >> shift, shift, len(network.network_address.packed), why)
    for network, why in (
        (IPv4Network("0.0.0.0/8"), "this_network (RFC 6890 table 1, RFC 1122 3.2.1.3)"),
        (IPv4Network("127.0.0.0/8"), "loopback (RFC 6890 table 4, RFC 1122 3.2.1.3)"),
        (IPv4Network("169.254.0.0/16"), "link_local (RFC 6890 table 5, RFC 3927 2.7)"),
        (IPv4Network("224.0.0.0/4"), "multicast (RFC 1112 4)"),
        (IPv4Network("255.255.255.255/32"), "limited_broadcast (RFC 6890 table 16, RFC 919 7)"),
        (IPv4Network("240.0.0.0/4"), "reserved (RFC 6890 table 15, RFC 1112 4)"),
        (IPv6Network("::1/128"), "loopback (RFC 6890 table 17, RFC 4291 2.5.3)"),
        (IPv6Network("::/128"), "unspecified (RFC 6890 table 18, RFC 4291 2.5.2)"),
        (IPv6Network("::/96"), "v4_compatible (RFC 4291 2.5.5.1)"),
        (IPv6Network("::ffff:0:0/96"), "v4_mapped (RFC 6890 table 20, RFC 4291 2.5.5.2)"),
        (IPv6Network("fe80::/10"), "link_local (RFC 6890 table 29, RFC 4291 2.5.6)"),
        (IPv6Network("ff00::/8"), "multicast (RFC 4291 2.7)"),
    )
    for shift in (network.max_prefixlen - network.prefixlen,)
)


def martian(destination: bytes) -> str | None:
    """Why a packed address may never leave by the internet, whatever routes say: "reason (RFC clause)"; None where it may."""
    number, size = int.from_bytes(destination, "big"), len(destination)
    for head, shift, length, why in _MARTIANS:
        if length == size and number >> shift == head:
            return why
    return None
