"""Which of a tenant's rules can match a question: a bitmap a variable. PURE.

Rule i of a tenant is bit i. For each variable that some rule has a guard on, a dictionary maps a value to the rules that
ask for it; rules without a guard on that variable are always in. A question's candidates are the AND over variables of
(rules that ask for its value | rules that don't ask), so 10,000 rules cost a handful of operations on 1.25 kB integers,
and the lowest bit is the first rule in order. Destinations are looked up once for each prefix length in use; ranges of ports are cut into
blocks of powers of two and looked up likewise. Of maps (`device.posture`, `app.attributes`) at most `MAP_KEYS` keys are looked at: guards on
others are left out, and their rules evaluated.

A value asked for by few rules keeps their numbers, one asked for by many keeps a bitmap, so memory is linear in the
number of guards. `add` costs 2-4 us a rule; `seal` is a generator whose steps stay below 1 ms.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Final

from falkirk.decide.guards import DESTINATION, GROUP_LISTS, MAPS, MISSING, PORTS, SCALARS, Value, ports

_SPARSE: Final = 8
"""A value asked for by at most so many rules keeps a list."""
MAP_KEYS: Final = 32
"""Keys of maps; each costs every question a look-up."""
_SEAL_STEP: Final = 2048
"""Rule numbers turned into bitmaps between two yields."""

_OF_MAPS: Final = tuple(f"{name}[" for name in MAPS)

_Entries = dict[Value, list[int]]
_Sealed = dict[Value, "list[int] | int"]


class Question:
    """What the index looks at; `scalars` in the order of `guards.SCALARS`, `groups` in that of `guards.GROUP_LISTS`, `maps` of
    `guards.MAPS`."""

    __slots__ = ("destination", "family", "groups", "maps", "port", "scalars")

    def __init__(
        self,
        destination: bytes,
        groups: tuple[Sequence[str], ...],
        scalars: tuple[Value, ...],
        port: int = 0,
        maps: tuple[Mapping[str, str], ...] = ({}, {}),
    ) -> None:
        self.destination = int.from_bytes(destination, "big")
        self.family = 4 if len(destination) == 4 else 6
        self.groups = groups
        self.scalars = scalars
        self.port = port
        self.maps = maps


class RuleIndex:
    """Candidates for a question among one tenant's rules."""

    def __init__(self) -> None:
        self._count = 0
        self._guarded: dict[str, bytearray] = {}
        self._scalars: dict[str, _Entries] = {}
        self._groups: dict[str, _Entries] = {}
        self._prefixes: dict[tuple[int, int], _Entries] = {}
        self._ports: dict[int, _Entries] = {}
        self._keys: dict[str, _Entries] = {}
        # Filled by seal():
        self._all = 0
        self._scalar_tables: list[tuple[int, int, _Sealed]] = []
        self._group_tables: list[tuple[int, int, _Sealed]] = []
        self._map_tables: list[tuple[int, str, int, _Sealed]] = []
        self._port_free: int | None = None
        self._port_tables: list[tuple[int, _Sealed]] = []
        self._prefix_free: int | None = None
        self._prefix_tables: dict[int, list[tuple[int, _Sealed]]] = {4: [], 6: []}

    def add(self, values: Mapping[str, Sequence[Value]]) -> None:
        """The next rule, by its guards."""
        number = self._count
        self._count += 1
        for variable, allowed in values.items():
            of_map = variable.startswith(_OF_MAPS)
            if of_map and variable not in self._keys and len(self._keys) >= MAP_KEYS:
                continue
            bits = self._guarded.setdefault(variable, bytearray())
            bits.extend(bytes((number >> 3) + 1 - len(bits)))
            bits[number >> 3] |= 1 << (number & 7)
            if variable == DESTINATION:
                for text in allowed:
                    network = ipaddress.ip_network(text)
                    shift = network.max_prefixlen - network.prefixlen
                    table = self._prefixes.setdefault((network.version, shift), {})
                    table.setdefault(int(network.network_address) >> shift, []).append(number)
                continue
            if variable == PORTS:
                for text in allowed:
                    for shift, block in _blocks(*ports(text)):
                        self._ports.setdefault(shift, {}).setdefault(block, []).append(number)
                continue
            kind = self._keys if of_map else self._groups if variable in GROUP_LISTS else self._scalars
            table = kind.setdefault(variable, {})
            for value in allowed:
                table.setdefault(value, []).append(number)

    def seal(self) -> Generator[None, None, None]:
        """Makes the bitmaps; nothing may be added afterwards."""
        self._all = (1 << self._count) - 1
        for position, variable in enumerate(SCALARS):
            if variable in self._guarded:
                table = yield from self._table(self._scalars.get(variable, {}))
                self._scalar_tables.append((position, self._free(variable), table))
                yield
        for position, variable in enumerate(GROUP_LISTS):
            if variable in self._guarded:
                table = yield from self._table(self._groups.get(variable, {}))
                self._group_tables.append((position, self._free(variable), table))
                yield
        for variable, entries in self._keys.items():
            name, _, key = variable[:-1].partition("[")
            table = yield from self._table(entries)
            self._map_tables.append((MAPS.index(name), key, self._free(variable), table))
            yield
        if PORTS in self._guarded:
            self._port_free = self._free(PORTS)
            for shift, entries in sorted(self._ports.items()):
                self._port_tables.append((shift, (yield from self._table(entries))))
            yield
        if DESTINATION in self._guarded:
            self._prefix_free = self._free(DESTINATION)
            for (family, shift), entries in sorted(self._prefixes.items()):
                self._prefix_tables[family].append((shift, (yield from self._table(entries))))
            yield
        self._guarded, self._scalars, self._groups, self._prefixes = {}, {}, {}, {}
        self._ports, self._keys = {}, {}

    def candidates(self, question: Question) -> int:
        """A bitmap of the rules whose guards the question meets."""
        result = self._all
        free = self._prefix_free
        if free is not None:
            destination = question.destination
            for shift, table in self._prefix_tables[question.family]:
                entry = table.get(destination >> shift)
                if entry is not None:
                    free |= entry if isinstance(entry, int) else _bits(entry)
            result &= free
        for position, free, table in self._scalar_tables:
            entry = table.get(question.scalars[position])
            if entry is not None:
                free |= entry if isinstance(entry, int) else _bits(entry)
            result &= free
            if not result:
                return 0
        free = self._port_free
        if free is not None:
            for shift, table in self._port_tables:
                entry = table.get(question.port >> shift)
                if entry is not None:
                    free |= entry if isinstance(entry, int) else _bits(entry)
            result &= free
        for position, key, free, table in self._map_tables:
            entry = table.get(question.maps[position].get(key, MISSING))
            if entry is not None:
                free |= entry if isinstance(entry, int) else _bits(entry)
            result &= free
        for position, free, table in self._group_tables:
            for group in question.groups[position]:
                entry = table.get(group)
                if entry is not None:
                    free |= entry if isinstance(entry, int) else _bits(entry)
            result &= free
        return result

    def _free(self, variable: str) -> int:
        """The rules without a guard on a variable."""
        return self._all ^ int.from_bytes(self._guarded[variable], "little")

    def _table(self, entries: _Entries) -> Generator[None, None, _Sealed]:
        """The same entries with bitmaps where they are worth it."""
        table: _Sealed = {}
        work = 0
        for value, numbers in entries.items():
            if len(numbers) <= _SPARSE:
                table[value] = numbers
                work += 1
            else:
                bits = bytearray((self._count >> 3) + 1)
                for start in range(0, len(numbers), _SEAL_STEP):
                    for number in numbers[start : start + _SEAL_STEP]:
                        bits[number >> 3] |= 1 << (number & 7)
                    if start:
                        yield
                table[value] = int.from_bytes(bits, "little")
                work += len(numbers) + (self._count >> 6)
            if work > _SEAL_STEP:
                work = 0
                yield
        return table


def _blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """A range as blocks (shift, number >> shift) of powers of two, at most 30 of them for ports."""
    while first <= last:
        shift = (first & -first).bit_length() - 1 if first else 16
        while first + (1 << shift) - 1 > last:
            shift -= 1
        yield shift, first >> shift
        first += 1 << shift


def _bits(numbers: list[int]) -> int:
    result = 0
    for number in numbers:
        result |= 1 << number
    return result
