"""Client sockets of a lowering namespace: each connects to its slot, out of its worker's device, and outlives the helper."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from falkirk.linux import namespace_messages as messages
from falkirk.linux import seqpacket, tun
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan
from tests.netns.test_namespace_helper import AS_USER, DEADLINE_S, HEADER, Helper, read_tcp, wait_readable

pytestmark = pytest.mark.netns
SETTINGS = messages.HelperSettings(purpose=messages.Purpose.LOWER, workers=3)
PLAN = SlotPlan(3)


def serve(helper: Helper, worker: int) -> socket.socket:
    """The worker's end of a pair over which the helper answers."""
    ours, theirs = seqpacket.pair()
    with theirs:
        seqpacket.send(helper.control, messages.encode(messages.Serve(worker)), [theirs.fileno()])
    return ours


def ask(pair: socket.socket, slot: int, version: int = 4, source_port: int = 40000, port: int = 443) -> None:
    assert seqpacket.send(pair, messages.encode(messages.Connect(7 * slot, slot, version, source_port, port)))


def answer(pair: socket.socket) -> tuple[messages.ToWorker, socket.socket | None]:
    wait_readable(pair)
    received = seqpacket.receive(pair, messages.MAX_DATAGRAM)
    assert received
    message: messages.ToWorker = messages.TO_WORKER.decode(received[0])
    assert len(received[1]) == getattr(message, "descriptors", 0)
    return message, socket.socket(fileno=received[1][0]) if received[1] else None


def connecting(pair: socket.socket, slot: int, version: int = 4, **ports: int) -> socket.socket:
    ask(pair, slot, version, **ports)
    message, sock = answer(pair)
    assert message == messages.Connecting(7 * slot)
    assert sock is not None
    return sock


def respond(device: int, syn: Packet, flags: str, acknowledge: int = 1) -> None:
    """A segment against the SYN's direction, into the device."""
    network = IP if syn.version == 4 else IPv6
    head = network(src=syn.dst, dst=syn.src)
    ports = {"sport": syn[TCP].dport, "dport": syn[TCP].sport}
    os.write(device, HEADER + bytes(head / TCP(**ports, flags=flags, seq=900, ack=syn[TCP].seq + acknowledge)))


def outcome(sock: socket.socket) -> int:
    assert select.select([], [sock], [], DEADLINE_S)[1], "its handshake didn't end"
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@pytest.fixture
def helper() -> Iterator[Helper]:
    helper = Helper(SETTINGS)
    yield helper
    helper.close()


def test_has_devices_and_no_listeners(helper: Helper) -> None:
    assert [
        (worker.vnet_device, worker.raw_device, worker.port, worker.descriptors)
        for worker in helper.said
        if isinstance(worker, messages.WorkerDevices)
    ] == [(f"lower{worker}v", f"lower{worker}r", 0, 2) for worker in range(3)]


@pytest.mark.parametrize("worker", [0, 2])
@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_to_the_slot_from_the_devices_own_address(
    helper: Helper, worker: int, framing: Framing, version: int
) -> None:
    with serve(helper, worker) as pair, connecting(pair, PLAN.slot(framing, 77), version) as sock:
        device = helper.descriptors[1 + worker][framing is Framing.RAW]
        syn = read_tcp(device)
        address = PLAN.address4 if version == 4 else PLAN.address6
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        own, slot = (socket.inet_ntop(family, address(worker, PLAN.slot(framing, index))) for index in (1, 77))
        assert (syn.src, syn.dst, syn[TCP].sport, syn[TCP].dport) == (own, slot, 40000, 443)
        assert syn[TCP].flags == "S"
        respond(device, syn, "SA")
        assert outcome(sock) == 0
        assert sock.getpeername()[:2] == (slot, 443)
        assert not os.get_blocking(sock.fileno())


def test_a_reset_is_a_refusal(helper: Helper) -> None:
    with serve(helper, 0) as pair, connecting(pair, 16) as sock:
        respond(helper.descriptors[1][0], read_tcp(helper.descriptors[1][0]), "RA")
        assert outcome(sock) == errno.ECONNREFUSED


def test_streams_of_one_port_go_to_different_slots(helper: Helper) -> None:
    device = helper.descriptors[1][0]
    with serve(helper, 0) as pair:
        socks = [connecting(pair, slot, port=22) for slot in range(16, 48)]
        syns = [read_tcp(device) for _ in socks]
        assert [syn[TCP].sport for syn in syns] == [40000] * 32
        assert len({syn.dst for syn in syns}) == 32
        for sock in socks:
            sock.close()


def test_ports_are_never_replaced(helper: Helper) -> None:
    """The NAT is computed before the socket is there, from the ports that were asked for."""
    with serve(helper, 0) as pair, connecting(pair, 16):
        ask(pair, 16)
        assert answer(pair) == (messages.NotConnecting(7 * 16, errno.EADDRNOTAVAIL), None)
        ask(pair, 17, source_port=0)
        assert answer(pair) == (messages.NotConnecting(7 * 17, errno.EINVAL), None)


@pytest.mark.parametrize(
    ("slot", "port", "code"),
    [(16, 70000, errno.EINVAL), (16, -1, errno.EINVAL), (1 << 40, 22, errno.EINVAL), (1 << 26, 22, errno.ENETUNREACH)],
)
def test_what_can_not_be_is_refused_with_a_reason(helper: Helper, slot: int, port: int, code: int) -> None:
    with serve(helper, 0) as pair:
        ask(pair, slot, port=port)
        assert answer(pair) == (messages.NotConnecting(7 * slot, code), None)
        connecting(pair, 16).close()


def test_a_worker_that_talks_nonsense_loses_its_pair_and_no_other(helper: Helper) -> None:
    with serve(helper, 0) as bad, serve(helper, 1) as good:
        bad.send(b"?")
        wait_readable(bad)
        assert seqpacket.receive(bad, 10) == (b"", [])
        connecting(good, 16).close()


def test_a_worker_that_does_not_read_keeps_no_other_waiting(helper: Helper) -> None:
    with serve(helper, 0) as slow, serve(helper, 1) as good:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        asked = 0
        while asked < 2000:
            try:
                ask(slow, 16 + asked, port=1)
            except AssertionError:
                break
            asked += 1
        connecting(good, 16).close()
        for _ in range(asked):
            _, sock = answer(slow)
            assert sock is not None
            sock.close()


def test_sockets_outlive_a_killed_helper_and_another_takes_over(helper: Helper) -> None:
    with serve(helper, 0) as pair, connecting(pair, 16) as sock:
        helper.kill()
        wait_readable(pair)
        assert seqpacket.receive(pair, 10) == (b"", [])
        device = helper.descriptors[1][0]
        respond(device, read_tcp(device), "SA")
        assert outcome(sock) == 0
        replacement = Helper(SETTINGS, join=helper.descriptors[0])
        with serve(replacement, 0) as again, connecting(again, 17):
            assert {read_tcp(device).dst for _ in range(2)} >= {"10.0.0.17"}
        replacement.close()


def test_closing_resets(helper: Helper) -> None:
    device = helper.descriptors[1][0]
    with serve(helper, 0) as pair, connecting(pair, 16) as sock:
        syn = read_tcp(device)
        respond(device, syn, "SA")
        assert outcome(sock) == 0
    flags = [str(read_tcp(device)[TCP].flags) for _ in range(2)]
    assert flags == ["A", "RA"]


def test_works_for_an_ordinary_user() -> None:
    helper = Helper(SETTINGS, wrapper=AS_USER)
    with serve(helper, 0) as pair, connecting(pair, 16, 6, source_port=22) as sock:
        assert sock.getsockname()[1] == 22
        assert os.read(helper.descriptors[1][0], tun.MAX_READ)
    helper.close()
