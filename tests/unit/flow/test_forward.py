"""Flows between two devices, packet by packet: raw, vnet and mixed; IPv4 and IPv6; by one worker and by two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.wire import icmp, vnet
from falkirk.wire.build import icmp_packet, unreachable
from falkirk.wire.checksum import partial_field
from falkirk.wire.context import Framing
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse, verify
from falkirk.wire.tcp import maximum_segment_size
from tests.flow_rig import OTHER_TENANT
from tests.forward_rig import (
    BEHIND,
    ESP,
    GRE,
    LAPTOP,
    NAS,
    SCTP,
    SITE,
    TCP,
    UDP,
    Pair,
    between,
    connected,
    datagram,
    echo,
    hop,
    packet,
    reasons,
    tcp,
    who,
)
from tests.unit.wire import samples

FIN, SYN, RST, ACK = 1, 2, 4, 16
R, V = Framing.RAW, Framing.VNET
FRAMINGS = {"raw": (R, R), "vnet": (V, V), "raw-vnet": (R, V), "vnet-raw": (V, R)}
FAMILIES = (4, 6)
OFF = {4: bytes([100, 96, 0, 4]), 6: bytes.fromhex("fd000000000000010000000000000004")}


@pytest.fixture(params=[(w, f) for w in (1, 2) for f in FRAMINGS], ids=lambda p: f"{p[0]}w-{p[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    workers, framing = request.param
    with between(tmp_path, workers, FRAMINGS[framing]) as made:
        yield made


@pytest.fixture(params=[1, 2], ids=["1w", "2w"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Two raw tunnels."""
    with between(tmp_path, request.param) as made:
        yield made


# packets pass as they are, but for a hop


@pytest.mark.parametrize("family", FAMILIES)
def test_any_protocol_passes_and_only_its_reply_comes_back(pair: Pair, family: int) -> None:
    there, back = (LAPTOP[family], NAS[family]), (NAS[family], LAPTOP[family])
    pairs = [
        (tcp(*there, (40000, 80), SYN), tcp(*back, (80, 40000), SYN | ACK, 5000, 1001)),
        (datagram(*there, 40000, 53, b"question"), datagram(*back, 53, 40000, b"answer")),
        (echo(*there, 7), echo(*back, 7, reply=True)),
        (packet(*there, SCTP, bytes(range(32))), packet(*back, SCTP, bytes(range(40)))),
        (packet(*there, GRE, b"\0\0\x08\0" + bytes(24)), packet(*back, GRE, b"\0\0\x08\0" + bytes(28))),
        (packet(*there, ESP, bytes(40), traffic_class=0xBB), packet(*back, ESP, bytes(44), traffic_class=0x2E)),
        (packet(*there, 253, b"x"), packet(*back, 253, b"")),
    ]
    for up, down in pairs:
        for _ in range(3):
            pair.laptop.send(up)
            assert pair.nas.bodies() == [hop(up)]
            pair.nas.send(down)
            assert pair.laptop.bodies() == [hop(down)]
    assert (pair.flows(), pair.drops(), pair.balanced()) == (len(pairs), {}, True)
    started = [record for record in pair.records() if record.event == "started"]
    assert [record.protocol for record in started] == [
        "tcp", "udp", "icmp" if family == 4 else "icmpv6", "sctp", "gre", "esp", "253"
    ]  # fmt: skip
    assert {(record.rule, record.destination_device, record.treatment) for record in started} == {
        ("main/to-nas", "nas", "l3")
    }


def test_packets_of_one_turn_go_in_order_behind_the_record(pair: Pair) -> None:
    packets = [datagram(LAPTOP[4], NAS[4], 40000, 53, bytes([number])) for number in range(5)]
    for each in packets:
        pair.laptop.sock.send(pair.laptop.head + each)
    assert pair.nas.bodies() == [hop(each) for each in packets]
    assert pair.balanced()


@pytest.mark.parametrize("framing", [R, V])
def test_an_answer_that_comes_before_the_question_is_none(tmp_path: Path, framing: Framing) -> None:
    """Both are read in one turn: the first packet still waits for its record."""
    with between(tmp_path, 1, (framing, framing)) as pair:
        question, answer = datagram(LAPTOP[4], NAS[4], 40000, 9), datagram(NAS[4], LAPTOP[4], 9, 40000)
        pair.laptop.sock.send(pair.laptop.head + question)
        pair.nas.sock.send(pair.nas.head + answer)
        assert (pair.nas.bodies(), pair.laptop.bodies()) == ([hop(question)], [])
        assert (pair.drops(), pair.balanced()) == ({"no_flow": 1}, True)


def test_options_and_extension_headers_go_along(pair: Pair) -> None:
    four = bytearray(packet(LAPTOP[4], NAS[4], UDP, datagram(LAPTOP[4], NAS[4], 40000, 53)[20:]))
    with_options = bytearray(four[:20] + b"\x94\x04\0\0" + four[20:])
    with_options[0] = 0x46
    with_options[2:4] = len(with_options).to_bytes(2, "big")
    sent4 = _summed(with_options)
    inner = datagram(LAPTOP[6], NAS[6], 40000, 53)[40:]
    sent6 = packet(LAPTOP[6], NAS[6], 60, bytes([UDP, 0, 1, 4, 0, 0, 0, 0]) + inner)
    for sent in (sent4, sent6):
        for _ in range(2):
            pair.laptop.send(sent)
            assert pair.nas.bodies() == [hop(sent)]
    assert (pair.flows(), pair.drops()) == (2, {})


def _summed(head: bytearray) -> bytes:
    from falkirk.wire.checksum import checksum

    size = (head[0] & 15) << 2
    head[10:12] = b"\0\0"
    head[10:12] = checksum(head[:size]).to_bytes(2, "big")
    return bytes(head)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_super_packet_stays_one_or_becomes_its_segments(pair: Pair, family: int) -> None:
    connected(pair, family)
    there = LAPTOP[family], NAS[family]
    payload = bytes(range(256)) * 20
    whole = bytearray(tcp(*there, (40000, 80), ACK, 1001, 5001) + payload)
    l4 = 20 if family == 4 else 40
    if family == 4:
        whole[2:4] = len(whole).to_bytes(2, "big")
        whole = bytearray(_summed(whole))
    else:
        whole[4:6] = (len(whole) - 40).to_bytes(2, "big")
    whole[l4 + 16 : l4 + 18] = partial_field(*there, TCP, len(whole) - l4).to_bytes(2, "big")
    kind = vnet.GSO_TCPV4 if family == 4 else vnet.GSO_TCPV6
    header = vnet.Header(1, kind, l4 + 20, 1400, l4, 16).pack()
    if pair.laptop.framing is R:
        return
    for _ in range(2):
        pair.laptop.send(bytes(whole), header)
        came = pair.nas.raw()
        if pair.nas.framing is V:
            (data,) = came
            assert data == header + hop(bytes(whole))
            continue
        assert len(came) == 4
        at = 1001
        for data in came:
            segment = parse(data, 0, len(data))
            verify(data, segment)
            assert (segment.sequence, segment.ttl) == (at, 63)
            at += segment.payload_length
        assert b"".join(data[l4 + 20 :] for data in came) == payload
    assert (pair.drops(), pair.balanced()) == ({}, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_checksum_is_completed_where_the_other_tunnel_is_raw(pair: Pair, family: int) -> None:
    if pair.laptop.framing is R:
        return
    l4 = 20 if family == 4 else 40
    sent = bytearray(datagram(LAPTOP[family], NAS[family], 40000, 53, b"question"))
    whole = bytes(sent)
    sent[l4 + 6 : l4 + 8] = partial_field(LAPTOP[family], NAS[family], UDP, len(sent) - l4).to_bytes(2, "big")
    for hint in (l4 + 8, 0):
        pair.laptop.send(bytes(sent), vnet.Header(1, 0, hint, 0, l4, 6).pack())
        (came,) = pair.nas.raw()
        if pair.nas.framing is V:
            assert came == vnet.Header(1, 0, 0, 0, l4, 6).pack() + hop(bytes(sent))
        else:
            assert came == hop(whole)


def test_datagrams_of_one_super_packet_pass(pair: Pair) -> None:
    """Also where a later one has more of them: the same virtio-net header doesn't mean the same number."""
    if pair.laptop.framing is R:
        return
    header = vnet.Header(1, vnet.GSO_UDP_L4, 28, 100, 20, 6).pack()
    for count in (3, 5):
        sent = bytearray(datagram(LAPTOP[4], NAS[4], 40000, 9, bytes(range(100)) * count))
        sent[26:28] = partial_field(LAPTOP[4], NAS[4], UDP, len(sent) - 20).to_bytes(2, "big")
        pair.laptop.send(bytes(sent), header)
        came = pair.nas.raw()
        if pair.nas.framing is V:
            assert came == [header + hop(bytes(sent))]
        else:
            assert [parse(data, 0, len(data)).payload_length for data in came] == [100] * count
            for data in came:
                verify(data, parse(data, 0, len(data)))
    too_many = bytearray(datagram(LAPTOP[4], NAS[4], 40000, 9, bytes(129 * 100)))
    pair.laptop.send(bytes(too_many), header)
    assert (pair.nas.raw(), pair.drops(), pair.balanced()) == ([], {"vnet_gso_size": 1}, True)


# what doesn't pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hop_is_answered(plain: Pair, family: int) -> None:
    first = datagram(LAPTOP[family], NAS[family], 40000, 53)
    plain.laptop.send(first)
    plain.nas.raw()
    plain.laptop.send(datagram(LAPTOP[family], NAS[family], 40000, 53, ttl=1))
    ((answer, _),) = plain.laptop.received()
    assert answer.icmp_type == (icmp.TIME_EXCEEDED4 if family == 4 else icmp.TIME_EXCEEDED6)
    plain.nas.send(datagram(NAS[family], LAPTOP[family], 53, 40000, ttl=1))
    assert plain.laptop.raw() == []
    ((answer, _),) = plain.nas.received()
    assert answer.icmp_type == (icmp.TIME_EXCEEDED4 if family == 4 else icmp.TIME_EXCEEDED6)
    assert plain.balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_side_begins_nothing_of_its_own(plain: Pair, family: int) -> None:
    """Not even by the ports, the identifier or the addresses of a flow that was let through."""
    connected(plain, family)
    there, back = (LAPTOP[family], NAS[family]), (NAS[family], LAPTOP[family])
    for up in (datagram(*there, 40000, 53), echo(*there, 7)):
        plain.laptop.send(up)
    plain.nas.raw()
    denied = [
        tcp(*back, (80, 40001), SYN),
        datagram(*back, 54, 40000),
        datagram(*back, 53, 40001),
        echo(*back, 7),
        packet(*back, ESP, bytes(40)),
    ]
    for down in denied:
        plain.nas.send(down)
    answers = [answer for answer, _ in plain.nas.received()]
    assert plain.laptop.raw() == []
    assert answers[0].flags == RST | ACK
    prohibited = (icmp.UNREACHABLE4, 13) if family == 4 else (icmp.UNREACHABLE6, 1)
    assert [(answer.icmp_type, answer.icmp_code) for answer in answers[1:]] == [prohibited] * 4
    assert reasons(plain, "denied") == ["denied"] * 5
    assert plain.balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denied_port_is_answered_as_policy_does(plain: Pair, family: int) -> None:
    plain.laptop.send(tcp(LAPTOP[family], NAS[family], (40000, 23), SYN))
    ((answer, _),) = plain.laptop.received()
    assert (answer.source, answer.flags) == (NAS[family], RST | ACK)
    (record,) = plain.records()
    assert (record.event, record.rule, record.destination_device) == ("denied", "main/no-telnet", "nas")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_without_a_tunnel_is_unreachable_and_audited(plain: Pair, family: int) -> None:
    plain.laptop.send(tcp(LAPTOP[family], OFF[family], (40000, 80), SYN))
    plain.laptop.send(echo(LAPTOP[family], OFF[family], 7))
    host = (icmp.UNREACHABLE4, 1) if family == 4 else (icmp.UNREACHABLE6, 3)
    assert [(answer.icmp_type, answer.icmp_code) for answer, _ in plain.laptop.received()] == [host, host]
    assert reasons(plain, "denied") == ["device_offline"] * 2
    assert (plain.flows(), plain.passages(), plain.balanced()) == (0, 0, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spoofed_source_is_dropped_on_both_sides(plain: Pair, family: int) -> None:
    connected(plain, family)
    plain.laptop.send(datagram(BEHIND[family], NAS[family], 40000, 53))
    plain.nas.send(tcp(BEHIND[family], LAPTOP[family], (80, 40000), ACK, 5001, 1001))
    plain.nas.send(datagram(BEHIND[family], LAPTOP[family], 53, 40000))
    assert (plain.nas.raw(), plain.laptop.raw()) == ([], [])
    assert plain.drops() == {"spoofed_source": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_another_tenant_s_device_with_the_same_address_is_never_reached(plain: Pair, family: int) -> None:
    theirs = plain.end(0, R, who("nas", [NAS[family]], OTHER_TENANT))
    plain.laptop.send(datagram(LAPTOP[family], NAS[family], 40000, 53))
    assert (len(plain.nas.raw()), theirs.raw()) == (1, [])
    plain.nas.sock.close()
    plain.step()
    plain.step()
    plain.laptop.send(datagram(LAPTOP[family], NAS[family], 40000, 54))
    host = (icmp.UNREACHABLE4, 1) if family == 4 else (icmp.UNREACHABLE6, 3)
    assert [(answer.icmp_type, answer.icmp_code) for answer, _ in plain.laptop.received()] == [host, host]
    assert theirs.raw() == []
    # Nor does it get there itself: its tenant has neither routes nor rules.
    theirs.send(datagram(NAS[family], LAPTOP[family], 53, 40000))
    assert plain.laptop.raw() == []
    theirs.sock.close()


def test_a_device_does_not_reach_itself(plain: Pair) -> None:
    plain.laptop.send(datagram(LAPTOP[4], LAPTOP[4], 40000, 53))
    ((answer, _),) = plain.laptop.received()
    assert (answer.icmp_type, answer.icmp_code) == (icmp.UNREACHABLE4, 13)


# a route to a device


@pytest.mark.parametrize("family", FAMILIES)
def test_a_route_leads_behind_a_device_and_only_the_reply_comes_from_there(pair: Pair, family: int) -> None:
    up = datagram(LAPTOP[family], BEHIND[family], 40000, 53)
    down = datagram(BEHIND[family], LAPTOP[family], 53, 40000, b"answer")
    pair.nas.send(down)
    pair.laptop.send(up)
    assert pair.nas.bodies() == [hop(up)]
    for _ in range(2):
        pair.nas.send(down)
        assert pair.laptop.bodies() == [hop(down)]
    pair.nas.send(datagram(BEHIND[family], LAPTOP[family], 54, 40000))
    assert pair.drops() == {"spoofed_source": 2}
    assert [record.route_id for record in pair.records() if record.event == "started"] == [SITE]


# ICMP errors


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_about_a_flow_pass_both_ways(pair: Pair, family: int) -> None:
    up, down = datagram(LAPTOP[family], NAS[family], 40000, 53), datagram(NAS[family], LAPTOP[family], 53, 40000)
    pair.laptop.send(up)
    (there,) = pair.nas.bodies()
    refused = unreachable(there, parse(there, 0, len(there)), Unreachable.PORT, NAS[family])
    assert refused is not None
    pair.nas.send(refused)
    assert pair.laptop.bodies() == [hop(refused)]
    pair.nas.send(down)
    (here,) = pair.laptop.bodies()
    refused = unreachable(here, parse(here, 0, len(here)), Unreachable.PORT, LAPTOP[family])
    assert refused is not None
    pair.laptop.send(refused)
    assert pair.nas.bodies() == [hop(refused)]
    assert (pair.drops(), pair.balanced()) == ({}, True)


def test_errors_about_nothing_are_dropped(plain: Pair) -> None:
    plain.laptop.send(datagram(LAPTOP[4], NAS[4], 40000, 53))
    plain.nas.raw()
    other = datagram(LAPTOP[4], NAS[4], 40001, 53)
    about_other = unreachable(other, parse(other, 0, len(other)), Unreachable.PORT, NAS[4])
    broken = bytearray(other)
    broken[10] ^= 1
    about_broken = icmp_packet(bytearray(icmp.build(3, 3, 0)) + broken, NAS[4], LAPTOP[4])
    for error in (about_other, about_broken):
        assert error is not None
        plain.nas.send(error)
    assert plain.laptop.raw() == []
    assert plain.drops() == {"icmp_error_unmatched": 1, "bad_icmp_quote": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_behind_a_device_may_say_what_became_of_a_packet(plain: Pair, family: int) -> None:
    up = datagram(LAPTOP[family], BEHIND[family], 40000, 53)
    plain.laptop.send(up)
    (there,) = plain.nas.bodies()
    router = BEHIND[family][:-1] + b"\xfe"
    elsewhere = bytes([10, 8, 0, 1]) if family == 4 else bytes.fromhex("fd080000000000000000000000000001")
    for source, passes in ((BEHIND[family], 1), (router, 1), (elsewhere, 0)):
        error = unreachable(there, parse(there, 0, len(there)), Unreachable.HOST, source)
        assert error is not None
        plain.nas.send(error)
        assert len(plain.laptop.raw()) == passes
    assert plain.drops() == {"spoofed_source": 1}


# sizes


@pytest.fixture(params=[(w, f) for w in (1, 2) for f in FRAMINGS], ids=lambda p: f"{p[0]}w-{p[1]}")
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """The NAS' tunnel takes 1,280 bytes."""
    workers, framing = request.param
    with between(tmp_path, workers, FRAMINGS[framing], mtu=1280) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_too_big_for_the_other_tunnel_is_answered_with_its_mtu(narrow: Pair, family: int) -> None:
    l4 = 20 if family == 4 else 40
    for size in (1280, 1281, 1281):
        narrow.laptop.send(datagram(LAPTOP[family], NAS[family], 40000, 53, bytes(size - l4 - 8)))
    assert len(narrow.nas.raw()) == 1
    for answer, body in narrow.laptop.received():
        assert answer.icmp_type == (icmp.UNREACHABLE4 if family == 4 else icmp.PACKET_TOO_BIG6)
        assert int.from_bytes(body[l4 + 4 : l4 + 8], "big") == 1280
    # The other way there is room.
    narrow.nas.send(datagram(NAS[family], LAPTOP[family], 53, 40000, bytes(1400)))
    assert len(narrow.laptop.raw()) == 1
    assert narrow.balanced()


def test_without_df_it_goes_in_fragments(narrow: Pair) -> None:
    sent = datagram(LAPTOP[4], NAS[4], 40000, 53, bytes(range(256)) * 5, df=False, identification=9)
    narrow.laptop.send(sent)
    came = narrow.nas.received()
    assert len(came) == 2
    assert all(len(body) <= 1280 for _, body in came)
    assert b"".join(body[20:] for _, body in came) == sent[20:]
    assert [each.more_fragments for each, _ in came] == [True, False]
    assert {each.ttl for each, _ in came} == {63}
    assert narrow.balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_came_in_fragments_goes_on_in_fragments(narrow: Pair, family: int) -> None:
    from falkirk.wire import fragments

    sent = datagram(LAPTOP[family], NAS[family], 40000, 53, bytes(range(256)) * 8, df=False)
    for _ in range(2):
        for part in fragments.cut(sent, 1400, 77):
            narrow.laptop.send(part)
        came = narrow.nas.bodies()
        assert len(came) == 2
        assert all(len(body) <= 1280 for body in came)
        size = 20 if family == 4 else 48
        assert b"".join(body[size:] for body in came) == sent[20 if family == 4 else 40 :]
    assert narrow.balanced()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ends_hear_what_the_narrower_tunnel_takes(narrow: Pair, family: int) -> None:
    l4 = 20 if family == 4 else 40
    option = b"\x02\x04\x23\x28"  # 9000

    def syn(here: bytes, there: bytes, ports: tuple[int, int], flags: int) -> bytes:
        body = samples.tcp(here, there, sport=ports[0], dport=ports[1], flags=flags, options=option)
        return packet(here, there, TCP, body)

    narrow.laptop.send(syn(LAPTOP[family], NAS[family], (40000, 80), SYN))
    narrow.nas.send(syn(NAS[family], LAPTOP[family], (80, 40000), SYN | ACK))
    for end in (narrow.nas, narrow.laptop):
        (body,) = end.bodies()
        assert maximum_segment_size(body, l4, 24) == 1280 - l4 - 20
