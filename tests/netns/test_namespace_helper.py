"""The namespace helper: what it makes works, outlives it, and can be taken over."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from falkirk.linux import namespace_messages as messages
from falkirk.linux import seqpacket, sockets, tun
from falkirk.wire.context import Framing
from falkirk.wire.slots import SlotPlan

pytestmark = pytest.mark.netns
DEADLINE_S = 10
AS_USER = [sys.executable, str(Path(__file__).with_name("ordinary_user.py"))]
HEADER = bytes(tun.VNET_HEADER_SIZE)


class Helper:
    """A helper process and the parent's end of its pair."""

    def __init__(
        self, settings: messages.HelperSettings, join: list[int] | None = None, wrapper: list[str] | None = None
    ) -> None:
        self.control, theirs = seqpacket.pair()
        command, descriptors = messages.command(theirs.fileno(), settings, join)
        self.process = subprocess.Popen([*(wrapper or []), *command], pass_fds=descriptors)
        theirs.close()
        self.descriptors: list[list[int]] = []
        self.said: list[messages.FromHelper] = []
        while not self.said or not isinstance(self.said[-1], messages.Ready | messages.Failed):
            self.said.append(self.hear())

    def hear(self) -> messages.FromHelper:
        wait_readable(self.control)
        received = seqpacket.receive(self.control, messages.MAX_DATAGRAM)
        assert received
        message: messages.FromHelper = messages.FROM_HELPER.decode(received[0])
        assert len(received[1]) == getattr(message, "descriptors", 0)
        self.descriptors.append(received[1])
        return message

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.control.close()

    def close(self) -> None:
        self.control.close()
        self.process.wait(DEADLINE_S)
        for descriptors in self.descriptors:
            for descriptor in descriptors:
                os.close(descriptor)


def wait_readable(what: socket.socket | int) -> None:
    assert select.select([what], [], [], DEADLINE_S)[0], "nothing came in time"


def packet(data: bytes) -> Packet:
    return IP(data) if data[0] >> 4 == 4 else IPv6(data)


def read_tcp(device: int) -> Packet:
    wait_readable(device)
    return packet(os.read(device, tun.MAX_READ)[len(HEADER) :])


def open_stream(helper: Helper, worker: int, framing: Framing, family: int) -> tuple[socket.socket, str, Packet]:
    """Shake hands from slot 16 over the worker's device; the accepted socket, the slot's address, the last packet."""
    plan = SlotPlan(3)
    at = next(
        index
        for index, message in enumerate(helper.said)
        if isinstance(message, messages.WorkerDevices) and message.worker == worker
    )
    described = helper.said[at]
    assert isinstance(described, messages.WorkerDevices)
    device = helper.descriptors[at][0 if framing is Framing.VNET else 1]
    address = plan.address4 if family == socket.AF_INET else plan.address6
    slot, own = (socket.inet_ntop(family, address(worker, plan.slot(framing, index))) for index in (16, 1))
    network = IP(src=slot, dst=own) if family == socket.AF_INET else IPv6(src=slot, dst=own)
    syn = network / TCP(sport=4321, dport=described.port, flags="S", seq=100, options=[("MSS", 1460)])
    os.write(device, HEADER + bytes(syn))
    answer = read_tcp(device)
    assert answer[TCP].flags == "SA"
    assert dict(answer[TCP].options)["MSS"] == described.vnet_mtu - (40 if family == socket.AF_INET else 60)
    ack = network / TCP(sport=4321, dport=described.port, flags="A", seq=101, ack=answer[TCP].seq + 1)
    os.write(device, HEADER + bytes(ack))
    listener = helper.descriptors[at][2 if family == socket.AF_INET else 3]
    wait_readable(listener)
    accepted, peer = socket.socket(fileno=os.dup(listener)).accept()
    assert peer[:2] == (slot, 4321)
    return accepted, slot, ack


@pytest.fixture
def helper() -> Iterator[Helper]:
    helper = Helper(messages.HelperSettings(workers=3))
    yield helper
    helper.close()


def test_says_all_that_it_made(helper: Helper) -> None:
    made, *workers, ready = helper.said
    assert isinstance(made, messages.Made)
    assert made.took["net.ipv4.tcp_no_metrics_save"] == "1"
    assert made.took["net.ipv4.tcp_mtu_probing"] == "1"
    assert os.fstat(helper.descriptors[0][0]).st_ino == made.user_namespace
    assert os.fstat(helper.descriptors[0][1]).st_ino == made.network_namespace
    assert isinstance(ready, messages.Ready)
    assert [
        (worker.worker, worker.vnet_device, worker.raw_device, worker.port)
        for worker in workers
        if isinstance(worker, messages.WorkerDevices)
    ] == [(0, "lift0v", "lift0r", 1024), (1, "lift1v", "lift1r", 1025), (2, "lift2v", "lift2r", 1026)]


def test_gives_non_blocking_descriptors_that_no_child_inherits(helper: Helper) -> None:
    for descriptors in helper.descriptors[1:-1]:
        assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
        assert not any(os.get_blocking(descriptor) for descriptor in descriptors)


@pytest.mark.parametrize("worker", [0, 2])
@pytest.mark.parametrize("framing", list(Framing))
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_slot_opens_a_stream(helper: Helper, worker: int, framing: Framing, family: int) -> None:
    accepted, _, _ = open_stream(helper, worker, framing, family)
    with accepted:
        made = helper.said[0]
        assert isinstance(made, messages.Made)
        assert sockets.congestion(accepted) == made.congestion


def test_vnet_device_gives_super_packets_and_raw_device_plain_ones(helper: Helper) -> None:
    for framing in Framing:
        accepted, _, _ = open_stream(helper, 0, framing, socket.AF_INET)
        with accepted:
            accepted.send(bytes(1460 * 4))
            data = read_tcp(helper.descriptors[1][0 if framing is Framing.VNET else 1])
            # How many segments a super-packet has is the kernel's choice (TSO autosizing).
            assert (len(data[TCP].payload) > 1460) is (framing is Framing.VNET)


def test_raw_device_takes_super_packets(helper: Helper) -> None:
    accepted, _, ack = open_stream(helper, 0, Framing.RAW, socket.AF_INET)
    with accepted:
        data = bytes(ack / Raw(b"x" * 4000))
        # NEEDS_CSUM and TCPv4; the checksum field holds the pseudo-header's sum, which the kernel doesn't check here.
        header = (1).to_bytes(1, "little") + (1).to_bytes(1, "little")
        header += b"".join(number.to_bytes(2, "little") for number in (40, 1460, 20, 16))
        os.write(helper.descriptors[1][1], header + data)
        wait_readable(accepted)
        assert accepted.recv(8000) == b"x" * 4000


def test_devices_are_silent_of_themselves(helper: Helper) -> None:
    """No router solicitations, no multicast reports: what flow reads there is flows."""
    seqpacket.send(helper.control, messages.encode(messages.Inspect(request=7)))
    inspected = helper.hear()
    assert isinstance(inspected, messages.Inspected)
    assert inspected.request == 7
    assert sorted(inspected.devices) == [f"lift{worker}{kind}" for worker in range(3) for kind in "rv"]
    assert all(counters.sent_packets == 0 for counters in inspected.devices.values())


def test_streams_outlive_a_killed_helper_and_another_takes_over(helper: Helper) -> None:
    accepted, slot, ack = open_stream(helper, 1, Framing.VNET, socket.AF_INET)
    helper.kill()
    os.write(helper.descriptors[2][0], HEADER + bytes(ack / Raw(b"still here")))
    wait_readable(accepted)
    assert accepted.recv(100) == b"still here"
    accepted.close()

    replacement = Helper(messages.HelperSettings(workers=3), join=helper.descriptors[0])
    made, joined = helper.said[0], replacement.said[0]
    assert isinstance(made, messages.Made)
    assert joined == messages.Joined(network_namespace=made.network_namespace)
    seqpacket.send(replacement.control, messages.encode(messages.Inspect(request=1)))
    inspected = replacement.hear()
    assert isinstance(inspected, messages.Inspected)
    assert inspected.devices["lift1v"].received_packets > 0
    assert slot.startswith("10.")
    replacement.close()


def test_exits_when_its_parent_does(helper: Helper) -> None:
    helper.control.close()
    assert helper.process.wait(DEADLINE_S) == 0


def test_works_for_an_ordinary_user() -> None:
    helper = Helper(messages.HelperSettings(workers=3), wrapper=AS_USER)
    accepted, _, _ = open_stream(helper, 0, Framing.VNET, socket.AF_INET6)
    accepted.close()
    helper.close()


def test_says_how_to_mend_a_tun_device_that_may_not_be_opened() -> None:
    helper = Helper(messages.HelperSettings(), wrapper=[*AS_USER, "--no-tun"])
    failed = helper.said[-1]
    assert isinstance(failed, messages.Failed)
    assert failed.code == "tun_unavailable"
    assert "chmod 0666 /dev/net/tun" in failed.remedy
    assert helper.process.wait(DEADLINE_S) == 1
    helper.close()
