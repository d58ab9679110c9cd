"""Datagrams of valid flows, and mutants of them that are wrong in one or two places and right in the rest.

A mutant whose checksums don't add up dies in the first test of a parser and shows nothing about what comes behind, so most
mutants have their checksums (and, where that isn't what is wrong, their lengths) made right again.

Payloads and SYNs carry `MAGIC` and four bytes that name their tunnel. What must never pass (a foreign source address, a
virtio-net header that lies) carries `NEVER` instead.
"""

from __future__ import annotations

import struct
from random import Random
from typing import Final

from falkirk.wire.fragments import cut
from tests.flow_rig import SERVER4, SERVER6

MAGIC: Final = b"\xf5TAG"
NEVER: Final = b"\xf5BAD"
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
ZERO: Final = bytes(10)
VNET: Final = struct.Struct("=BBHHHH")
GSO_SIZE: Final = 1448
FOREIGN4: Final = bytes([100, 96, 9, 9])
FOREIGN6: Final = bytes.fromhex("fd00000000000009000000000000000f")
ELSEWHERE4: Final = (
    bytes([198, 51, 100, 7]),
    bytes([127, 0, 0, 1]),
    bytes([224, 0, 0, 251]),
    bytes(4),
    b"\xff" * 4,
    bytes([10, 0, 0, 1]),
    bytes([203, 0, 113, 99]),
)
ELSEWHERE6: Final = tuple(
    bytes.fromhex(text)
    for text in (
        "ff0200000000000000000000000000fb",
        "00000000000000000000000000000001",
        "00000000000000000000ffff7f000001",
        "fe800000000000000000000000000001",
        "fd66616c6b69726b0000000000000001",
        "20010db8000000000000000000000063",
    )
)
OPTIONS4: Final = (
    b"\x01\x01\x01\x00",
    b"\x94\x04\x00\x00",
    b"\x44\x08\x05\x00\x00\x00\x00\x00",
    b"\x83\x07\x04\x01\x02\x03\x04\x00",
    b"\x89\x03\x04\x00",
    b"\x07\x00\x00\x00",
    b"\x07\xff\x00\x00",
    b"\x01" * 40,
)
EXTENSIONS6: Final = (
    (0, b"\x06\x00\x01\x04\x00\x00\x00\x00"),
    (60, b"\x06\x00\x01\x04\x00\x00\x00\x00"),
    (60, b"\x3c\x00\x01\x04\x00\x00\x00\x00\x06\x00\x01\x04\x00\x00\x00\x00"),
    (43, b"\x06\x00\x00\x00\x00\x00\x00\x00"),
    (43, b"\x06\x00\x04\x00\x00\x00\x00\x00"),
    (43, b"\x06\x02\x02\x01" + bytes(20)),
    (44, b"\x06\x00\x00\x00\x00\x00\x00\x07"),
    (44, b"\x06\x00\x00\x01\x00\x00\x00\x07"),
    (44, b"\x06\x00\x10\x01\x00\x00\x00\x07"),
    (60, b"\x06\xff\x01\x04\x00\x00\x00\x00"),
    (60, b"\x00\x00\x01\x04\x00\x00\x00\x00\x06\x00\x01\x04\x00\x00\x00\x00"),
    (60, b"\x3c\x00\x01\x04\x00\x00\x00\x00" * 9),
    (51, b"\x06\x04" + bytes(22)),
)


def total(data: bytes | bytearray) -> int:
    """RFC 1071's sum, modulo 65,535."""
    return (int.from_bytes(data, "big") << (len(data) & 1) * 8) % 0xFFFF


def fix(packet: bytearray, partial: bool = False) -> None:
    """Make checksums right where there is room for them; lengths stay as they are."""
    if len(packet) < 20:
        return
    if packet[0] >> 4 == 4:
        upper = (packet[0] & 15) << 2
        if not 20 <= upper <= len(packet):
            return
        packet[10:12] = b"\0\0"
        packet[10:12] = (-total(packet[:upper]) % 0xFFFF).to_bytes(2, "big")
        protocol, addresses = packet[9], packet[12:20]
    elif packet[0] >> 4 == 6 and len(packet) >= 40:
        upper, protocol, addresses = 40, packet[6], packet[8:40]
        while protocol in (0, 43, 44, 60) and upper + 8 <= len(packet):
            size = 8 if protocol == 44 else (packet[upper + 1] + 1) << 3
            protocol = packet[upper]
            upper += size
    else:
        return
    at = upper + {6: 16, 17: 6, 1: 2, 58: 2}.get(protocol, 1 << 20)
    if at + 2 > len(packet):
        return
    pseudo = 0 if protocol == 1 else (total(addresses) + protocol + len(packet) - upper) % 0xFFFF
    if partial and protocol in (6, 17):
        packet[at : at + 2] = pseudo.to_bytes(2, "big")
        return
    packet[at : at + 2] = b"\0\0"
    packet[at : at + 2] = (-(total(packet[upper:]) + pseudo) % 0xFFFF).to_bytes(2, "big")


def lengths(packet: bytearray) -> None:
    """Make the IP header say how long the packet is."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        packet[2:4] = min(len(packet), 65535).to_bytes(2, "big")
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        packet[4:6] = min(len(packet) - 40, 65535).to_bytes(2, "big")


def ip(source: bytes, destination: bytes, protocol: int, body: bytes, ttl: int = 64) -> bytearray:
    """A packet with right checksums."""
    if len(source) == 4:
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 7, 0x4000, ttl, protocol, 0, source, destination)
    else:
        head = struct.pack(">IHBB16s16s", 6 << 28, len(body), protocol, ttl, source, destination)
    packet = bytearray(head + body)
    fix(packet)
    return packet


def tcp(
    source: bytes,
    destination: bytes,
    ports: tuple[int, int],
    numbers: tuple[int, int],
    flags: int,
    payload: bytes = b"",
    options: bytes = b"",
) -> bytearray:
    """A segment in its packet."""
    offset = (20 + len(options)) << 2
    head = struct.pack(">HHIIBBHHH", *ports, numbers[0], numbers[1], offset, flags, 4096, 0, 0)
    return ip(source, destination, 6, head + options + payload)


class Sender:
    """One flow's initiator: what it says next, valid as long as nobody mutates it."""

    def __init__(self, chance: Random, source: bytes, mark: bytes, port: int) -> None:
        self.chance, self.source, self.mark = chance, source, mark
        self.destination = SERVER4 if len(source) == 4 else SERVER6
        # Some to closed doors: 23 is denied by a rule, 25 by none.
        self.ports = (port, chance.choice((80, 80, 80, 443, 443, 8080, 23, 25)))
        self.sequence = chance.randrange(1 << 32)
        self.acknowledgment = 0
        self.steps = [
            "syn",
            "ack",
            *chance.choices(["data", "ack", "big", "icmp"], (6, 2, 2, 1), k=chance.randrange(9)),
        ]
        self.steps.append(chance.choice(("fin", "fin", "fin", "rst", "silence")))
        if self.steps[-1] == "fin":
            self.steps += ["ack", "ack", chance.choice(("syn", "ack"))]
        self.steps.reverse()
        self.down = b""
        """The last packet that came back, for ICMP errors to quote."""

    def next(self) -> tuple[bytearray, bool] | None:
        """The next packet, and whether it is a super-packet; None where the flow has said all."""
        if not self.steps:
            return None
        step = self.steps.pop()
        if step == "syn":
            return self._segment(SYN, b"", b"\x02\x04\x05\xb4\xfd\x0a" + self.mark + b"\x01\x01"), False
        if step == "data":
            return self._segment(ACK | PSH, self.mark + b"d" * self.chance.randrange(64)), False
        if step == "big":
            return self._segment(ACK, self.mark + b"b" * self.chance.randrange(1400, 6000)), True
        if step == "icmp" and self.down:
            return self.error(), False
        flags = {"fin": FIN | ACK, "rst": RST | ACK}.get(step, ACK)
        return self._segment(flags, b""), False

    def _segment(self, flags: int, payload: bytes, options: bytes = b"") -> bytearray:
        numbers = (self.sequence, self.acknowledgment)
        packet = tcp(self.source, self.destination, self.ports, numbers, flags, payload, options)
        self.sequence = (self.sequence + len(payload) + (flags & 1) + (flags >> 1 & 1)) % (1 << 32)
        return packet

    def error(self) -> bytearray:
        """An ICMP error about the last packet that came back."""
        four = len(self.source) == 4
        kinds = (
            ((3, 4), (3, 1), (11, 0), (12, 0), (4, 0), (5, 0), (8, 0))
            if four
            else ((1, 0), (2, 0), (3, 0), (4, 1), (137, 0), (128, 0))
        )
        kind, code = self.chance.choice(kinds)
        quote = self.down[: self.chance.choice((28, 48, 60, 200, 7))]
        body = struct.pack(">BBHI", kind, code, 0, 1280) + quote
        return ip(self.source, self.destination, 1 if four else 58, body)


class Mutator:
    """Makes mutants; `name` says which kinds of change the last one had."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self._ways = [
            (way, weight)
            for way, weight in (
                (self._flags, 8),
                (self._numbers, 8),
                (self._ports, 4),
                (self._payload, 6),
                (self._tcp_byte, 8),
                (self._offset, 3),
                (self._option, 3),
                (self._ip_byte, 8),
                (self._hops, 2),
                (self._fragment, 2),
                (self._protocol, 4),
                (self._elsewhere, 4),
                (self._spoof, 3),
                (self._ip_options, 6),
                (self._length_field, 3),
                (self._cut, 3),
                (self._extend, 2),
                (self._flip, 4),
                (self._version, 1),
            )
        ]
        self._names, self._weights = zip(*self._ways, strict=True)

    def mutant(self, packet: bytearray, *, vnet: bool, big: bool, others: list[bytes]) -> bytes:
        """A datagram made of `packet`: raw or behind a virtio-net header; `others` are packets of the same tunnel."""
        chance = self.chance
        odd = chance.random()
        if odd < 0.004:
            return chance.choice((b"", b'{"v":1,"tenant":"other","device":"laptop"}', b"{", chance.randbytes(40)))
        mutant = bytearray(packet)
        fixed = chance.random() < 0.9
        for _ in range(1 if chance.random() < 0.8 else 2):
            if len(mutant) < 40:
                break
            (way,) = chance.choices(self._names, self._weights)
            again = way(mutant)
            fixed = fixed and again is not False
        if vnet:
            return self._behind_header(mutant, big, fixed)
        if fixed:
            fix(mutant)
        if others and odd > 0.93:
            parts = [bytes(mutant), *chance.choices(others, k=chance.randrange(1, 40 if odd > 0.99 else 4))]
            if chance.random() < 0.5:
                chance.shuffle(parts)
            return b"".join(parts)[:60000]
        return bytes(mutant)

    def framed(self, packet: bytearray, *, vnet: bool, big: bool) -> bytes:
        """The packet as a well-behaved producer sends it."""
        if not vnet:
            return bytes(packet)
        if not big and self.chance.random() < 0.5:
            return ZERO + packet
        if packet[9 if packet[0] >> 4 == 4 else 6] != 6:
            return ZERO + packet
        return self._header(packet, big) + packet

    def fragments(self, packet: bytearray, *, vnet: bool) -> list[bytes]:
        """The packet in pieces: in any order, some twice, some told that the path is congested; all of TCP's header in the first."""
        chance = self.chance
        parts = [
            bytearray(part) for part in cut(bytes(packet), chance.choice((96, 160, 600)), chance.randrange(1 << 16))
        ]
        for part in parts:
            if chance.random() < 0.05:
                part[1] |= 3 if part[0] >> 4 == 4 else 0x30
                if part[0] >> 4 == 4:
                    part[10:12] = b"\0\0"
                    part[10:12] = (-total(part[:20]) % 0xFFFF).to_bytes(2, "big")
        if chance.random() < 0.3:
            parts.insert(0, chance.choice(parts))
        if chance.random() < 0.3:
            chance.shuffle(parts)
        return [(ZERO if vnet else b"") + part for part in parts]

    def _header(self, packet: bytearray, big: bool) -> bytes:
        four = packet[0] >> 4 == 4
        upper = 20 if four else 40
        fix(packet, partial=True)
        gso = (1 if four else 4) if big else 0
        return VNET.pack(1, gso, self.chance.choice((0, upper + 20)), GSO_SIZE if big else 0, upper, 16)

    def _behind_header(self, mutant: bytearray, big: bool, fixed: bool) -> bytes:
        chance = self.chance
        plain = (
            len(mutant) >= 60 and mutant[0] in (0x45, *range(0x60, 0x70)) and mutant[9 if mutant[0] == 0x45 else 6] == 6
        )
        if chance.random() < 0.12 and plain:
            return self._lie(mutant, big)
        if fixed and plain and (big or chance.random() < 0.4):
            return self._header(mutant, big) + mutant
        if fixed:
            fix(mutant)
        if chance.random() < 0.01:
            return (ZERO + mutant)[: chance.randrange(1, 30)]
        return ZERO + mutant

    def _lie(self, mutant: bytearray, big: bool) -> bytes:
        chance = self.chance
        fields = list(VNET.unpack(self._header(mutant, big)))
        way = chance.randrange(6)
        if way == 0:
            fields[0] |= chance.choice((4, 8, 16, 128))
        elif way == 1:
            fields[1] = chance.choice((2, 3, 5, 6, 0x7F, 4 if mutant[0] == 0x45 else 1))
        elif way == 2:
            fields[1], fields[3] = fields[1] or (1 if mutant[0] == 0x45 else 4), chance.choice((0, 1, 535, 1501, 65535))
        elif way == 3:
            fields[4] = chance.choice((0, 14, fields[4] + 2, fields[4] ^ 1, 65535))
        elif way == 4:
            fields[5] = chance.choice((0, 6, 15, 17, 65535))
        else:
            fields[0], fields[1] = 0, fields[1] or (1 if mutant[0] == 0x45 else 4)
        mark(mutant)
        fix(mutant, partial=bool(fields[0] & 1))
        return VNET.pack(*fields) + mutant

    # ways; False: the packet's checksums shall stay wrong

    def _upper(self, packet: bytearray) -> int:
        return (packet[0] & 15) << 2 if packet and packet[0] >> 4 == 4 else 40

    def _flags(self, packet: bytearray) -> None:
        at = self._upper(packet) + 13
        if at < len(packet):
            packet[at] = self.chance.choice(
                (
                    0,
                    1,
                    2,
                    3,
                    4,
                    6,
                    7,
                    16,
                    17,
                    18,
                    20,
                    24,
                    0x3F,
                    0xC2,
                    0xFF,
                    packet[at] ^ (1 << self.chance.randrange(8)),
                )
            )

    def _numbers(self, packet: bytearray) -> None:
        at = self._upper(packet) + self.chance.choice((4, 8))
        packet[at : at + 4] = (
            self.chance.choice((self.chance.randbytes(4), bytes(4), b"\xff" * 4))
            if at + 4 <= len(packet)
            else packet[at : at + 4]
        )

    def _ports(self, packet: bytearray) -> None:
        at = self._upper(packet) + self.chance.choice((0, 2))
        if at + 2 <= len(packet):
            packet[at : at + 2] = self.chance.choice(
                (b"\0\0", b"\xff\xff", b"\0\x17", b"\x27\x11", self.chance.randbytes(2))
            )

    def _payload(self, packet: bytearray) -> None:
        at = self._upper(packet) + 20
        del packet[at + 18 :]
        packet += self.chance.randbytes(self.chance.choice((0, 1, 7, 100, 1400)))
        lengths(packet)

    def _tcp_byte(self, packet: bytearray) -> None:
        at = self._upper(packet) + self.chance.randrange(20)
        if at < len(packet):
            packet[at] = self.chance.randrange(256)

    def _offset(self, packet: bytearray) -> None:
        at = self._upper(packet) + 12
        if at < len(packet):
            packet[at] = self.chance.randrange(16) << 4

    def _option(self, packet: bytearray) -> None:
        at = self._upper(packet)
        if at + 20 <= len(packet) and packet[at + 12] >> 4 < 12:
            packet[at + 20 : at + 20] = self.chance.randbytes(12)
            packet[at + 12] += 0x30
            lengths(packet)

    def _ip_byte(self, packet: bytearray) -> None:
        # Not the source address: see `_spoof`.
        four = packet[0] >> 4 == 4
        at = self.chance.choice((1, 4, 5, 6, 8, 9, 16, 17, 18, 19) if four else (1, 2, 3, 6, 7, *range(24, 40)))
        packet[at] = self.chance.randrange(256) if self.chance.random() < 0.5 else packet[at] ^ 1

    def _hops(self, packet: bytearray) -> None:
        packet[8 if packet[0] >> 4 == 4 else 7] = self.chance.randrange(3)

    def _fragment(self, packet: bytearray) -> None:
        if packet[0] >> 4 == 4:
            packet[6:8] = self.chance.choice((b"\x20\0", b"\0\x01", b"\x3f\xff", b"\0\0", b"\x80\0"))

    def _protocol(self, packet: bytearray) -> None:
        four = packet[0] >> 4 == 4
        packet[9 if four else 6] = self.chance.choice((0, 1, 2, 4, 17, 17, 17, 41, 47, 50, 58, 59, 132, 255))
        at = self._upper(packet)
        if len(packet) > at + 8 and self.chance.random() < 0.7:
            packet[at + 4 : at + 6] = (len(packet) - at).to_bytes(2, "big")

    def _elsewhere(self, packet: bytearray) -> None:
        if packet[0] >> 4 == 4:
            packet[16:20] = self.chance.choice(ELSEWHERE4)
        else:
            packet[24:40] = self.chance.choice(ELSEWHERE6)

    def _spoof(self, packet: bytearray) -> None:
        if packet[0] >> 4 == 4:
            packet[12:16] = self.chance.choice((FOREIGN4, bytes(4), b"\xff" * 4, bytes([127, 0, 0, 1]), SERVER4))
        else:
            packet[8:24] = self.chance.choice((FOREIGN6, bytes(16), b"\xff" * 16, SERVER6, bytes(15) + b"\1"))
        mark(packet)

    def _ip_options(self, packet: bytearray) -> None:
        if packet[0] == 0x45:
            options = self.chance.choice(OPTIONS4)
            packet[20:20] = options
            packet[0] += len(options) >> 2
        elif packet[0] >> 4 == 6 and packet[6] == 6:
            packet[6], extension = self.chance.choice(EXTENSIONS6)
            packet[40:40] = extension
        lengths(packet)

    def _length_field(self, packet: bytearray) -> None:
        at = 2 if packet[0] >> 4 == 4 else 4
        packet[at : at + 2] = self.chance.choice((b"\0\0", b"\xff\xff", b"\0\x14", self.chance.randbytes(2)))

    def _cut(self, packet: bytearray) -> None:
        del packet[self.chance.randrange(1, max(len(packet), 2)) :]
        if len(packet) >= 40 and self.chance.random() < 0.7:
            lengths(packet)

    def _extend(self, packet: bytearray) -> None:
        packet += self.chance.randbytes(self.chance.randrange(1, 40))

    def _flip(self, packet: bytearray) -> bool:
        four = packet[0] >> 4 == 4
        for _ in range(self.chance.randrange(1, 4)):
            at = self.chance.randrange(len(packet))
            if at in (range(12, 16) if four else range(8, 24)):
                continue
            packet[at] ^= 1 << self.chance.randrange(8)
        return False

    def _version(self, packet: bytearray) -> None:
        packet[0] = self.chance.choice((0, 0x15, 0x40, 0x44, 0x4F, 0x55, 0x65, 0x70, 0xF5))


def mark(packet: bytearray) -> None:
    """This one must never pass."""
    at = packet.find(MAGIC)
    if at >= 0:
        packet[at : at + 4] = NEVER
    else:
        packet += NEVER
        lengths(packet)
