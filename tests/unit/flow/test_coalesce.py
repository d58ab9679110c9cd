"""Segments joined and taken apart again, against the packets that came; what joins, and what never may."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falkirk.flow.coalesce import MAX_PACKET, Coalescer, Run, claimed
from falkirk.flow.table import State, TcpLift
from falkirk.wire import ipv6, vnet
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.datagram import Heads
from falkirk.wire.packet import parse, verify
from falkirk.wire.protocol import TCP, UDP
from falkirk.wire.segment import segments
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128
TIMESTAMPS = bytes.fromhex("0101080a0000000100000002")
ENDS = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}


def packet(
    payload: bytes = b"",
    *,
    version: int = 4,
    port: int = 40000,
    sequence: int = 1000,
    acknowledgment: int = 7,
    flags: int = ACK,
    window: int = 500,
    options: bytes = b"",
    ident: int = 0,
    df: bool = True,
    ttl: int = 64,
    tos: int = 0,
    ends: tuple[bytes, bytes] | None = None,
    to: int = 443,
) -> bytes:
    """A TCP segment with right checksums."""
    source, destination = ends or ENDS[version]
    tcp = bytearray(
        port.to_bytes(2, "big")
        + to.to_bytes(2, "big")
        + (sequence & 0xFFFFFFFF).to_bytes(4, "big")
        + acknowledgment.to_bytes(4, "big")
        + bytes([(5 + len(options) // 4) << 4, flags])
        + window.to_bytes(2, "big")
        + bytes(4)
        + options
        + payload
    )
    tcp[16:18] = checksum(tcp, pseudo_header(source, destination, TCP, len(tcp))).to_bytes(2, "big")
    if version == 6:
        return ipv6.build(source, destination, TCP, len(tcp), hop_limit=ttl, traffic_class=tos) + bytes(tcp)
    head = bytearray([0x45, tos, *(20 + len(tcp)).to_bytes(2, "big"), *(ident & 0xFFFF).to_bytes(2, "big")])
    head += bytes([0x40 if df else 0, 0, ttl, TCP, 0, 0]) + source + destination
    head[10:12] = checksum(head).to_bytes(2, "big")
    return bytes(head + tcp)


def flow_of(version: int, port: int = 40000) -> TcpLift:
    """An established flow, whose slot is its own address: rewriting changes nothing."""
    key = b"".join(ENDS[version]) + port.to_bytes(2, "big") + (443).to_bytes(2, "big")
    flow = TcpLift(cast(Any, None), cast(Any, None), key, key, 0, cast(Any, None))
    flow.state = State.ESTABLISHED
    return flow


class Seen:
    """A road that keeps what it is given: ("plain" | "joined" | "datagrams" | "other" | "bad", packets). It takes UDP packets, `takes` at a time."""

    def __init__(self, flows: list[TcpLift], *, enabled: bool = True, size: int = 1 << 18, takes: int = 0) -> None:
        self.takes = takes
        self.arena = bytearray(size)
        self.flows = {flow.key: flow for flow in flows}
        self.coalescer = Coalescer(self.arena, self, enabled=enabled)
        self.got: list[tuple[str, list[bytes]]] = []
        self.counted = 0

    def _at(self, at: int, size: int) -> bytes:
        return bytes(self.arena[at : at + size])

    def plain(self, flow: TcpLift, at: int, size: int, ip_checksum: int, checksum: int) -> None:
        data = self._at(at, size)
        upper = 20 if len(flow.key) == 12 else 40
        assert ip_checksum == (int.from_bytes(data[10:12], "big") if upper == 20 else 0)
        assert checksum == int.from_bytes(data[upper + 16 : upper + 18], "big")
        self.got.append(("plain", [data]))

    def joined(self, run: Run) -> None:
        headers = run.headers(self.arena, run.flow.forward)
        sizes = [run.size] * (len(run.places) - 1) + [run.last]
        whole = headers + b"".join(
            self._at(at + run.header, size - run.header) for at, size in zip(run.places, sizes, strict=True)
        )
        body = whole[vnet.SIZE :]
        head = vnet.unpack(whole, 0, len(whole))
        assert vnet.validate(head, parse(body, 0, len(body)), MAX_PACKET)._replace(hdr_len=head.hdr_len) == head
        assert head.hdr_len == run.header
        assert len(body) == run.length <= MAX_PACKET
        self.got.append(("joined", [bytes(one) for one in segments(head, body, 0, len(body))]))

    def datagrams(self, at: int, end: int) -> tuple[int, int]:
        taken: list[bytes] = []
        while len(taken) < self.takes and (size := claimed(self.arena, at, end - at)) >= 48:
            if self.arena[at + (9 if self.arena[at] >> 4 == 4 else 6)] != UDP:
                break
            taken.append(self._at(at, size))
            at += size
        if taken:
            self.got.append(("datagrams", taken))
        return at, len(taken)

    def other(self, at: int, size: int) -> None:
        self.got.append(("other", [self._at(at, size)]))

    def bad(self, at: int, size: int) -> None:
        self.got.append(("bad", [self._at(at, size)]))

    def drain(self, *datagrams: bytes) -> list[tuple[str, list[bytes]]]:
        """What becomes of datagrams that came in one drain."""
        at = 0
        for data in datagrams:
            self.arena[at : at + len(data)] = data
            self.counted += self.coalescer.walk(self.flows, at, at + len(data))
            at += len(data)
        self.coalescer.flush()
        return self.got


def stream(
    count: int, size: int = 1400, *, version: int = 4, last: int | None = None, first: int = 1000, **more: Any
) -> list[bytes]:
    """Consecutive segments, from sequence number `first` on."""
    sizes = [size] * (count - 1) + [size if last is None else last]
    return [
        packet(bytes([65 + i % 26]) * n, version=version, sequence=first + i * size, ident=i, **more)
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1400, 1401, 1402, 1403, 536])
@pytest.mark.parametrize("packed", [True, False])
def test_a_burst_becomes_one_super_packet(version: int, size: int, packed: bool) -> None:
    seen = Seen([flow_of(version)])
    packets = stream(20, size, version=version, last=3, options=TIMESTAMPS)
    assert seen.drain(*([b"".join(packets)] if packed else packets)) == [("joined", packets)]
    assert seen.counted == 20


CHANGES: dict[str, dict[str, Any]] = {
    "acknowledgment": {"acknowledgment": 8},
    "window": {"window": 501},
    "options": {"options": TIMESTAMPS[:-1] + b"\x03"},
    "TTL": {"ttl": 63},
    "TOS (ECN CE)": {"tos": 3},
    "identification": {"ident": 77},
    "a hole": {"sequence": 5000},
    "no DF": {"df": False},
    "ECE": {"flags": ACK | ECE},
    "CWR": {"flags": ACK | CWR},
    "URG": {"flags": ACK | URG},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_not_joined(change: str) -> None:
    """As the kernel's GRO: one header says what is so for all."""
    odd: dict[str, Any] = {"sequence": 1000 + 3 * 1400, "ident": 3, "options": TIMESTAMPS, **CHANGES[change]}
    first = stream(3, options=TIMESTAMPS)
    after = [
        packet(b"z" * 1400, **{**odd, "sequence": odd["sequence"] + (i + 1) * 1400, "ident": odd["ident"] + i + 1})
        for i in range(2)
    ]
    different = packet(b"z" * 1400, **odd)
    got = Seen([flow_of(4)]).drain(b"".join([*first, different, *after]))
    assert got[0] == ("joined", first)
    assert [one for _, packets in got for one in packets] == [*first, different, *after]


def test_push_ends_a_run_and_keeps_its_place() -> None:
    packets = stream(3)
    packets.append(packet(b"p" * 1400, sequence=1000 + 3 * 1400, ident=3, flags=ACK | PSH))
    more = [packet(b"q" * 1400, sequence=1000 + i * 1400, ident=i) for i in (4, 5, 6)]
    assert Seen([flow_of(4)]).drain(*packets, *more) == [("joined", packets), ("joined", more)]


def test_a_shorter_segment_is_the_last() -> None:
    first = stream(4, last=100)
    more = [packet(b"q" * 1400, sequence=1000 + 3 * 1400 + 100 + i * 1400, ident=4 + i) for i in range(3)]
    assert Seen([flow_of(4)]).drain(*first, *more) == [("joined", first), ("joined", more)]


def test_a_longer_segment_begins_anew() -> None:
    first = stream(3, 1000)
    longer = [packet(b"q" * 1400, sequence=4000 + i * 1400, ident=3 + i) for i in range(3)]
    assert Seen([flow_of(4)]).drain(*first, *longer) == [("joined", first), ("joined", longer)]


def test_identifications_may_stand_still_where_df_is_set() -> None:
    """RFC 6864 4.1: of atomic datagrams they mean nothing."""
    still = [packet(b"s" * 1400, sequence=1000 + i * 1400, ident=9) for i in range(5)]
    ((kind, packets),) = Seen([flow_of(4)]).drain(*still)
    assert kind == "joined"
    assert [one[6:10] + one[12:] for one in packets] == [one[6:10] + one[12:] for one in still]
    fragmentable = [packet(b"s" * 1400, sequence=1000 + i * 1400, ident=9, df=False) for i in range(5)]
    assert [kind for kind, _ in Seen([flow_of(4)]).drain(*fragmentable)] == ["plain"] * 5


def test_nothing_grows_beyond_what_a_length_can_say() -> None:
    packets = stream(60, 1460)
    got = Seen([flow_of(4)]).drain(*packets)
    assert [len(some) for _, some in got] == [44, 16]
    assert [one for _, some in got for one in some] == packets


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1400, 1401, 1403])
@pytest.mark.parametrize("at", [0, 5, 8, 9])
def test_a_bad_checksum_is_dropped_and_the_others_go_on(version: int, size: int, at: int) -> None:
    packets = stream(10, size, version=version, last=500)
    damaged = bytearray(packets[at])
    damaged[-1] ^= 1
    packets[at] = bytes(damaged)
    got = Seen([flow_of(version)]).drain(b"".join(packets))
    assert [kind for kind, _ in got] == ["bad" if i == at else "plain" for i in range(10)]
    assert [one for _, some in got for one in some] == packets


def test_errors_that_cancel_out_between_segments_are_found() -> None:
    packets = [bytearray(one) for one in stream(10)]
    packets[3][-2:] = (int.from_bytes(packets[3][-2:], "big") + 1).to_bytes(2, "big")
    packets[6][-2:] = (int.from_bytes(packets[6][-2:], "big") - 1).to_bytes(2, "big")
    got = Seen([flow_of(4)]).drain(b"".join(packets))
    assert [i for i, (kind, _) in enumerate(got) if kind == "bad"] == [3, 6]


def test_too_few_to_be_worth_it_go_by_themselves() -> None:
    packets = stream(2)
    assert Seen([flow_of(4)]).drain(*packets) == [("plain", [one]) for one in packets]


def test_small_segments_go_by_themselves() -> None:
    packets = stream(5, 535)
    assert Seen([flow_of(4)]).drain(*packets) == [("plain", [one]) for one in packets]


def test_switched_off_each_goes_by_itself_at_once() -> None:
    packets = stream(5)
    assert Seen([flow_of(4)], enabled=False).drain(*packets) == [("plain", [one]) for one in packets]


def test_interleaved_flows_are_joined_apart() -> None:
    one, two = stream(8), stream(8, port=40001)
    mixed = [segment for pair in zip(one, two, strict=True) for segment in pair]
    got = Seen([flow_of(4), flow_of(4, 40001)]).drain(b"".join(mixed))
    assert got == [("joined", one), ("joined", two)]


@pytest.mark.parametrize("flags", [FIN | ACK, RST, SYN, SYN | ACK, RST | ACK])
def test_what_opens_or_closes_goes_the_slow_way_after_what_came_before(flags: int) -> None:
    packets = stream(4)
    end = packet(sequence=1000 + 4 * 1400, flags=flags, ident=4)
    assert Seen([flow_of(4)]).drain(*packets, end) == [("joined", packets), ("other", [end])]


def test_fragments_options_and_expired_packets_wait_for_what_came_before() -> None:
    packets = stream(4)
    fragment = bytearray(packet(b"x" * 64, sequence=1000 + 4 * 1400, ident=4))
    fragment[6] = 0x20
    options = b"\x46" + packet(b"x" * 64)[1:]
    dying = packet(b"x" * 64, ttl=1)
    for odd in (bytes(fragment), options, dying):
        assert Seen([flow_of(4)]).drain(*packets, odd) == [("joined", packets), ("other", [odd])]


def test_other_protocols_overtake_no_one_and_hold_no_one_up() -> None:
    packets = stream(6)
    udp = bytearray(packet(b"x" * 64))
    udp[9] = 17
    got = Seen([flow_of(4)]).drain(b"".join([*packets[:3], bytes(udp), *packets[3:]]))
    assert got == [("other", [bytes(udp)]), ("joined", packets)]


def udp(version: int, port: int = 53) -> bytes:
    """A UDP packet of 64 bytes and more."""
    heads = Heads(*ENDS[version], 40000, port)
    made = bytearray(heads.size) + b"x" * 40
    heads.put(made, 0, 40, 64, 0)
    return bytes(made)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("takes", [0, 1, 2, 9])
def test_datagrams_are_given_on_with_those_behind_them(version: int, takes: int) -> None:
    packets, some = stream(6, version=version), [udp(version)] * 5
    seen = Seen([flow_of(version)], takes=takes)
    got = seen.drain(b"".join([*packets[:3], *some, *packets[3:]]))
    assert seen.counted == 11
    assert [one for kind, many in got for one in many if kind in ("datagrams", "other")] == some
    assert {kind for kind, _ in got} == {"datagrams" if takes else "other", "joined"}
    assert got[-1] == ("joined", packets)


def test_a_flow_that_is_not_established_or_not_known_goes_the_slow_way() -> None:
    opening = flow_of(4)
    opening.state = State.OPENING
    packets = stream(3)
    assert Seen([opening]).drain(*packets) == [("other", [one]) for one in packets]
    assert Seen([]).drain(*packets) == [("other", [one]) for one in packets]


@pytest.mark.parametrize(
    "rest",
    [
        b"\x45",
        b"\x45" * 30,
        b"\x60" * 12,
        b"\x00\x01\x02",
        b"{}",
        b"\x45\0\0\0" + bytes(40),
        b"\x45\0\xff\xff" + bytes(60),
    ],
    ids=repr,
)
def test_a_rest_that_does_not_say_where_it_ends_is_one_packet(rest: bytes) -> None:
    packets = stream(3)
    seen = Seen([flow_of(4)])
    assert seen.drain(b"".join(packets) + rest) == [("joined", packets), ("other", [rest])]
    assert seen.counted == 4


@st.composite
def drains(draw: st.DrawFn) -> list[bytes]:
    """Datagrams with packets of a few flows, most of them in order, some odd, some broken."""
    next_sequence: dict[tuple[int, int], int] = {}
    packets: list[bytes] = []
    for _ in range(draw(st.integers(1, 40))):
        version, port = draw(st.sampled_from([(4, 40000), (4, 40001), (6, 40000)]))
        sequence = next_sequence.get((version, port), 0xFFFFF000)
        size = draw(st.sampled_from([600, 600, 600, 601, 64, 0]))
        burst = draw(st.integers(1, 6))
        odd = draw(st.sampled_from([{}, {}, {}, {"flags": ACK | PSH}, {"window": 9}, {"flags": FIN | ACK}, {"ttl": 1}]))
        for place in range(burst):
            last: dict[str, Any] = odd if place == burst - 1 else {}
            made = packet(
                bytes([place]) * size, version=version, port=port, sequence=sequence, ident=len(packets), **last
            )
            if draw(st.integers(0, 30)) == 0:
                made = made[:-1] + bytes([made[-1] ^ 0x10])
            packets.append(made)
            sequence += size
        next_sequence[version, port] = sequence
    datagrams = []
    while packets:
        cut = draw(st.integers(1, len(packets)))
        datagrams.append(b"".join(packets[:cut]))
        del packets[:cut]
    return datagrams


@given(drains())
def test_every_packet_arrives_once_in_its_flows_order(datagrams: list[bytes]) -> None:
    seen = Seen([flow_of(4), flow_of(4, 40001), flow_of(6)])
    got = [(kind, one) for kind, some in seen.drain(*datagrams) for one in some]
    sent: list[bytes] = []
    for data in datagrams:
        at = 0
        while at < len(data):
            size = (
                int.from_bytes(data[at + 2 : at + 4], "big")
                if data[at] >> 4 == 4
                else 40 + data[at + 4] * 256 + data[at + 5]
            )
            sent.append(data[at : at + size])
            at += size
    assert seen.counted == len(sent) == len(got)

    def flow(data: bytes) -> bytes:
        return data[12:24] if data[0] >> 4 == 4 else data[8:44]

    for key in seen.flows:
        assert [one for _, one in got if flow(one) == key] == [one for one in sent if flow(one) == key]
    for kind, one in got:
        if kind == "joined":
            verify(one, parse(one, 0, len(one)))
