"""The segment size that SYNs offer through a tunnel: neither end may send what the tunnel doesn't take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from falkirk.flow.segments import ACK, SYN
from falkirk.wire import tcp, vnet
from falkirk.wire.context import Framing
from falkirk.wire.handover import Connected, Prepare
from falkirk.wire.packet import parse, verify
from tests.flow_rig import DEVICE4, DEVICE6, PORT, SERVER4, SERVER6, FlowRig, read
from tests.unit.wire import samples

ADDRESSES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
HEADERS = {4: 40, 6: 60}
ODD = b"\x01"
"""Puts the option at an odd place."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


def syn(
    addresses: tuple[bytes, bytes], ports: tuple[int, int], flags: int, size: int, partial: bool, before: bytes = b""
) -> bytes:
    """Behind its virtio-net header, with a partial checksum where asked for."""
    options = before + b"\x02\x04" + size.to_bytes(2, "big")
    options += b"\x01" * (-len(options) % 4)
    body = samples.tcp(*addresses, sport=ports[0], dport=ports[1], flags=flags, options=options, partial=partial)
    four = len(addresses[0]) == 4
    build = samples.ip4 if four else samples.ip6
    packet = build(6, body, source=addresses[0], destination=addresses[1])
    upper = 20 if four else 40
    return (vnet.Header(1, 0, 0, 0, upper, 16).pack() if partial else vnet.ZERO) + packet


def offered(data: bytes) -> int | None:
    """The segment size of a packet behind its virtio-net header, whose checksum is right."""
    packet = parse(data, 10, len(data) - 10)
    upper = 10 + packet.header_length
    whole = bytearray(data)
    if data[0] & 1:
        field = upper + 16
        whole[field : field + 2] = samples.slow_checksum(bytes(whole[upper:])).to_bytes(2, "big")
    verify(whole, packet)
    return tcp.maximum_segment_size(data, upper, data[upper + 12] >> 4 << 2)


@pytest.mark.parametrize(("before", "partial"), [(b"", False), (ODD, False), (ODD, True)])
@pytest.mark.parametrize(("mtu", "told"), [(1500, 1460), (1420, 1400), (1280, 9000), (9000, 8000)])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("framing", list(Framing))
def test_both_ends_hear_what_the_tunnel_takes(
    rig: FlowRig, framing: Framing, version: int, mtu: int, told: int, before: bytes, partial: bool
) -> None:
    addresses = ADDRESSES[version]
    most = mtu - HEADERS[version]
    raw = framing is Framing.RAW
    partial = partial and not raw
    sock = rig.tunnel(framing, mtu=mtu)
    said = syn(addresses, (40000, 80), SYN, told, partial, before)[10 if raw else 0 :]
    sock.send(said)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(Connected(prepare.slot, 1))
    # Again, as a client does that hasn't heard: it must not say more the second time.
    sock.send(said)
    rig.step()
    first, second = read(rig.tun[framing])
    assert offered(first) == offered(second) == min(told, most)
    inside = parse(first, 10, len(first) - 10)
    sizes = []
    # The second one comes when the client's last word was lost.
    for _ in range(2):
        rig.tun[framing].send(syn((inside.destination, inside.source), (PORT, 40000), SYN | ACK, told, partial, before))
        rig.step()
        (answer,) = read(sock)
        sizes.append(offered((vnet.ZERO if raw else b"") + answer))
        sock.send((b"" if raw else vnet.ZERO) + _ack(addresses))
        rig.step()
    assert sizes == [min(told, most)] * 2
    assert rig.drops() == {}


def _ack(addresses: tuple[bytes, bytes]) -> bytes:
    body = samples.tcp(*addresses, sport=40000, dport=80, flags=ACK)
    build = samples.ip4 if len(addresses[0]) == 4 else samples.ip6
    return build(6, body, source=addresses[0], destination=addresses[1])


@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_that_offers_nothing_is_left_alone(rig: FlowRig, version: int) -> None:
    addresses = ADDRESSES[version]
    sock = rig.tunnel(mtu=1280)
    body = samples.tcp(*addresses, sport=40000, dport=80, flags=SYN)
    build = samples.ip4 if version == 4 else samples.ip6
    sock.send(build(6, body, source=addresses[0], destination=addresses[1]))
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(Connected(prepare.slot, 1))
    (inside,) = read(rig.tun[Framing.RAW])
    assert offered(inside) is None
