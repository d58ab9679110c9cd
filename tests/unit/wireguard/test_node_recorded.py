"""What Debian's wireguard-go (0.0.20220316) said to our node and took from it, recorded once and played again: a vector of the whole protocol.

The keys are SHA-256 of "side 1" (wireguard-go, which began) and "side 2"; our randomness was `randomness("golden")`. wireguard-go took the response, for it sent
the echo request that is inside its first data message.
"""

from __future__ import annotations

import hashlib

from falkirk.wireguard import primitives
from falkirk.wireguard.node import Node
from falkirk.wireguard.outcome import Arrivals
from tests.unit.wireguard.pair import CLIENT, WALL, randomness

INITIATION = bytes.fromhex(
    "010000004175b55d4fca1ce7b790a3b8b438f812dafe05feea787a4c485566f5380109bbfc86f437a288ac852772be5e49ba63f1d21a9a27df7a6c3e"
    "e4ea8e161c91db0d41235ab3f95d03cb428c5700871c6881110584b6bccb53b5cae4b36cb727b1a9dd5f97eeb379ac3b238dd11d693ac80fcf97d237"
    "6adeb6b8b13c0895b2c0d3f700000000000000000000000000000000"
)
RESPONSE = bytes.fromhex(
    "020000001ca9dc1c4175b55d554a691029f84ace9a361fd07ce200f6d5f235d23449082a728067ee8a444632a062f2821633a30b58b480f827c2fc93"
    "f04159b15cd9512910365dd7ea3355c900000000000000000000000000000000"
)
DATA = bytes.fromhex(
    "040000001ca9dc1c0000000000000000b96782b32f28d546fe24f5e01f0deba15d0f3176054a1aff57527d83f19053ffddc32bc92f326c7ab5586556"
    "204d5914357e47087419b644ecc1ac3b5a90847cb5fda371fccf73f9648015e6415899c4eba272d1d53888fff4fa69a6449e54094b0a89435a9737b5"
    "5eb3340617057dde"
)
PACKET = bytes.fromhex(
    "45000054554440004001d0c80a4d00010a4d0002080088df4a1b00011522086b000000000577020000000000ffffffffffffffffffffffffffffffff"
    "ffffffffffffffffffffffffffffffffffffffffffffffff"
)


def test_a_recorded_conversation() -> None:
    one, other = (hashlib.sha256(f"side {number}".encode()).digest() for number in (1, 2))
    node = Node(other, rng=randomness("golden"))
    peer = node.add_peer(primitives.public_key(one), allowed=[(bytes((10, 77, 0, 1)), 32)])
    arrivals = Arrivals()
    node.receive(INITIATION, CLIENT, 1000.0, WALL, arrivals)
    assert arrivals.datagrams == [(CLIENT, RESPONSE)]
    arrivals.clear()
    node.receive(DATA, CLIENT, 1000.0, WALL, arrivals)
    assert arrivals.packets == {peer: [PACKET]}
    assert [event.kind for event in arrivals.events] == ["handshake"]
    assert not any(node.counters.values())
