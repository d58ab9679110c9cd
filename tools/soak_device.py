"""A device of the soak: a raw tunnel, and UDP and TCP made by hand, many at once.

`Device.churn` runs flows from their first packet to their last: a datagram and its echo, or a connection that the server closes first.
`Device.talk` keeps sessions going, one datagram each and its echo, by number. What doesn't come within `LOST_S` is counted as lost,
and sent again once (UDP) or given up (TCP).

Limits: IPv4; one MTU of data a packet; checksums of what comes aren't looked at, since the packet suites do that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from falkirk.linux import seqpacket
from falkirk.wire.build import segment
from falkirk.wire.checksum import checksum, pseudo_header
from falkirk.wire.datagram import Heads

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
LOST_S: Final = 5.0
AT_ONCE: Final = 64
"""Flows under way; fewer than a listener's queue and a device's held flows."""
FIRST_PORT: Final = 1024


@dataclass
class Count:
    """What came of flows."""

    begun: int = 0
    done: int = 0
    lost: int = 0
    """Neither answered nor refused in time."""
    refused: int = 0
    wrong: int = 0
    """Answers that weren't what was sent."""
    again: int = 0
    """Datagrams that were sent a second time."""


@dataclass
class _Under:
    """A flow under way."""

    port: int
    tcp: bool
    deadline: float
    payload: bytes
    tries: int = 1
    ends: set[str] = field(default_factory=set)


class Device:
    """One tunnel; `server` is (address, UDP port, TCP port)."""

    def __init__(self, tunnel_sock: Path, tenant: str, device: str, server: tuple[str, int, int]) -> None:
        self._tunnel = seqpacket.connect(tunnel_sock)
        self._tunnel.setblocking(True)
        self._tunnel.settimeout(20)
        context: dict[str, Any] = {"v": 1, "tenant": tenant, "device": device, "framing": "raw"}
        self._tunnel.send(json.dumps(context).encode())
        answer = json.loads(self._tunnel.recv(16384))
        if "admitted" not in answer:
            raise RuntimeError(f"the on-ramp refused: {answer}")
        self._tunnel.settimeout(None)
        addresses = (ipaddress.ip_interface(address).ip for address in answer["admitted"]["addresses"])
        self._own = next(address.packed for address in addresses if address.version == 4)
        self._server = ipaddress.IPv4Address(server[0]).packed
        self._udp_port, self._tcp_port = server[1], server[2]
        self._under: dict[tuple[bool, int], _Under] = {}
        self.count = Count()

    def close(self) -> None:
        """End the tunnel, and with it what flows it has."""
        self._tunnel.close()

    def churn(self, flows: int, *, tcp_every: int = 2) -> None:
        """So many flows, each `tcp_every`th one TCP, from a port of its own."""
        for number in range(flows):
            while len(self._under) >= AT_ONCE:
                self._turn()
            self._begin(FIRST_PORT + number % 64000, number % tcp_every == 0, b"%d" % number)
        while self._under:
            self._turn()

    def talk(self, sessions: int, word: bytes) -> None:
        """One datagram of each session, and its echo."""
        for number in range(sessions):
            while len(self._under) >= AT_ONCE:
                self._turn()
            self._begin(FIRST_PORT + number, False, b"%d %b" % (number, word))
        while self._under:
            self._turn()

    def _begin(self, port: int, tcp: bool, payload: bytes) -> None:
        flow = _Under(port, tcp, time.monotonic() + LOST_S, payload)
        self._under[tcp, port] = flow
        self.count.begun += 1
        if tcp:
            self._segment(port, 1000, 0, SYN)
        else:
            self._datagram(flow)

    def _segment(self, port: int, sequence: int, ack: int, flags: int, payload: bytes = b"") -> None:
        packet = segment(self._own, self._server, port, self._tcp_port, sequence, ack, flags, 65535)
        if payload:
            packet = _with_payload(packet, payload)
        self._tunnel.send(packet)

    def _datagram(self, flow: _Under) -> None:
        heads = Heads(self._own, self._server, flow.port, self._udp_port)
        packet = bytearray(heads.size) + flow.payload
        heads.put(packet, 0, len(flow.payload), 64, 0)
        self._tunnel.send(packet)

    def _turn(self) -> None:
        """Take what has come, for at most a moment; give up what is late."""
        if not select.select([self._tunnel], [], [], 0.2)[0]:
            self._give_up(time.monotonic())
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._tunnel.recv(65536, socket.MSG_DONTWAIT)
                if not data:
                    raise RuntimeError("the tunnel was closed")
                self._take(data)

    def _give_up(self, now: float) -> None:
        for key, flow in list(self._under.items()):
            if flow.deadline > now:
                continue
            if not flow.tcp and flow.tries == 1:
                flow.tries, flow.deadline = 2, now + LOST_S
                self.count.again += 1
                self._datagram(flow)
                continue
            self.count.lost += 1
            del self._under[key]

    def _take(self, data: bytes) -> None:
        protocol = data[9]
        if protocol == 1:
            self._refused(data[28:])
        elif protocol == 17:
            port = int.from_bytes(data[22:24], "big")
            flow = self._under.pop((False, port), None)
            if flow is not None:
                self._over(flow, data[28:] == flow.payload)
        elif protocol == 6:
            self._take_segment(data)

    def _refused(self, quoted: bytes) -> None:
        key = quoted[9] == 6, int.from_bytes(quoted[20:22], "big")
        if self._under.pop(key, None) is not None:
            self.count.refused += 1

    def _take_segment(self, data: bytes) -> None:
        port, sequence, ack = struct.unpack_from(">2xHII", data, 20)
        flags, payload = data[33], data[20 + (data[32] >> 4 << 2) :]
        flow = self._under.get((True, port))
        if flow is None:
            return
        if flags & RST:
            self.count.refused += 1
            del self._under[True, port]
        elif flags & SYN:
            self._segment(port, 1001, sequence + 1 & 0xFFFFFFFF, PSH | ACK, flow.payload)
        else:
            if payload:
                flow.ends.add("right" if payload == flow.payload else "wrong")
            if flags & FIN:
                following = sequence + len(payload) + 1 & 0xFFFFFFFF
                self._segment(port, ack, following, FIN | ACK)
                flow.ends.add("fin")
            elif "fin" in flow.ends and ack == 1002 + len(flow.payload):
                # Our FIN is acknowledged: nothing is left to say.
                del self._under[True, port]
                self._over(flow, "right" in flow.ends and "wrong" not in flow.ends)

    def _over(self, flow: _Under, right: bool) -> None:
        self.count.done += right
        self.count.wrong += not right


def _with_payload(packet: bytes, payload: bytes) -> bytes:
    """An IPv4 segment with data: lengths and checksums anew."""
    head, tcp = bytearray(packet[:20]), bytearray(packet[20:] + payload)
    head[2:4] = (20 + len(tcp)).to_bytes(2, "big")
    head[10:12] = b"\0\0"
    head[10:12] = checksum(head).to_bytes(2, "big")
    tcp[16:18] = b"\0\0"
    tcp[16:18] = checksum(tcp, pseudo_header(bytes(head[12:16]), bytes(head[16:20]), 6, len(tcp))).to_bytes(2, "big")
    return bytes(head + tcp)
