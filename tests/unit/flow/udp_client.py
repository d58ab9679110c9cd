"""A device that speaks UDP through the rig, and the server on loopback that its sessions lead to."""

from __future__ import annotations

import socket

from falkirk.linux import datagrams
from falkirk.wire import icmp, vnet
from falkirk.wire.build import icmp_packet
from falkirk.wire.context import Framing, TunnelContext
from falkirk.wire.datagram import Heads
from falkirk.wire.handover import OpenSocket
from falkirk.wire.packet import Packet, parse, split, verify
from falkirk.wire.segment import segments
from tests.flow_rig import DEVICE4, DEVICE6, SERVER4, SERVER6, FlowRig, read

FAMILIES = {4: (DEVICE4, SERVER4), 6: (DEVICE6, SERVER6)}
LOOPBACK = {4: socket.inet_aton("127.0.0.1"), 6: socket.inet_pton(socket.AF_INET6, "::1")}


class Client:
    """A device on a tunnel, and the server that its sessions lead to."""

    def __init__(self, rig: FlowRig, framing: Framing, family: int, who: TunnelContext | None = None) -> None:
        self.rig, self.framing, self.family = rig, framing, family
        self.sock = rig.tunnel(framing, who)
        self.device, self.server = FAMILIES[family]
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self.far = socket.socket(kind, socket.SOCK_DGRAM)
        self.far.bind(("127.0.0.1" if family == 4 else "::1", 0))
        self.far.settimeout(5)
        self.port = 40000
        self.to = 5000
        self.came = 0
        """Datagrams in the tunnel, when `packets` looked last."""

    def close(self) -> None:
        self.sock.close()
        self.far.close()

    def datagram(self, payload: bytes, *, ttl: int = 64, traffic_class: int = 0, partial: bool = False) -> bytes:
        heads = Heads(self.device, self.server, self.port, self.to)
        buf = bytearray(heads.size) + payload
        heads.put(buf, 0, len(payload), ttl, traffic_class, partial=partial)
        return bytes(buf)

    def send_packet(self, packet: bytes, header: bytes = vnet.ZERO) -> None:
        self.sock.send(packet if self.framing is Framing.RAW else header + packet)
        self.rig.step()

    def send(self, payload: bytes, **fields: int) -> None:
        self.send_packet(self.datagram(payload, **fields))  # type: ignore[arg-type]

    def wish(self) -> OpenSocket:
        (wish,) = self.rig.asked()
        assert isinstance(wish, OpenSocket)
        return wish

    def begin(self, payload: bytes = b"first") -> OpenSocket:
        """A session whose socket leads to the server on loopback."""
        self.send(payload)
        wish = self.wish()
        self.rig.give_socket(wish, datagrams.udp(LOOPBACK[self.family], self.far.getsockname()[1], b"", wish.local))
        return wish

    def hears(self) -> tuple[bytes, int, int]:
        """What the server gets: payload, TTL, traffic class."""
        four = self.family == 4
        level = socket.IPPROTO_IP if four else socket.IPPROTO_IPV6
        wanted = (
            (datagrams.IP_RECVTTL, datagrams.IP_RECVTOS)
            if four
            else (
                datagrams.IPV6_RECVHOPLIMIT,
                datagrams.IPV6_RECVTCLASS,
            )
        )
        for option in wanted:
            self.far.setsockopt(level, option, 1)
        payload, ancillary, _, self.peer = self.far.recvmsg(65536, 200)
        told = {kind: data[0] for _, kind, data in ancillary}
        ttl = told.get(datagrams.IP_TTL if four else datagrams.IPV6_HOPLIMIT, -1)
        return payload, ttl, told.get(datagrams.IP_TOS if four else datagrams.IPV6_TCLASS, -1)

    def packets(self, wait: bool = True) -> list[tuple[Packet, bytes]]:
        """Whole packets that the device gets, with right checksums, and the payload of each."""
        datagrams: list[bytes] = []

        def come() -> bool:
            datagrams.extend(read(self.sock))
            return bool(datagrams)

        if wait:
            self.rig.until(come)
        self.rig.step()
        come()
        made = []
        self.came = len(datagrams)
        for data in datagrams:
            plain: list[bytes]
            if self.framing is Framing.VNET:
                header = vnet.unpack(data, 0, len(data))
                packet = parse(data, 10, len(data) - 10, fragments=True)
                assert vnet.validate(header, packet, 1500) == header
                plain = [bytes(one) for one in segments(header, data, 10, len(data) - 10)]
            else:
                plain = [data[at : at + size] for at, size in split(data, len(data))]
            for one in plain:
                packet = parse(one, 0, len(one), fragments=True)
                assert packet.total_length == len(one)
                verify(one, packet)
                made.append((packet, one[packet.payload_offset :]))
        return made


def unreachable(client: Client, why: icmp.Unreachable) -> tuple[int, int]:
    code4, type6, code6 = why.value
    return (icmp.UNREACHABLE4, code4) if client.family == 4 else (type6, code6)


def client_error(client: Client, kind: int, code: int, rest: int, payload: bytes = b"answer") -> bytes:
    """What the client says of a datagram that it was sent."""
    heads = Heads(client.server, client.device, client.to, client.port)
    quote = bytearray(heads.size) + payload
    heads.put(quote, 0, len(payload), 60, 0)
    return icmp_packet(bytearray(icmp.build(kind, code, rest)) + quote, client.device, client.server)
