"""Fragments that wait: what they become, what is refused, and that nothing grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.flow.reassembly import (
    FRAGMENTS,
    PACKET_COST,
    PIECE_COST,
    SHARE,
    Expired,
    Limits,
    Reassembly,
    Taken,
    Whole,
)
from falkirk.wire.fragments import Piece, cut, piece
from falkirk.wire.packet import parse
from tests.unit.wire import samples
from tests.unit.wire.samples import C4, C6, S4, S6

ROOMY = Limits(worker_bytes=1 << 24, tunnel_bytes=1 << 20, tunnel_packets=256, seconds=15)
NO_HEADER = 253
"""RFC 3692: for experiments."""
WAITS = Taken(None, "", ())


def read(packet: bytes) -> Piece:
    return piece(packet, parse(packet, 0, len(packet), fragments=True))


def fragment(start: int, stop: int, *, more: bool = True, number: int = 7, fill: int | None = None) -> Piece:
    """Bytes [start, stop) of a packet whose content says where it is; `fill` overwrites it all."""
    data = bytes((at >> 3) & 0xFF for at in range(start, stop)) if fill is None else bytes([fill]) * (stop - start)
    word = start >> 3 | (0x2000 if more else 0)
    return read(samples.ip4(NO_HEADER, data, fragment=word, identification=number))


def dropped(reason: str, count: int = 1) -> Taken:
    """This one, and `count` less one that waited."""
    return Taken(None, reason, ((reason, count - 1),) if count > 1 else ())


def lost(taken: Taken) -> Counter[str]:
    """Fragments by the reason for which they are dropped."""
    counts = Counter([taken.refused] if taken.refused else [])
    for reason, count in taken.dropped:
        counts[reason] += count
    return counts


def settle(table: Reassembly, pieces: Sequence[Piece], tunnel: int = 1, now: int = 0) -> list[Taken]:
    return [table.take(tunnel, each, now) for each in pieces]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("version", [4, 6])
def test_whole_in_any_order(version: int, order: tuple[int, ...]) -> None:
    if version == 4:
        packet = samples.ip4(17, samples.udp(C4, S4, bytes(range(200))), fragment=0)
    else:
        packet = samples.ip6(17, samples.udp(C6, S6, bytes(range(200))))
    pieces = [read(part) for part in cut(packet, 148, 7)]
    assert len(pieces) == 3 if version == 6 else len(pieces) == 2
    pieces = [pieces[at] for at in order if at < len(pieces)]
    table = Reassembly(ROOMY)
    *before, last = settle(table, pieces)
    assert before == [WAITS] * len(before)
    assert last == Taken(Whole(packet, len(pieces), max(len(each.packet) for each in pieces)), "", ())
    assert (table.bytes, table.waiting) == (0, 0)


OVERLAPS = {
    "the same place, shorter": (fragment(0, 24), fragment(0, 16)),
    "the same place, longer": (fragment(0, 24), fragment(0, 32)),
    "the same place, other bytes": (fragment(0, 24), fragment(0, 24, fill=0xEE)),
    "the same place and bytes, but the last": (fragment(24, 48), fragment(24, 48, more=False)),
    "teardrop: inside the one before": (fragment(0, 40), fragment(24, 32, more=False)),
    "the end of the one before": (fragment(0, 40), fragment(32, 48)),
    "the start of the next": (fragment(40, 48), fragment(24, 48)),
    "around the next": (fragment(40, 48), fragment(24, 64)),
    "one byte of the next": (fragment(40, 48, more=False), fragment(24, 48)),
}
PAST_THE_END = {
    "more behind the last": (fragment(24, 30, more=False), fragment(32, 40)),
    "a second last behind the last": (fragment(24, 30, more=False), fragment(32, 40, more=False)),
    "a last before one that there is": (fragment(40, 48), fragment(24, 32, more=False)),
    "a second last before the last": (fragment(40, 48, more=False), fragment(24, 32, more=False)),
}


@pytest.mark.parametrize(
    ("pair", "reason"),
    [(pair, "fragment_overlap") for pair in OVERLAPS.values()]
    + [(pair, "fragment_past_end") for pair in PAST_THE_END.values()],
    ids=[*OVERLAPS, *PAST_THE_END],
)
def test_fragments_that_contradict_each_other_take_the_packet_with_them(pair: tuple[Piece, Piece], reason: str) -> None:
    table = Reassembly(ROOMY)
    first, second = pair
    assert settle(table, [first, second]) == [WAITS, dropped(reason, 2)]
    # RFC 5722 4: those not yet received, too.
    rest = [fragment(at, at + 8) for at in (0, 8, 48)]
    assert settle(table, rest) == [dropped(reason)] * 3
    assert (table.waiting, table.bytes) == (0, PACKET_COST)
    # Another identification isn't meant.
    assert table.take(1, fragment(0, 8, number=8), 0) == WAITS
    # Time forgets, and nobody is told.
    assert table.expire(15) == [Expired(1, fragment(0, 8, number=8).packet, 1)]
    assert table.bytes == 0


def test_an_exact_duplicate_is_absorbed() -> None:
    table = Reassembly(ROOMY)
    first, second, last = fragment(0, 24), fragment(24, 48), fragment(48, 50, more=False)
    taken = settle(table, [second, second, first, second, first, last])
    assert taken[:5] == [WAITS, *[dropped("fragment_duplicate")], WAITS, *[dropped("fragment_duplicate")] * 2]
    assert taken[5].whole is not None
    assert taken[5].whole.fragments == 3
    # What comes after that waits for a packet that never will be.
    assert table.take(1, second, 0) == WAITS


def test_the_same_name_in_another_tunnel_is_another_packet() -> None:
    table = Reassembly(ROOMY)
    assert table.take(1, fragment(0, 24), 0) == WAITS
    assert table.take(2, fragment(24, 30, more=False), 0) == WAITS
    assert table.take(1, fragment(24, 32, more=False), 0).whole is not None
    assert table.take(2, fragment(0, 24), 0).whole is not None


def test_congestion_that_cannot_be_told_drops_all() -> None:
    def marked(each: Piece, mark: int) -> Piece:
        return each._replace(packet=each.packet[:1] + bytes([mark]) + each.packet[2:])

    table = Reassembly(ROOMY)
    table.take(1, marked(fragment(0, 24), 3), 0)
    assert table.take(1, marked(fragment(24, 30, more=False), 0), 0) == dropped("fragment_ecn", 2)
    assert table.bytes == 0


def test_a_packet_has_so_many_fragments_and_no_more() -> None:
    table = Reassembly(ROOMY)
    assert settle(table, [fragment(at, at + 8) for at in range(0, 8 * FRAGMENTS, 8)]) == [WAITS] * FRAGMENTS
    assert table.take(1, fragment(8 * FRAGMENTS, 8 * FRAGMENTS + 8), 0) == dropped("fragment_too_many", FRAGMENTS + 1)
    assert table.take(1, fragment(8 * FRAGMENTS, 8 * FRAGMENTS + 8, more=False), 0) == dropped("fragment_too_many")


def test_the_longest_packet_at_the_smallest_mtu_has_few_enough() -> None:
    packet = samples.ip4(17, samples.udp(C4, S4, bytes(65507)), fragment=0)
    assert len(packet) == 65535
    pieces = [read(part) for part in cut(packet, 576)]
    assert len(pieces) <= FRAGMENTS
    whole = settle(Reassembly(ROOMY), pieces)[-1].whole
    assert whole is not None
    assert whole.packet == packet


def test_the_time_runs_from_the_first_that_came_and_one_is_told() -> None:
    table = Reassembly(ROOMY)
    first, second = fragment(0, 24), fragment(24, 48)
    table.take(1, second, 100)
    table.take(1, first, 114)
    table.take(1, fragment(48, 56, number=8), 114)
    assert table.expire(114) == []
    assert table.expire(115) == [Expired(1, first.packet, 2)]
    # Nobody hears of one whose first fragment never came.
    assert table.expire(129) == [Expired(1, None, 1)]
    assert (table.bytes, table.waiting) == (0, 0)


def test_a_tunnel_that_ends_takes_its_fragments_along() -> None:
    table = Reassembly(ROOMY)
    settle(table, [fragment(0, 8), fragment(8, 16), fragment(0, 8, number=8)])
    table.take(2, fragment(0, 8), 0)
    assert table.close(1) == 3
    assert table.close(1) == 0
    assert table.waiting == 1
    assert table.expire(15) == [Expired(2, fragment(0, 8).packet, 1)]
    assert table.bytes == 0


def test_a_tunnel_at_its_number_of_packets_loses_its_own_oldest() -> None:
    table = Reassembly(Limits(1 << 24, 1 << 20, 3, 15))
    table.take(2, fragment(0, 8), 0)
    for number in (1, 2, 3):
        table.take(1, fragment(0, 8, number=number), 0)
    table.take(1, fragment(8, 16, number=1), 0)
    assert table.take(1, fragment(0, 8, number=4), 0) == Taken(None, "", (("fragment_packets", 2),))
    # 2 is the oldest now; it is still whole when its rest comes.
    assert table.take(1, fragment(8, 10, number=2, more=False), 0).whole is not None
    assert table.take(2, fragment(8, 10, more=False), 0).whole is not None


def test_a_tunnel_at_its_bytes_loses_its_own_oldest_but_not_the_packet_at_hand() -> None:
    each = PACKET_COST + PIECE_COST + 20 + 1000
    table = Reassembly(Limits(1 << 24, 3 * each, 256, 15))
    for number in (1, 2, 3):
        assert table.take(1, fragment(0, 1000, number=number), 0) == WAITS
    assert table.bytes == 3 * each
    assert table.take(1, fragment(1000, 2000, number=1), 0) == Taken(None, "", (("fragment_memory", 1),))
    assert table.take(1, fragment(1000, 1010, number=3, more=False), 0).whole is not None
    # One that alone is too much is given up, and so is what follows of it.
    table = Reassembly(Limits(1 << 24, 3 * each, 256, 15))
    taken = settle(table, [fragment(at, at + 1000) for at in range(0, 10000, 1000)])
    assert sum(map(lost, taken), Counter()) == {"fragment_memory": 10}
    assert table.bytes == PACKET_COST


def test_greedy_tunnels_leave_room_for_one_more() -> None:
    limits = Limits(1 << 20, 1 << 20, 256, 15)
    table = Reassembly(limits)
    for tunnel in range(20):
        for number in range(100):
            table.take(tunnel, fragment(0, 1400, number=number), 0)
            assert table.bytes <= limits.worker_bytes
    # Each took a share of what was left, none all of it.
    left = limits.worker_bytes - table.bytes
    assert left > limits.worker_bytes * (SHARE / (SHARE + 1)) ** 20
    assert settle(table, [fragment(0, 1000), fragment(1000, 1010, more=False)], tunnel=99)[-1].whole is not None


def test_a_worker_without_room_drops_what_comes() -> None:
    table = Reassembly(Limits(SHARE * PACKET_COST - 1, 1 << 20, 256, 15))
    assert table.take(1, fragment(0, 8), 0) == dropped("fragment_memory")
    assert (table.bytes, table.expire(100), table.close(1)) == (0, [], 0)


def test_a_flood_of_first_fragments_stays_within_its_bounds() -> None:
    table = Reassembly(Limits(1 << 20, 1 << 16, 64, 15))
    gone = 0
    for number in range(20_000):
        taken = table.take(number % 3, fragment(0, 8, number=number & 0xFFFF), number // 1000)
        gone += lost(taken).total()
        gone += sum(each.fragments for each in table.expire(number // 1000))
        assert table.bytes <= 3 << 16
        assert table.waiting <= 3 * 64
    assert gone + table.waiting == 20_000


VERSIONS = st.sampled_from((4, 6))


@given(
    version=VERSIONS,
    size=st.integers(0, 6000),
    mtu=st.integers(160, 1500),
    data=st.data(),
)
def test_split_shuffled_and_doubled_it_is_the_same_packet(
    version: int, size: int, mtu: int, data: st.DataObject
) -> None:
    packet, pieces = _split(version, size, mtu)
    order = data.draw(st.permutations([*range(len(pieces)), *data.draw(st.lists(st.integers(0, len(pieces) - 1)))]))
    table = Reassembly(ROOMY)
    seen: set[int] = set()
    wholes = 0
    for at in order:
        taken = table.take(1, pieces[at], 0)
        if at in seen and len(seen) < len(pieces):
            assert taken == dropped("fragment_duplicate")
        seen.add(at)
        if taken.whole is not None:
            wholes += 1
            assert taken.whole.packet == packet
            assert taken.whole.fragments == len(pieces)
        if len(seen) == len(pieces):
            break
    assert wholes == 1
    assert table.bytes == 0


@given(version=VERSIONS, size=st.integers(400, 3000), mtus=st.tuples(*[st.integers(160, 900)] * 2), data=st.data())
def test_two_ways_to_cut_it_mixed_are_that_packet_or_none(
    version: int, size: int, mtus: tuple[int, int], data: st.DataObject
) -> None:
    packet, pieces = _split(version, size, max(mtus))
    others = [read(part) for part in cut(packet, min(mtus), 7)]
    table = Reassembly(ROOMY)
    for each in data.draw(st.permutations([*pieces, *others])):
        taken = table.take(1, each, 0)
        assert taken.whole is None or taken.whole.packet == packet


@given(data=st.data())
def test_a_packet_is_what_nobody_has_contradicted(data: st.DataObject) -> None:
    """Fragments of anybody, against a model that compares each with each."""
    table = Reassembly(ROOMY)
    arrived: list[Piece] = []
    refused = False
    ended = Counter[str]()
    pieces = data.draw(st.lists(PIECES, min_size=1, max_size=30))
    for each in pieces:
        taken = table.take(1, each, 0)
        ended += lost(taken)
        if refused:
            assert taken.whole is None
            continue
        if each in arrived:
            assert taken == dropped("fragment_duplicate")
            continue
        arrived.append(each)
        if any(_contradict(each, other) for other in arrived[:-1]):
            assert taken.whole is None
            assert lost(taken).total() == len(arrived)
            refused = True
            continue
        total = next((one.end for one in arrived if not one.more), None)
        if total is None or sum(one.end - one.offset for one in arrived) < total:
            assert taken == WAITS
            continue
        assert taken.whole is not None
        body = b"".join(one.data for one in sorted(arrived, key=lambda one: one.offset))
        assert taken.whole.packet == samples.ip4(NO_HEADER, body, fragment=0)
        ended["whole"] += taken.whole.fragments
        arrived = []
    assert sum(ended.values()) + table.waiting == len(pieces)
    assert sum(each.fragments for each in table.expire(15)) == sum(not refused for _ in arrived)
    assert (table.bytes, table.waiting) == (0, 0)


PIECES = st.builds(
    lambda start, units, more, fill: fragment(8 * start, 8 * (start + units), more=more, fill=fill),
    st.integers(0, 4),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from((1, 1, 1, 2)),
)


def _contradict(one: Piece, other: Piece) -> bool:
    if one.offset < other.end and other.offset < one.end:
        return True
    return (not one.more and other.end > one.end) or (not other.more and one.end > other.end)


def _split(version: int, size: int, mtu: int) -> tuple[bytes, list[Piece]]:
    """A packet, and at least two fragments of it."""
    content = bytes(at % 200 for at in range(max(size, mtu)))
    packet = samples.ip4(NO_HEADER, content, fragment=0) if version == 4 else samples.ip6(NO_HEADER, content)
    return packet, [read(part) for part in cut(packet, mtu, 7)]
