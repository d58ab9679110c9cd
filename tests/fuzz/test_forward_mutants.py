"""Mutants of packets between two devices: nothing falls, all is counted, and nothing comes back that wasn't asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from falkirk.flow.passages import key_of_packet, key_of_quoted, reply_key
from falkirk.wire import vnet
from falkirk.wire.build import unreachable
from falkirk.wire.checksum import checksum, partial_field
from falkirk.wire.context import Framing
from falkirk.wire.icmp import Unreachable
from falkirk.wire.malformed import MalformedPacket
from falkirk.wire.packet import parse
from falkirk.wire.translate import quoted
from tests.flow_rig import read
from tests.forward_rig import BEHIND, ESP, LAPTOP, NAS, SCTP, TCP, End, Pair, between, datagram, echo, packet, tcp

ROUNDS, BATCH = 60, 50
FAMILIES = (4, 6)
FRAMINGS = [(Framing.RAW, Framing.RAW), (Framing.VNET, Framing.VNET), (Framing.RAW, Framing.VNET), (Framing.VNET, Framing.RAW)]  # fmt: skip
OURS = (bytes([192, 0, 0, 8]), bytes.fromhex("fd66616c6b69726b0000000000000001"))
"""Where Falkirk's own ICMP errors come from."""


@pytest.fixture(params=[(w, f) for w in (1, 2) for f in FRAMINGS], ids=lambda p: f"{p[0]}w-{p[1][0]}-{p[1][1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    workers, framings = request.param
    with between(tmp_path, workers, framings) as made:
        yield made


def valid(rng: Random, up: bool) -> tuple[bytes, bytes]:
    """A packet of one of a few flows, and its virtio-net header."""
    family = rng.choice(FAMILIES)
    here, there = LAPTOP[family], rng.choice((NAS, BEHIND))[family]
    ends = (here, there) if up else (there, here)
    port = 40000 + rng.randrange(3)
    ports = (port, 80) if up else (80, port)
    kind = rng.randrange(7)
    if kind == 0:
        return tcp(*ends, ports, rng.choice((2, 16, 18, 17, 20, 24)), rng.getrandbits(32), 1), vnet.ZERO
    if kind == 1:
        return datagram(*ends, *ports, bytes(rng.randrange(1400))), vnet.ZERO
    if kind == 2:
        return echo(*ends, rng.randrange(3), reply=not up), vnet.ZERO
    if kind == 3:
        return packet(*ends, rng.choice((SCTP, ESP)), bytes(rng.randrange(100))), vnet.ZERO
    if kind == 4:
        about = datagram(*ends[::-1], *ports[::-1])
        error = unreachable(about, parse(about, 0, len(about)), Unreachable.PORT, ends[0])
        assert error is not None
        return error, vnet.ZERO
    l4 = 20 if family == 4 else 40
    if kind == 5:
        whole = bytearray(datagram(*ends, *ports, bytes(100 * rng.randrange(1, 20))))
        whole[l4 + 6 : l4 + 8] = partial_field(*ends, 17, len(whole) - l4).to_bytes(2, "big")
        return bytes(whole), vnet.Header(1, vnet.GSO_UDP_L4, l4 + 8, 100, l4, 6).pack()
    body = bytearray(tcp(*ends, ports, 16, rng.getrandbits(32), 1)[l4:] + bytes(rng.randrange(10000)))
    body[16:18] = partial_field(*ends, TCP, len(body)).to_bytes(2, "big")
    kind = vnet.GSO_TCPV4 if family == 4 else vnet.GSO_TCPV6
    return packet(*ends, TCP, bytes(body)), vnet.Header(1, kind, l4 + 20, 1400, l4, 16).pack()


def mutant(rng: Random, data: bytes, header: bytes) -> tuple[bytes, bytes]:
    """One or two bytes of it are something else; the IPv4 header's checksum is right mostly."""
    changed, head = bytearray(data), bytearray(header)
    for _ in range(rng.randrange(3)):
        if rng.random() < 0.2:
            head[rng.randrange(10)] = rng.choice((0, 1, 2, 20, 40, 255, rng.randrange(256)))
        else:
            changed[rng.randrange(min(len(changed), 80))] = rng.choice((0, 1, 255, rng.randrange(256)))
    if rng.random() < 0.05:
        del changed[rng.randrange(len(changed)) :]
    size = (changed[0] & 15) << 2 if changed else 0
    if changed[:1] and changed[0] >> 4 == 4 and 20 <= size <= len(changed) and rng.random() < 0.9:
        changed[10:12] = b"\0\0"
        changed[10:12] = checksum(changed[:size]).to_bytes(2, "big")
    return bytes(changed), bytes(head)


def key_of_any(body: bytes) -> bytes | None:
    """The key of a packet, or of what answers the one that it quotes; None where it has none."""
    try:
        whole = parse(body, 0, len(body))
        return key_of_quoted(body, whole, quoted(body, whole)) if whole.is_icmp_error else key_of_packet(whole)
    except (MalformedPacket, IndexError):
        return None


def came(end: End) -> Iterator[bytes]:
    """What an end's host gets: packets, each under a virtio-net header that is true; without fragments, of which no more is known."""
    for data in read(end.sock):
        header, body = (vnet.ZERO, data) if end.framing is Framing.RAW else (data[:10], data[10:])
        whole = parse(body, 0, len(body), fragments=True)
        assert whole.total_length == len(body)
        assert vnet.validate(vnet.unpack(header, 0, 10), whole, 1500).gso_size == int.from_bytes(header[4:6], "little")
        assert int.from_bytes(header[2:4], "little") <= len(body)
        if whole.source not in OURS and not whole.is_fragment:
            yield body


def test_mutants_between_devices(pair: Pair) -> None:
    rng = Random(f"{len(pair.rigs)}{pair.laptop.framing}{pair.nas.framing}")
    asked: dict[bool, set[bytes]] = {True: set(), False: set()}
    passed = 0
    for _ in range(ROUNDS):
        for _ in range(BATCH):
            up = rng.random() < 0.6
            end = pair.laptop if up else pair.nas
            data, header = mutant(rng, *valid(rng, up))
            if not data:
                continue
            key = key_of_any(data)
            if key is not None:
                asked[up].add(key)
            end.sock.send(data if end.framing is Framing.RAW else header + data)
        pair.step()
        for body in came(pair.laptop):
            passed += 1
            key = key_of_any(body)
            # To the laptop comes what answers something that it has sent, and resets of its segments.
            assert key is not None
            assert reply_key(key) in asked[True]
        for body in came(pair.nas):
            passed += 1
            # To the NAS comes what the laptop has sent, and resets of its own segments.
            whole = parse(body, 0, len(body), fragments=True)
            if whole.source not in LAPTOP.values():
                key = key_of_packet(whole)
                assert key is not None
                assert (whole.flags & 4, reply_key(key) in asked[False]) == (4, True)
    assert passed > ROUNDS * BATCH // 5
    # Some led to the internet, and wait there; with the tunnels all of it is over.
    for end in (pair.laptop, pair.nas):
        end.sock.close()
    for _ in range(3):
        pair.step()
    assert [len(rig.worker.tunnels) for rig in pair.rigs] == [0] * len(pair.rigs)
    assert (pair.flows(), pair.balanced()) == (0, True)
