"""Mutated WireGuard datagrams: none may change anything, be delivered, or be answered but by a cookie reply under load.

    PYTHONPATH=services:. python -m tests.fuzz.wireguard_mutants [COUNT [SEED]]        a million by default, a minute or so

Two nodes have a session, an initiation that wasn't delivered yet, and one that waits for its response. From what they sent mutants are made:
bits and bytes changed, cut, lengthened, spliced, types and indices exchanged. Whoever knows the public keys can make the outer mac right
again, so half the mutants of handshake messages have it made so, and reach the Noise behind.

Not mutants but messages like the original: those that differ only in mac2, which counts under load only, or in a sender's index below a right mac1,
which nothing else protects (5.4.2), or a cookie reply's receiver, where it is another index of the same peer's.
"""

from __future__ import annotations

import sys
import time
from random import Random
from typing import Any, Final

from falkirk.wireguard import primitives
from falkirk.wireguard.cookies import mac1_key
from falkirk.wireguard.counters import REASONS
from falkirk.wireguard.guard import Guard
from falkirk.wireguard.messages import COOKIE, COOKIE_SIZE, MAC_OFFSETS, SIZES
from tests.unit.wireguard.pair import BACK, CLIENT, SERVER, Host, World, packet

MILLION: Final = 1_000_000
_ELSEWHERE: Final = ("203.0.113.66", 666)
_INDICES: Final = slice(4, 8)


class Stage:
    """Two nodes in the middle of everything, and what is on the wire between them."""

    def __init__(self, *, loaded: bool) -> None:
        self.world = world = World(preshared=b"p" * 32)
        world.connect()
        for host in (world.client, world.server):
            host.node.guard._handshakes = Guard(float("inf"))._handshakes
        world.client.send(world.to_server, packet(), packet(size=1400), b"")
        data = world.lost()
        world.answer(BACK, b"")
        back = world.lost()
        world.now += 6
        # The server's own initiation is answered, and the answer is under way; the client's is under way.
        (asked,) = world.server.node.initiate(world.to_client, world.now, world.wall)
        (response,) = world.client.receive(asked, SERVER)
        world.lost()
        world.now += 6
        (initiation,) = world.client.node.initiate(world.to_server, world.now, world.wall)
        world.client.node.guard.forced = True
        (cookie,) = world.client.receive(asked, SERVER)
        world.lost()
        world.client.node.guard.forced = loaded
        world.server.node.guard.forced = loaded
        self.loaded = loaded
        self.originals: list[tuple[Host, bytes]] = [
            *((world.server, datagram) for datagram in data),
            *((world.client, datagram) for datagram in back),
            (world.server, initiation),
            (world.server, response),
            (world.server, cookie),
            (world.client, asked),
        ]
        self.pool = [datagram for _, datagram in self.originals]
        self.handshakes = (initiation, response, cookie)

    def prints(self) -> list[Any]:
        """All that must stay as it is."""
        return [_state(host) for host in (self.world.client, self.world.server)]

    def finish(self) -> None:
        """What was mutated is still good."""
        world = self.world
        initiation, response, cookie = self.handshakes
        for host in (world.client, world.server):
            host.node.guard.forced = False
            host.events.clear()
        for host, datagram in self.originals[:5]:
            host.receive(datagram, CLIENT if host is world.server else SERVER)
        assert world.server.take() == [packet(), packet(size=1400)]
        assert world.client.take() == [BACK]
        world.server.receive(cookie, CLIENT)
        assert len(world.to_client.cookie) == 16
        world.server.receive(response, CLIENT)
        assert world.server.kinds() == ["handshake"]
        assert [answer[0] for answer in world.server.receive(initiation, CLIENT)] == [2]


def _state(host: Host) -> Any:
    table = host.node._table
    peers = [
        (
            peer.endpoint,
            peer.timestamp,
            peer.cookie,
            peer.pending,
            peer.queue,
            peer.current,
            peer.previous,
            peer.next,
            peer.rx_packets,
            peer.tx_packets,
            peer.consumed_at,
            peer.received_at,
        )
        for peer in table.peers.values()
    ]
    sessions = [
        (index, each.counter, each.window.highest, each.window.missing) for index, each in table.sessions.items()
    ]
    return peers, sessions, list(table.handshakes)


def mutant(random: Random, original: bytes, pool: list[bytes]) -> bytes:
    """Something like the original."""
    made = bytearray(original)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kind = random.randrange(9)
        if kind <= 1 and made:
            made[random.randrange(len(made))] ^= 1 << random.randrange(8)
        elif kind == 2 and made:
            made[random.randrange(len(made))] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            del made[random.randrange(len(made) + 1) :]
        elif kind == 4:
            made += random.randbytes(random.choice((1, 4, 15, 16, 32, 1400)))
        elif kind == 5 and made:
            made[0] = random.randrange(6)
        elif kind == 6:
            other = random.choice(pool)
            at = random.randrange(len(other))
            length = random.choice((1, 4, 8, 16, 32))
            made[at : at + length] = other[at : at + length]
        elif kind == 7 and len(made) >= 8:
            made[_INDICES] = random.choice((random.choice(pool)[_INDICES], random.randbytes(4)))
        elif len(made) >= 16:
            # A counter: near, far, beyond the end.
            made[8:16] = random.choice((0, 1, 2, 5, 8192, 1 << 60, 2**64 - 2**13 - 1, 2**64 - 1)).to_bytes(8, "little")
    return bytes(made)


def repaired(made: bytes, public: bytes) -> bytes:
    """With the mac1 that anybody can make who knows whom it is for."""
    at = MAC_OFFSETS[made[0]]
    return made[:at] + primitives.mac(mac1_key(public), made[:at]) + made[at + 16 :]


def _is_original(made: bytes, original: bytes, fixed: bool) -> bool:
    at = MAC_OFFSETS.get(original[0])
    if original[0] == COOKIE:
        return made[:4] == original[:4] and made[8:] == original[8:]
    if at is None or len(made) != len(original):
        return made == original
    if fixed:
        return made[:4] == original[:4] and made[8:at] == original[8:at]
    return made[: at + 16] == original[: at + 16]


def run(count: int, seed: int) -> dict[str, int]:
    """Feed `count` mutants; what they were counted under. Raises AssertionError at the first that did something."""
    random = Random(seed)
    counted: dict[str, int] = dict.fromkeys(REASONS, 0)
    for loaded in (False, True):
        stage = Stage(loaded=loaded)
        before = stage.prints()
        for host in (stage.world.client, stage.world.server):
            host.node._table.counters.update(dict.fromkeys(REASONS, 0))
        for number in range(count // 2):
            host, original = stage.originals[number % len(stage.originals)]
            made = mutant(random, original, stage.pool)
            fixed = bool(made) and made[0] in MAC_OFFSETS and len(made) == SIZES[made[0]] and random.random() < 0.5
            if fixed:
                made = repaired(made, host.node.public_key)
            if made in stage.pool or any(
                _is_original(made, each, fixed) for each in stage.pool if each[:1] == made[:1]
            ):
                continue
            said = f"mutant {number} of seed {seed}, loaded {loaded}: {made.hex()} of {original.hex()}"
            answers = host.receive(made, _ELSEWHERE)
            if answers:
                assert loaded, said
                assert made[0] in MAC_OFFSETS, said
                assert [answer[0] for answer in answers] == [COOKIE], said
                assert len(answers[0]) == COOKIE_SIZE < len(made), said
                stage.world.wire.clear()
            assert not host.received, said
            host.events.clear()
            assert stage.prints() == before, said
            # Under load replies have a rate, which time gives back.
            if loaded and not number % 500:
                stage.world.now += 0.05
        for host in (stage.world.client, stage.world.server):
            for reason, times in host.node.counters.items():
                counted[reason] += times
        stage.finish()
    return counted


def main() -> None:
    """The command line."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else MILLION
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns()
    counted = run(count, seed)
    print(f"{count} mutants of seed {seed}: none crashed, changed anything or was answered where it must not be")
    for reason, times in counted.items():
        if times:
            print(f"{times:9} {reason}")


if __name__ == "__main__":
    main()
