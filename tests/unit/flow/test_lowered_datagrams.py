"""UDP between two devices under treatment l4: lifted to its payload and lowered again, both ways, by one worker and by two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.wire import vnet
from falkirk.wire.build import unreachable
from falkirk.wire.checksum import partial_field
from falkirk.wire.icmp import Unreachable
from falkirk.wire.packet import parse
from tests.forward_rig import LAPTOP, NAS, UDP, Pair, between, datagram, hop, packet, reasons
from tests.lower_rig import FAMILIES, FRAMINGS, POLICIES, V
from tests.unit.wire import samples


@pytest.fixture(params=[(w, f) for w in (1, 2) for f in FRAMINGS], ids=lambda p: f"{p[0]}w-{p[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    workers, framing = request.param
    with between(tmp_path, workers, FRAMINGS[framing], policies=POLICIES) as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_pass_one_hop_later(pair: Pair, family: int) -> None:
    up = datagram(LAPTOP[family], NAS[family], 40000, 53, b"question")
    down = datagram(NAS[family], LAPTOP[family], 53, 40000, b"answer")
    for _ in range(3):
        pair.laptop.send(up)
        assert pair.nas.bodies() == [hop(up)]
        pair.nas.send(down)
        assert pair.laptop.bodies() == [hop(down)]
    assert (pair.flows(), pair.drops(), pair.balanced()) == (1, {}, True)
    (started,) = pair.records()
    assert (started.treatment, started.protocol, started.destination_device) == ("l4", "udp", "nas")


def test_options_and_what_is_behind_a_datagram_stay_here(pair: Pair) -> None:
    for number, odd in enumerate(
        (
            samples.ip4(17, samples.udp(LAPTOP[4], NAS[4], b"abc"), source=LAPTOP[4], destination=NAS[4], options=b"\x94\x04\0\0"),
            packet(LAPTOP[4], NAS[4], UDP, samples.udp(LAPTOP[4], NAS[4], b"abc") + b"behind"),
        )
    ):  # fmt: skip
        pair.laptop.send(odd)
        (body,) = pair.nas.bodies()
        assert (len(body), body[-3:]) == (31, b"abc"), number
    assert pair.balanced()


def test_a_datagram_that_is_damaged_goes_no_further(pair: Pair) -> None:
    good = datagram(LAPTOP[4], NAS[4], 40000, 53, b"question")
    pair.laptop.send(good)
    pair.nas.bodies()
    pair.laptop.send(good[:-1] + b"!")
    back = datagram(NAS[4], LAPTOP[4], 53, 40000, b"answer")
    pair.nas.send(back[:-1] + b"!")
    assert (pair.nas.bodies(), pair.laptop.bodies()) == ([], [])
    assert pair.drops() == {"bad_l4_checksum": 2}
    assert pair.balanced()


def test_a_super_packet_of_datagrams(tmp_path: Path) -> None:
    for workers in (1, 2):
        with between(tmp_path / str(workers), workers, (V, V), policies=POLICIES) as made:
            body = bytearray(datagram(LAPTOP[4], NAS[4], 40000, 4433, bytes(3000)))
            body[26:28] = partial_field(LAPTOP[4], NAS[4], UDP, len(body) - 20).to_bytes(2, "big")
            header = vnet.Header(1, vnet.GSO_UDP_L4, 28, 1200, 20, 6).pack()
            for _ in range(2):
                made.laptop.send(bytes(body), header)
                (data,) = made.nas.raw()
                assert vnet.unpack(data, 0, len(data)).gso_size == 1200
                assert len(data) == 10 + len(body)
                assert parse(data, 10, len(body)).ttl == 63
            assert made.drops() == {}


def test_a_closed_port_says_so(pair: Pair) -> None:
    up = datagram(LAPTOP[4], NAS[4], 40000, 53, b"question")
    pair.laptop.send(up)
    (body,) = pair.nas.bodies()
    error = unreachable(body, parse(body, 0, len(body)), Unreachable.PORT, NAS[4])
    assert error is not None
    pair.nas.send(error)
    ((answer, _),) = pair.laptop.received()
    assert (answer.icmp_type, answer.icmp_code, answer.source) == (3, 3, NAS[4])


def test_a_device_without_a_tunnel(pair: Pair) -> None:
    pair.laptop.send(datagram(LAPTOP[4], bytes([100, 96, 0, 4]), 40000, 53, b"?"))
    ((answer, _),) = pair.laptop.received()
    assert (answer.icmp_type, answer.icmp_code) == (3, 1)
    assert reasons(pair, "denied") == ["device_offline"]
