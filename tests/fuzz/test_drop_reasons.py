"""Every drop reason, reached by the simplest thing that a neighbour can do; the packet is counted once, under that reason."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from falkirk.decide.routes import RouteEntry
from falkirk.flow import control
from falkirk.flow.counters import DROP_REASONS
from falkirk.flow.settings import FlowSettings
from falkirk.linux import seqpacket
from falkirk.wire import vnet
from falkirk.wire.context import Framing
from falkirk.wire.handover import Connected, OpenSocket, Prepare, SocketFailed
from falkirk.wire.trunk import NUMBER
from tests import forward_rig, lower_rig
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, FlowRig, context
from tests.unit.wire import samples

SYN, RST, FIN = 2, 4, 1
MULTICAST4 = bytes([224, 0, 0, 1])


def tcp4(**fields: Any) -> bytes:
    head: dict[str, Any] = {
        key: fields.pop(key) for key in ("options4", "fragment", "total", "header_length", "ttl") if key in fields
    }
    if "options4" in head:
        head["options"] = head.pop("options4")
    source, destination = fields.pop("source", DEVICE4), fields.pop("destination", SERVER4)
    return samples.ip4(6, samples.tcp(source, destination, **fields), source=source, destination=destination, **head)


def tcp6(extensions: bytes = b"", first: int | None = None, **fields: Any) -> bytes:
    body = samples.tcp(DEVICE6, SERVER6, **fields)
    return samples.ip6(6, body, source=DEVICE6, destination=SERVER6, extensions=extensions, first=first)


def icmp4(kind: int, payload: bytes = b"ping") -> bytes:
    return samples.ip4(1, samples.icmp4(kind, payload=payload), source=DEVICE4, destination=SERVER4)


def piece4(offset: int, data: bytes, *, more: bool = True, ecn: int = 0, number: int = 7) -> bytes:
    """A fragment of protocol 253, which has no header of its own."""
    word = offset >> 3 | (0x2000 if more else 0)
    packet = bytearray(samples.ip4(253, data, source=DEVICE4, fragment=word, identification=number))
    packet[1] |= ecn
    packet[10:12] = b"\0\0"
    packet[10:12] = samples.slow_checksum(bytes(packet[:20])).to_bytes(2, "big")
    return bytes(packet)


def broken(packet: bytes, at: int) -> bytes:
    return packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]


QUOTE = samples.ip4(6, samples.tcp(SERVER4, DEVICE4), source=SERVER4, destination=DEVICE4)
UDP = samples.ip4(17, samples.udp(DEVICE4, SERVER4), source=DEVICE4, destination=SERVER4)
RAW: dict[str, bytes] = {
    "too_short": b"\x45" + bytes(18),
    "bad_version": b"\x55" + bytes(60),
    "bad_header_length": tcp4(header_length=16),
    "bad_total_length": tcp4(total=9000),
    "bad_ip_checksum": broken(tcp4(), 10),
    "bad_ip_options": tcp4(options4=b"\x07\xff\0\0"),
    "source_route": tcp4(options4=b"\x83\x03\x04\0"),
    "bad_extension_header": tcp6(b"\x06\xff" + bytes(6), 60),
    "fragment_tiny": samples.ip4(6, bytes(8), source=DEVICE4, fragment=1),
    "fragment_length": piece4(0, bytes(9)),
    "fragment_too_long": piece4(65512, bytes(8), more=False),
    "truncated_l4": samples.ip4(6, bytes(19), source=DEVICE4),
    "bad_tcp_offset": samples.ip4(6, bytes(20), source=DEVICE4),
    "bad_udp_length": samples.ip4(17, samples.udp(DEVICE4, SERVER4, length=7), source=DEVICE4),
    "bad_l4_checksum": broken(tcp4(flags=SYN), 36),
    "icmp_not_error": icmp4(5, QUOTE),
    "bad_icmp_quote": icmp4(3, QUOTE[:20]),
    "empty_datagram": b"",
    "second_context": b'{"v":1,"tenant":"other","device":"laptop"}',
    "spoofed_source": tcp4(source=bytes([100, 96, 9, 9]), flags=SYN),
    "bad_tcp_flags": tcp4(flags=SYN | FIN),
    "syn_too_large": tcp4(flags=SYN, payload=bytes(1500)),
    "icmp_not_carried": icmp4(13),
    "protocol_not_built": samples.ip4(47, bytes(20), source=DEVICE4, destination=MULTICAST4),
    "icmp_error_unmatched": icmp4(3, QUOTE),
    "icmp_mtu": samples.ip4(1, samples.icmp4(3, 4, 67, QUOTE), source=DEVICE4, destination=SERVER4),
    "reset_of_nothing": tcp4(flags=RST),
    "unanswerable": tcp4(destination=MULTICAST4, flags=SYN),
}
PARTIAL = (vnet.NEEDS_CSUM, vnet.GSO_TCPV4, 40, 1448, 20, 16)
VNET: dict[str, bytes] = {
    "vnet_too_short": vnet.ZERO,
    "vnet_flags": struct.pack("=BBHHHH", 8, *PARTIAL[1:]) + tcp4(partial=True),
    "vnet_gso_type": struct.pack("=BBHHHH", 1, vnet.GSO_TCPV6, *PARTIAL[2:]) + tcp4(partial=True),
    "vnet_gso_size": struct.pack("=BBHHHH", 1, vnet.GSO_TCPV4, 40, 535, 20, 16) + tcp4(partial=True),
    "vnet_checksum": struct.pack("=BBHHHH", 1, vnet.GSO_TCPV4, 40, 1448, 22, 16) + tcp4(partial=True),
}
FRAGMENTS: dict[str, tuple[FlowSettings, list[bytes], int]] = {
    "fragment_ecn": (FlowSettings(), [piece4(0, bytes(8), ecn=3), piece4(8, bytes(8), more=False)], 2),
    "fragment_overlap": (FlowSettings(), [piece4(0, bytes(16)), piece4(8, bytes(8))], 2),
    "fragment_past_end": (FlowSettings(), [piece4(8, bytes(8), more=False), piece4(16, bytes(8))], 2),
    "fragment_duplicate": (FlowSettings(), [piece4(0, bytes(8))] * 2, 1),
    "fragment_too_many": (FlowSettings(), [piece4(8 * at, bytes(8)) for at in range(129)], 129),
    "fragment_memory": (FlowSettings(fragment_tunnel_bytes=2000), [piece4(8 * at, bytes(800)) for at in (0, 100)], 2),
    "fragment_packets": (FlowSettings(fragment_tunnel_packets=1), [piece4(0, bytes(8), number=n) for n in (1, 2)], 1),
    "fragment": (FlowSettings(fragment_bytes=0), [piece4(0, bytes(8))], 1),
}
"""With these settings these packets: so many of them are dropped for this reason, and the others wait."""
WITH_SETTINGS: dict[str, tuple[FlowSettings, bytes]] = {
    "slots_exhausted": (FlowSettings(slots=1), tcp4(flags=SYN, sport=2)),
    "table_full": (FlowSettings(max_flows=1), tcp4(flags=SYN, sport=2)),
    "device_limit": (FlowSettings(device_flows=1), tcp4(flags=SYN, sport=2)),
    "device_held_limit": (FlowSettings(device_held=1), tcp4(flags=SYN, sport=2)),
    "tenant_limit": (FlowSettings(tenant_flows=1), tcp4(flags=SYN, sport=2)),
    "icmp_rate_limit": (FlowSettings(icmp_per_second=0), tcp4(ttl=1, flags=SYN)),
    "syn_held": (FlowSettings(), tcp4(flags=SYN, sport=1)),
    "held": (FlowSettings(), tcp4(flags=RST, sport=1)),
}


def _not_ready(rig: FlowRig) -> object:
    sock = rig.tunnel()
    sock.send(tcp4(flags=SYN))
    return sock


def _stray(packet: bytes) -> Callable[[FlowRig], object]:
    def run(rig: FlowRig) -> None:
        rig.tun[Framing.RAW].send(vnet.ZERO + packet)

    return run


def _tunnel_full(rig: FlowRig) -> object:
    sock = rig.tunnel()
    while not rig.drops():
        sock.send(tcp4() * 30)
        rig.step()
    return sock


def _by_trunk(*datagrams: bytes) -> Callable[[FlowRig], object]:
    def run(rig: FlowRig) -> object:
        trunk = rig.trunk()
        rig.by_trunk()
        for datagram in datagrams:
            trunk.send(datagram)
        return trunk

    return run


def _onramp_away(rig: FlowRig) -> object:
    rig.policies, rig.routes = forward_rig.POLICIES, forward_rig.ROUTES
    rig.load()
    rig.until(lambda: rig.worker.routes.routes > 3)
    trunk = rig.trunk()
    rig.by_trunk(forward_rig.who("nas", list(forward_rig.NAS.values())))
    trunk.close()
    sock = rig.tunnel()
    for _ in range(2):
        sock.send(forward_rig.datagram(DEVICE4, forward_rig.NAS[4], 40000, 53, bytes(900)))
        rig.step()
    return sock


def _tunnel_closed(rig: FlowRig) -> object:
    sock = rig.tunnel()
    sock.send(tcp4(flags=SYN))
    rig.step()
    sock.close()
    return None


def _tun_write_error(rig: FlowRig) -> object:
    sock = rig.tunnel()
    sock.send(tcp4(flags=SYN))
    (prepare,) = rig.asked()
    assert isinstance(prepare, Prepare)
    rig.tun[Framing.RAW].close()
    rig.say_upgrader(Connected(prepare.slot, 1))
    return sock


def _audit_unwritable(rig: FlowRig) -> object:
    rig.worker.spool.close()
    rig.worker.spool._file = os.open("/dev/full", os.O_WRONLY)
    sock = rig.tunnel()
    # The first is held back with its record; from then on none is taken.
    sock.send(tcp4(flags=SYN))
    rig.step()
    assert rig.asked() == []
    for port in range(5):
        sock.send(tcp4(flags=SYN, sport=port))
        rig.step()
    # Refusals are counted meanwhile: records that nothing takes would fill the memory.
    assert rig.worker.spool.pending == []
    return sock


def _wish(rig: FlowRig) -> tuple[Any, OpenSocket]:
    sock = rig.tunnel()
    sock.send(UDP)
    (wish,) = rig.asked()
    assert isinstance(wish, OpenSocket)
    return sock, wish


def _no_socket(code: int) -> Callable[[FlowRig], object]:
    def run(rig: FlowRig) -> object:
        sock, wish = _wish(rig)
        rig.say_upgrader(SocketFailed(wish.token, code))
        return sock

    return run


def _empty_question(rig: FlowRig) -> object:
    rig.change_routes(RouteEntry("", "resolver", "203.0.113.5/32", "resolver"))
    sock = rig.tunnel()
    question = samples.ip4(17, samples.udp(DEVICE4, SERVER4, b""), source=DEVICE4, destination=SERVER4)
    sock.send(question)
    (wish,) = rig.asked()
    assert isinstance(wish, OpenSocket)
    ours, theirs = seqpacket.pair()
    rig.give_socket(wish, theirs, local=0)
    return sock, ours


def _socket_full(rig: FlowRig) -> object:
    # UDP on loopback is never full, a stream that nobody reads is.
    sock, wish = _wish(rig)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(1 << 20))
    rig.give_socket(wish, near)
    return sock, far


def _icmp_error_taken(rig: FlowRig) -> object:
    sock, wish = _wish(rig)
    near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    far.bind(("127.0.0.1", 0))
    near.connect(far.getsockname())
    rig.give_socket(wish, near)
    quote = samples.ip4(17, bytes.fromhex("003514e900100000"), source=SERVER4, destination=DEVICE4)
    sock.send(samples.ip4(1, samples.icmp4(3, 3, payload=quote), source=DEVICE4, destination=SERVER4))
    rig.step()
    return sock, far


def _fragment_timeout(rig: FlowRig) -> object:
    # The first fragment hasn't come, so nobody is told.
    sock = rig.tunnel()
    sock.send(piece4(8, bytes(8)))
    rig.step()
    now = rig.worker.now
    rig.worker.clock = lambda: now + 16_000_000_000
    return sock


def _sibling_full(rig: FlowRig) -> object:
    rig.policies, rig.routes = forward_rig.POLICIES, forward_rig.ROUTES
    rig.load()
    rig.until(lambda: rig.worker.routes.routes > 3)
    whose = forward_rig.who("nas", list(forward_rig.NAS.values()))
    other, theirs = seqpacket.pair()
    rig.say_parent(control.Sibling(1), fds=[theirs.fileno()])
    theirs.close()
    rig.say_parent(
        control.Attached(99, 1, whose.tenant_id, whose.device_id, whose.virtual_network_id, Framing.RAW, 1500)
    )
    sock = rig.tunnel()
    while not rig.drops():
        sock.send(forward_rig.datagram(DEVICE4, forward_rig.NAS[4], 40000, 53, bytes(1400)))
        rig.step()
    return sock, other


def _to_lower(rig: FlowRig) -> tuple[Any, Any]:
    """The laptop and the NAS, with a rule that lifts and lowers between them."""
    rig.policies, rig.routes = lower_rig.POLICIES, forward_rig.ROUTES
    rig.load()
    rig.until(lambda: rig.worker.routes.routes > 3)
    laptop, nas = (
        rig.tunnel(who=forward_rig.who(name, list(addresses.values())))
        for name, addresses in (("laptop", forward_rig.LAPTOP), ("nas", forward_rig.NAS))
    )
    return laptop, nas


def _lower_slots_exhausted(rig: FlowRig) -> object:
    laptop, nas = _to_lower(rig)
    while rig.worker.lowering.lanes[Framing.RAW].pool.claim(rig.worker.second) is not None:
        pass
    laptop.send(tcp4(destination=forward_rig.NAS[4], flags=SYN))
    return laptop, nas


def _ports_in_use(rig: FlowRig) -> object:
    """The NAS talks to the laptop's newer tunnel, and the laptop by the older one to the same ports of the NAS."""
    laptop, nas = _to_lower(rig)
    newer = rig.tunnel(who=forward_rig.who("laptop", list(forward_rig.LAPTOP.values())))
    nas.send(tcp4(source=forward_rig.NAS[4], destination=DEVICE4, sport=2000, dport=40000, flags=SYN))
    assert len(rig.asked()) == 1
    laptop.send(tcp4(destination=forward_rig.NAS[4], sport=40000, dport=2000, flags=SYN))
    return laptop, nas, newer


DIRECTED: dict[str, Callable[[FlowRig], object]] = {
    "not_ready": _not_ready,
    "audit_unwritable": _audit_unwritable,
    "fragment_timeout": _fragment_timeout,
    "descriptors_exhausted": _no_socket(errno.EMFILE),
    "ports_exhausted": _no_socket(errno.EADDRINUSE),
    "upstream_error": _no_socket(errno.EIO),
    "socket_full": _socket_full,
    "dns_malformed": _empty_question,
    "icmp_error_taken": _icmp_error_taken,
    "no_flow": _stray(samples.tcp4()),
    "not_tcp": _stray(samples.ip4(2, bytes(8))),
    "lower_slots_exhausted": _lower_slots_exhausted,
    "ports_in_use": _ports_in_use,
    "sibling_full": _sibling_full,
    "tunnel_full": _tunnel_full,
    "tunnel_closed": _tunnel_closed,
    "unknown_tunnel": _by_trunk(NUMBER.pack(2) + tcp4() + tcp6()),
    "short_datagram": _by_trunk(NUMBER.pack(1)[:3]),
    "onramp_away": _onramp_away,
    "tun_write_error": _tun_write_error,
}


def test_these_are_all_there_are() -> None:
    cases = [*RAW, *VNET, *FRAGMENTS, *WITH_SETTINGS, *DIRECTED]
    assert sorted(cases) == sorted(DROP_REASONS)


@pytest.mark.parametrize("reason", [*RAW, *VNET])
def test_a_packet_that_is_dropped_for(reason: str, tmp_path: Path) -> None:
    rig = FlowRig(tmp_path)
    sock = rig.tunnel(Framing.RAW if reason in RAW else Framing.VNET)
    sock.send(RAW[reason] if reason in RAW else VNET[reason])
    rig.step()
    assert rig.drops() == {reason: 1}
    assert rig.count("received") == 1
    assert rig.asked() == []
    sock.close()
    rig.close()


@pytest.mark.parametrize("reason", list(FRAGMENTS))
def test_fragments_that_do_not_become_a_packet(reason: str, tmp_path: Path) -> None:
    settings, packets, count = FRAGMENTS[reason]
    rig = FlowRig(tmp_path, settings)
    sock = rig.tunnel()
    for packet in packets:
        sock.send(packet)
    rig.step()
    assert rig.drops() == {reason: count}
    # What waits hasn't been received yet.
    assert rig.count("received") == count
    sock.close()
    rig.until(lambda: not rig.worker.tunnels)
    assert rig.count("received") == len(packets)
    assert rig.balanced()
    rig.close()


@pytest.mark.parametrize("reason", list(WITH_SETTINGS))
def test_one_too_many(reason: str, tmp_path: Path) -> None:
    settings, data = WITH_SETTINGS[reason]
    rig = FlowRig(tmp_path, settings)
    sock = rig.tunnel(Framing.RAW, context())
    sock.send(tcp4(flags=SYN, sport=1))
    rig.step()
    assert rig.drops() == {}
    sock.send(data)
    rig.step()
    # A reset takes the SYN that is held with it.
    assert rig.drops() == {reason: 2 if reason == "held" else 1}
    assert rig.count("received") == 2
    sock.close()
    rig.close()


@pytest.mark.parametrize("reason", list(DIRECTED))
def test_a_state_in_which_packets_are_dropped(reason: str, tmp_path: Path) -> None:
    settings = FlowSettings(tunnel_queue_bytes=1000)
    rig = FlowRig(tmp_path, settings, ready=reason != "not_ready")
    kept = DIRECTED[reason](rig)
    rig.step()
    assert set(rig.drops()) == {reason}
    held = sum(tunnel.device.held for tunnel in rig.worker.tunnels.values())
    accounted = rig.count("forwarded") + rig.count("answered") + sum(rig.drops().values())
    assert rig.count("received") == accounted + held
    del kept
    rig.close()
