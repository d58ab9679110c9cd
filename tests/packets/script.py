"""The language of packet scripts (`*.pkt`), read into cases. Nothing here knows a socket.

A script is a list of cases, each with its reason as a comment before it::

    # RFC 5961 3.2: a RST in the window that isn't at RCV.NXT is answered with a challenge ACK.
    case rst-in-window
        only: ipv4 raw                     (where it isn't for all four ways)
        pasta: differs: what it does       (or `pasta: no: why not`; else the case holds for pasta too)
        > S 1000 mss=1460
        < S. 0 ack=1001 mss=1460
        > . 1001 ack=1
        server accept
        > R 1101
        < . 1 ack=1001
        silence

`>` injects a packet into the client's end of the tunnel, `<` demands that the next packet out of it is this one, `<~` that it
comes, with nothing but bare acknowledgments before it, `<*` that it comes in the end. A TCP packet is its flags (SFRPUEW, `.` for ACK, `-` for none), its
sequence number and what else matters: `ack=1001 win=0 len=100 mss=1460 ws=7 sackok sack=2001-3001 ts`, or `"text"`. The
client's numbers are its own, the server's are counted from its SYN, which is 0. What `<` doesn't name isn't compared; `!mss`
says that an option must be absent; `a|b` is `a` for IPv4 and `b` for IPv6; a number may be compared as well (`win>0`). Other
packets are `udp "text"`, `echo id=1 seq=1 "text"`, `icmp unreachable-host quote=last` and `proto=132 "text"`. Every packet takes what
belongs to IP: `ttl=1 tos=2 src=10.0.0.9 dst=denied ext=hop opt=rr sum=bad cut=30`.

Other verbs are the runner's (`tests.packets.runner`): `server ...` moves the server's sockets, `open`, `push`, `fetch` and `close` are
the usual exchanges, `silence` demands that nothing more comes, `drop reason` that a packet was dropped for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FAMILIES: Final = ("ipv4", "ipv6")
FRAMINGS: Final = ("vnet", "raw")
_TOKEN: Final = re.compile(r'"(?P<text>[^"]*)"|(?P<word>[^\s"]+)')
_PAIR: Final = re.compile(r"(?P<name>[a-z][a-z0-9]*)(?P<relation>=|<=|>=|<|>)(?P<value>.+)")


class ScriptError(Exception):
    """A script that can't be read; says where."""


@dataclass(frozen=True)
class Key:
    """`name=value`, `name>value` and so on; a bare word is `name` with an empty value, `!name` demands absence."""

    name: str
    relation: str
    value: str

    def holds(self, actual: int | str | None) -> bool:
        """Whether what a packet has is what is demanded."""
        if self.relation == "!":
            return actual is None
        if actual is None:
            return False
        if not self.value:
            return True
        if isinstance(actual, str):
            return self.relation == "=" and actual == self.value
        wanted = int(self.value, 0)
        return {
            "=": actual == wanted,
            "<": actual < wanted,
            ">": actual > wanted,
            "<=": actual <= wanted,
            ">=": actual >= wanted,
        }[self.relation]


@dataclass(frozen=True)
class Step:
    """One line."""

    line: int
    text: str
    verb: str
    words: tuple[str, ...]
    """What isn't a key: flags, numbers, names."""
    keys: tuple[Key, ...]
    data: bytes | None
    """The text in quotes."""

    def value(self, name: str, default: str = "") -> str:
        """A key's value."""
        return next((key.value for key in self.keys if key.name == name), default)

    def number(self, name: str, default: int = 0) -> int:
        """A key's value as a number."""
        found = self.value(name)
        return int(found, 0) if found else default

    def has(self, name: str) -> bool:
        """Whether a key or a bare word is there (and not `!name`)."""
        return name in self.words or any(key.name == name and key.relation != "!" for key in self.keys)


@dataclass
class Case:
    """One case, not yet bound to a family."""

    file: str
    name: str
    why: str
    line: int
    families: tuple[str, ...] = FAMILIES
    framings: tuple[str, ...] = FRAMINGS
    pasta: str = "same"
    """`same`, `differs: how` or `no: why not`."""
    server: dict[str, str] = field(default_factory=dict)
    """What the server is before anything happens: `server: closed`."""
    lines: list[tuple[int, str]] = field(default_factory=list)

    def steps(self, family: str) -> list[Step]:
        """Its steps for a family."""
        return [read_step(self.file, number, text, family) for number, text in self.lines]

    def ways(self) -> Iterator[tuple[str, str]]:
        """The (framing, family) pairs that it is for."""
        return ((framing, family) for framing in self.framings for family in self.families)


def read_step(file: str, number: int, text: str, family: str) -> Step:
    """One line of a case."""
    words: list[str] = []
    keys: list[Key] = []
    data: bytes | None = None
    for match in _TOKEN.finditer(text):
        if match["text"] is not None:
            data = match["text"].encode()
            continue
        word = match["word"]
        if len(words) == 0:
            words.append(word)
            continue
        pair = _PAIR.fullmatch(word)
        if pair:
            value = pair["value"]
            if "|" in value:
                value = value.split("|")[FAMILIES.index(family)]
            keys.append(Key(pair["name"], pair["relation"], value))
        elif word.startswith("!"):
            keys.append(Key(word[1:], "!", ""))
        elif "|" in word:
            words.append(word.split("|")[FAMILIES.index(family)])
        else:
            words.append(word)
    if not words:
        raise ScriptError(f"{file}:{number}: nothing to do")
    return Step(number, text, words[0], tuple(words[1:]), tuple(keys), data)


def read(path: Path) -> list[Case]:
    """All cases of a script. Raises ScriptError."""
    cases: list[Case] = []
    why: list[str] = []
    for number, raw in enumerate(path.read_text().splitlines(), start=1):
        line = raw.strip()
        where = f"{path.name}:{number}"
        if not line:
            if not raw:
                why.clear()
        elif line.startswith("#"):
            why.append(line.lstrip("# "))
        elif line.startswith("case "):
            cases.append(Case(path.stem, line[5:].strip(), " ".join(why), number))
            why.clear()
        elif not cases:
            raise ScriptError(f"{where}: a step before the first case")
        else:
            _add(cases[-1], number, line, where)
            why.clear()
    _check(path, cases)
    return cases


def _add(case: Case, number: int, line: str, where: str) -> None:
    head, colon, rest = line.partition(": ")
    if colon and head == "only" and not case.lines:
        words = rest.split()
        case.families = tuple(word for word in words if word in FAMILIES) or FAMILIES
        case.framings = tuple(word for word in words if word in FRAMINGS) or FRAMINGS
        if len(words) != len([word for word in words if word in (*FAMILIES, *FRAMINGS)]):
            raise ScriptError(f"{where}: only what?")
    elif colon and head == "pasta" and not case.lines:
        if not rest.startswith(("differs: ", "no: ")):
            raise ScriptError(f"{where}: `pasta: differs: how` or `pasta: no: why`")
        case.pasta = rest
    elif colon and head == "server" and not case.lines:
        case.server = {name: value or "1" for name, _, value in (word.partition("=") for word in rest.split())}
    else:
        case.lines.append((number, line))


def _check(path: Path, cases: Iterable[Case]) -> None:
    seen: set[str] = set()
    for case in cases:
        where = f"{path.name}:{case.line}: {case.name}"
        if case.name in seen:
            raise ScriptError(f"{where} is there twice")
        seen.add(case.name)
        if not case.why:
            raise ScriptError(f"{where} doesn't say why")
        if not case.lines:
            raise ScriptError(f"{where} does nothing")
        for family in case.families:
            case.steps(family)


def read_all(folder: Path) -> list[Case]:
    """Every case of a folder, in the order of file names and lines."""
    return [case for path in sorted(folder.glob("*.pkt")) for case in read(path)]
