"""What a flow worker does with neighbours and clients that do it wrong: nothing breaks, nothing is crossed, all is counted."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from falkirk.flow.lane import BUDGET
from falkirk.flow.settings import FlowSettings
from falkirk.flow.slots import LONG_REST, REST
from falkirk.linux import seqpacket
from falkirk.wire import icmp, vnet
from falkirk.wire.build import segment, too_big
from falkirk.wire.context import Framing
from falkirk.wire.handover import (
    PROTOCOL,
    Abort,
    Adopt,
    Adopted,
    AdoptRefused,
    Closed,
    Connected,
    Devices,
    DialFailed,
    Hello,
    Message,
    Prepare,
    TunnelClosed,
    encode,
)
from falkirk.wire.packet import parse
from tests.flow_rig import DEVICE4, PORT, SERVER4, FlowRig, context, read
from tests.unit.flow.test_worker_lift import ACK, FIN, RST, SYN, Client, established
from tests.unit.wire import samples


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FlowRig]:
    rig = FlowRig(tmp_path)
    yield rig
    rig.close()


def descriptors() -> int:
    gc.collect()  # Sockets that other tests left to it.
    return len(list(Path("/proc/self/fd").iterdir()))


def say(rig: FlowRig, sock: socket.socket, messages: list[Message], fds: list[int]) -> None:
    seqpacket.send(sock, encode(messages), fds)
    rig.step()


# slots


@pytest.mark.parametrize(("family", "rest"), [(4, REST), (6, LONG_REST)])
def test_a_slot_whose_path_mtu_was_told_rests_until_the_kernel_has_forgotten_it(
    rig: FlowRig, family: int, rest: int
) -> None:
    client = Client(rig, Framing.RAW, family)
    _, slot = established(client)
    body = samples.tcp(client.server, client.address, sport=80, dport=40000, payload=bytes(1400))
    build = samples.ip4 if family == 4 else samples.ip6
    data = build(6, body, source=client.server, destination=client.address)
    error = too_big(data, parse(data, 0, len(data)), 1280, client.address)
    assert error is not None
    client.sock.send(error)
    (inside,) = client.inside()
    assert inside.icmp_type == (icmp.UNREACHABLE4 if family == 4 else icmp.PACKET_TOO_BIG6)
    client.sock.close()
    rig.step()
    pool, now = rig.worker.lane(Framing.RAW).pool, rig.worker.second
    assert (pool.active, pool.resting) == (0, 1)
    first = slot[-2:]
    for wait, again in ((rest - 1, False), (rest, True)):
        index = pool.claim(now + wait)
        assert index is not None
        assert (index + rig.worker.lane(Framing.RAW).first_slot == int.from_bytes(b"\x80" + first, "big")) is again
    assert rig.balanced()


# the on-ramp


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tunnel": 0}, "INVALID"),
        ({"tunnel": -1}, "INVALID"),
        ({"tunnel": 1 << 32}, "INVALID"),
        ({"mtu": 0}, "INVALID"),
        ({"mtu": 1 << 40}, "INVALID"),
        ({"context": context(tenant="")}, "INVALID"),
        ({"context": context(tenant="acme")}, "INVALID"),
        ({"context": context(tenant="00")}, "INVALID"),
    ],
)
def test_an_adoption_that_cannot_be_is_refused_and_its_descriptor_closed(
    rig: FlowRig, change: dict[str, object], code: str
) -> None:
    message = msgspec.structs.replace(Adopt(1, context(), Framing.RAW, 1500), **change)
    rig.told()
    before = descriptors()
    ours, theirs = seqpacket.pair()
    rig.say_onramp(message, [theirs.fileno()])
    ((refused),) = rig.told()
    assert isinstance(refused, AdoptRefused)
    assert (refused.tunnel, refused.code) == (message.tunnel, code)
    theirs.close()
    assert seqpacket.receive(ours, 1) == (b"", [])
    ours.close()
    assert descriptors() == before
    assert rig.worker.tunnels.devices == {}


@pytest.mark.parametrize("kind", ["file", "pipe", "stream", "udp", "none"])
def test_a_tunnel_that_is_not_a_seqpacket_socket_is_refused(rig: FlowRig, kind: str, tmp_path: Path) -> None:
    rig.told()
    before = descriptors()
    held: list[socket.socket] = []
    fds: list[int] = []
    if kind == "file":
        fds = [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)]
    elif kind == "pipe":
        fds = list(os.pipe())
    elif kind == "stream":
        held = list(socket.socketpair())
    elif kind == "udp":
        held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    rig.say_onramp(Adopt(1, context(), Framing.RAW, 1500), [sock.fileno() for sock in held] or fds)
    (refused,) = rig.told()
    assert isinstance(refused, AdoptRefused)
    assert refused.code == ("NO_DESCRIPTOR" if kind == "none" else "INVALID")
    for fd in fds:
        os.close(fd)
    for sock in held:
        sock.close()
    assert descriptors() == before


def test_the_same_tunnel_said_twice_is_adopted_once(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    assert rig.told()[-1] == Adopted(1)
    ours, theirs = seqpacket.pair()
    rig.say_onramp(Adopt(1, context(), Framing.RAW, 1500), [theirs.fileno()])
    theirs.close()
    assert rig.told() == [Adopted(1)]
    ours.close()
    client.send(SYN)
    assert len(rig.asked()) == 1


@pytest.mark.parametrize("data", [b"\xc1", b"{}", encode([Abort(1)]), b"\x91" * 60])
def test_a_datagram_that_is_not_the_protocol_is_skipped_and_its_descriptors_closed(rig: FlowRig, data: bytes) -> None:
    before = descriptors()
    ours, theirs = seqpacket.pair()
    for sock in (rig.onramp, rig.upgrader):
        assert sock is not None
        seqpacket.send(sock, data, [theirs.fileno()])
        rig.step()
    ours.close()
    theirs.close()
    assert descriptors() == before
    client = Client(rig, Framing.RAW, 4)
    client.send(SYN)
    assert len(rig.asked()) == 1


@pytest.mark.parametrize(
    "first",
    [
        TunnelClosed(1, "forged"),
        Hello("upgrader", 0, 1 << 62),
        Hello("onramp", 0, 1 << 62, protocol=PROTOCOL + 1),
        Hello("onramp", 0, 1),
    ],
)
def test_who_says_no_hello_that_can_be_taken_is_not_listened_to(rig: FlowRig, first: Message) -> None:
    client = Client(rig, Framing.RAW, 4)
    stranger = seqpacket.connect(rig.run_dir / "mesh" / "flow.worker.0.sock")
    seqpacket.send(stranger, encode([first]))
    seqpacket.send(stranger, encode([TunnelClosed(1, "forged")]))
    rig.step()
    assert seqpacket.receive(stranger, 1) == (b"", [])
    stranger.close()
    assert list(rig.worker.tunnels) == [1]
    client.send(SYN)
    assert len(rig.asked()) == 1


def test_descriptors_beside_an_empty_datagram_are_closed(rig: FlowRig) -> None:
    before = descriptors()
    ours, theirs = seqpacket.pair()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, theirs.fileno().to_bytes(4, "little"))]
    rig.onramp.sendmsg([b""], rights)
    rig.step()
    ours.close()
    theirs.close()
    # The worker's end of this connection went too, as for any end.
    assert descriptors() == before - 1
    rig.onramp.close()


# the upgrader


@pytest.mark.parametrize("devices", [Devices(1, 0, 1500), Devices(1, 70000, 1500), Devices(1, PORT, 1500, 5)])
def test_devices_that_cannot_be_are_refused_whole(rig: FlowRig, devices: Devices) -> None:
    client = Client(rig, Framing.VNET, 4)
    assert rig.upgrader is not None
    before = descriptors()
    ours, theirs = seqpacket.pair()
    say(rig, rig.upgrader, [devices], [theirs.fileno()] * 4)
    say(rig, rig.upgrader, [Devices(1, PORT, 1500)], [theirs.fileno()] * 3)
    say(rig, rig.upgrader, [Devices(1, PORT, 1500)], [])
    say(rig, rig.upgrader, [Devices(2, PORT, 1500)], [theirs.fileno()] * 4)
    reader, writer = os.pipe()
    say(rig, rig.upgrader, [Devices(1, PORT, 1500)], [reader, writer] * 2)
    os.close(reader)
    os.close(writer)
    ours.close()
    theirs.close()
    assert descriptors() == before
    established(client)


@pytest.mark.parametrize("framing", list(Framing))
def test_devices_given_twice_take_the_place_of_the_first(rig: FlowRig, framing: Framing) -> None:
    client = Client(rig, framing, 4)
    prepare, _slot = established(client)
    old = rig.tun
    rig.hand_over()
    assert rig.asked()[-1:] != [Abort(prepare.slot)]
    assert rig.worker.flow_count == 0
    assert rig.records()[-1].reason == "upgrader_lost"
    for sock in old.values():
        assert read(sock) == []
        sock.close()
    client.tun = rig.tun[framing]
    client.port += 1
    client.received()
    established(client)
    assert rig.balanced()


def test_connected_twice_or_for_nothing_harms_no_flow(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    prepare, _ = established(client)
    rig.say_upgrader(
        Connected(prepare.slot, 1), Connected(prepare.slot + 1, 1), Connected(-5, 1), Connected(1 << 40, 1)
    )
    rig.say_upgrader(DialFailed(prepare.slot, errno.ECONNREFUSED, 1), DialFailed(1 << 40, -1, 1), Closed(7, "", 0, 0))
    assert rig.asked() == [Abort(prepare.slot + 1), Abort(-5), Abort(1 << 40)]
    assert rig.worker.flow_count == 1


@pytest.mark.parametrize("reason", ["finished", "upstream_reset", "aborted", "never_opened", "client_reset", ""])
def test_closed_before_connected_is_a_refusal(rig: FlowRig, reason: str) -> None:
    client = Client(rig, Framing.VNET, 6)
    client.send(SYN)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(Closed(prepare.slot, reason, 0, 0), Closed(prepare.slot, reason, 0, 0))
    assert [packet.flags for packet in client.received()] == [RST | ACK]
    assert (rig.worker.flow_count, rig.worker.tunnels[1].device.held) == (0, 0)
    assert [record.event for record in rig.records()] == ["started", "ended"]
    assert rig.balanced()


def test_a_device_that_ends_is_let_go(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    established(client)
    rig.tun[Framing.RAW].close()
    rig.step()
    assert rig.worker._epoll.poll(0) == []
    received = rig.count("received")
    rig.step(20)
    assert rig.count("received") == received
    client.send(ACK, 1001, 9001)
    assert rig.drops() == {"tun_write_error": 1}
    assert rig.balanced()


# tunnels


@pytest.mark.parametrize("framing", list(Framing))
def test_an_empty_datagram_is_counted_and_is_not_the_end(rig: FlowRig, framing: Framing) -> None:
    client = Client(rig, framing, 4)
    for _ in range(3):
        client.sock.send(b"")
    client.send(SYN)
    assert rig.drops() == {"empty_datagram": 3}
    assert len(rig.asked()) == 1


def test_what_was_sent_before_the_close_is_read_and_the_close_is_no_packet(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    for port in range(5):
        client.sock.send(segment(DEVICE4, SERVER4, 5000 + port, 80, 1, 0, SYN))
    tunnel = rig.worker.tunnels[1]
    client.sock.close()
    # As it is where the producer closes between epoll's answer and the read.
    assert not rig.worker.lane(Framing.RAW).from_tunnel(tunnel, hung_up=False)
    assert rig.count("received") == 5
    assert rig.drops() == {}


def test_forty_packets_in_one_datagram(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    other = Client(rig, Framing.RAW, 4, port=9)
    syns = [segment(DEVICE4, SERVER4, 5000 + port, 80, 1, 0, SYN) for port in range(40)]
    for _ in range(5):
        client.sock.send(b"".join(syns) + b"padding")
    other.sock.send(segment(DEVICE4, SERVER4, 9, 80, 1, 0, SYN))
    rig.worker.turn(0)
    # Two of them spend the budget of a turn: who shares the worker comes next.
    assert rig.count("received") == 2 * 41 + 1 >= BUDGET
    rig.step()
    assert rig.count("received") == 5 * 41 + 1
    assert rig.drops() == {"syn_held": 160, "bad_version": 5}
    assert len(rig.asked()) == 41


def test_what_a_raw_device_says_in_its_header_is_no_word_of_a_tunnel(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 4)
    _, slot = established(client)
    listener = slot[:-3] + b"\x80\x00\x01"
    packet = segment(listener, slot, PORT, client.port, 9001, 1001, ACK)
    client.tun.send(vnet.Header(vnet.DATA_VALID, 0, 7, 9, 11, 13).pack() + packet)
    rig.step()
    assert len(client.received()) == 1
    client.send(ACK, 1001, 9001)
    (data,) = read(client.tun)
    assert data[:10] == vnet.ZERO


@pytest.mark.parametrize("size", [1, 5, 9, 10, 11, 19, 29, 30, 49])
@pytest.mark.parametrize("framing", list(Framing))
def test_a_short_datagram_is_not_completed_by_the_last_one(rig: FlowRig, framing: Framing, size: int) -> None:
    client = Client(rig, framing, 4)
    established(client)
    data = client.head + segment(client.address, client.server, client.port, 80, 1001, 9001, ACK)
    client.sock.send(data)
    client.sock.send(data[: size if framing is Framing.VNET or size < 40 else 39])
    rig.step()
    assert len(read(client.tun)) == 1
    assert sum(rig.drops().values()) == 1
    assert rig.balanced()


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | RST, SYN | FIN | ACK])
def test_flags_that_no_tcp_sends_change_nothing(rig: FlowRig, flags: int) -> None:
    client = Client(rig, Framing.RAW, 4)
    client.send(flags)
    assert rig.drops() == {"bad_tcp_flags": 1}
    established(client)
    client.send(flags, 1001, 9001)
    assert rig.drops() == {"bad_tcp_flags": 2}
    assert client.inside() == []


def test_a_reset_of_a_held_flow_ends_it(rig: FlowRig) -> None:
    client = Client(rig, Framing.RAW, 6)
    client.send(SYN)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    client.send(RST, 1001)
    assert rig.asked() == [Abort(prepare.slot)]
    assert [record.reason for record in rig.records()] == ["", "client_reset"]
    rig.say_upgrader(Connected(prepare.slot, 1))
    assert client.inside() == []
    assert rig.drops() == {"held": 2}
    assert rig.balanced()


def test_a_syn_with_data_is_held_whole_and_a_super_packet_is_not(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    data = samples.ip4(
        6, samples.tcp(DEVICE4, SERVER4, flags=SYN, payload=b"x" * 100), source=DEVICE4, destination=SERVER4
    )
    client.sock.send(vnet.ZERO + data)
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.say_upgrader(Connected(prepare.slot, 1))
    (syn,) = client.inside()
    assert syn.payload_length == 100
    big = samples.tcp(DEVICE4, SERVER4, sport=4, flags=SYN, payload=bytes(9000), partial=True)
    header = vnet.Header(vnet.NEEDS_CSUM, vnet.GSO_TCPV4, 40, 1448, 20, 16).pack()
    client.sock.send(header + samples.ip4(6, big, source=DEVICE4, destination=SERVER4))
    assert rig.asked() == []
    assert rig.drops() == {"syn_too_large": 1}


def test_a_new_connection_takes_the_place_of_one_that_is_over(rig: FlowRig) -> None:
    client = Client(rig, Framing.VNET, 4)
    prepare, slot = established(client)
    client.send(FIN | ACK, 1001, 9001)
    client.kernel(slot, FIN | ACK, 9001, 1002)
    rig.say_upgrader(Closed(prepare.slot, "finished", 0, 0))
    client.received()
    client.inside()
    client.send(SYN, 5000)
    (again,) = rig.asked()
    assert isinstance(again, Prepare)
    assert again.slot != prepare.slot
    assert [record.event for record in rig.records()] == ["started", "ended", "started"]
    rig.say_upgrader(DialFailed(again.slot, errno.ECONNREFUSED, 1))
    assert rig.balanced()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (vnet.Header(flags=4), "vnet_flags"),
        (vnet.Header(1, 0, 0, 0, 20, 2), "vnet_checksum"),
        (vnet.Header(1, vnet.GSO_TCPV4, 28, 1448, 20, 2), "vnet_checksum"),
        (vnet.Header(0, 3, 28, 1448), "vnet_gso_type"),
    ],
)
def test_a_header_that_lies_about_icmp_is_refused(rig: FlowRig, header: vnet.Header, reason: str) -> None:
    client = Client(rig, Framing.VNET, 4)
    client.sock.send(header.pack() + samples.ip4(1, samples.icmp4(8), source=DEVICE4, destination=SERVER4))
    rig.step()
    assert rig.drops() == {reason: 1}


def test_a_slow_reader_is_queued_for_up_to_a_bound(tmp_path: Path) -> None:
    rig = FlowRig(tmp_path, FlowSettings(tunnel_queue_bytes=20_000))
    client = Client(rig, Framing.RAW, 4)
    _, slot = established(client)
    forwarded = rig.count("forwarded")
    listener = slot[:-3] + b"\x80\x00\x01"
    tcp = samples.tcp(listener, slot, sport=PORT, dport=client.port, sequence=9001, payload=bytes(1000))
    packet = vnet.ZERO + samples.ip4(6, tcp, source=listener, destination=slot)
    sent = 0
    while not rig.drops():
        for _ in range(50):
            client.tun.send(packet)
        sent += 50
        rig.step()
    tunnel = rig.worker.tunnels[1]
    assert 19_000 < tunnel.queued <= 20_000
    assert rig.count("forwarded") - forwarded + rig.drops()["tunnel_full"] == sent
    got = 0
    while tunnel.queued:
        got += len(read(client.sock))
        rig.step()
    got += len(read(client.sock))
    assert got == rig.count("forwarded") - forwarded
    assert rig.worker._epoll.poll(0) == []
    assert rig.balanced()
    rig.close()


def test_a_late_segment_of_the_other_family_is_not_for_the_slots_new_flow(rig: FlowRig) -> None:
    # A socket that the upgrader has closed may go on sending for longer than its slot rests.
    client = Client(rig, Framing.RAW, 4)
    prepare, _ = established(client)
    plan = rig.plan
    listener, slot = plan.address6(0, plan.slot(Framing.RAW, 1)), plan.address6(0, prepare.slot)
    client.tun.send(vnet.ZERO + segment(listener, slot, PORT, client.port, 1, 1, FIN | ACK))
    rig.step()
    assert client.received() == []
    assert rig.drops() == {"no_flow": 1}
