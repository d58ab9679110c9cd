"""Falkirk as a road for packet cases: a connected tunnel of a real mesh.

`settle` uses a connection of its own in each family: a byte that was acknowledged long ago is sent again, which the private namespace's TCP
acknowledges at once (RFC 9293 3.10.7.4, first step). Everything on the way (the tunnel, the flow worker, the TUN device, the kernel) keeps its
order, so when that acknowledgment is here, so is whatever the packets before it have brought about below the relay.

Limit: what comes of the relay or of timers isn't settled; scripts wait for it by `<`.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from falkirk.linux import seqpacket
from tests.packets import craft
from tests.packets.craft import Endpoints
from tests.packets.read import VNET, Seen, plain, seen
from tests.packets.script import FAMILIES, Step

DEADLINE_S: Final = 20.0
_BARE: Final = Step(0, "", "", (), (), None)
_FENCE_PORT: Final = 19999


class TunnelRoad:
    """A connected tunnel of one framing."""

    def __init__(
        self, tunnel_sock: Path, context: dict[str, Any], fences: dict[str, tuple[str, int]], drops: Any = None
    ) -> None:
        self.name = context["framing"]
        self.partial = self.name == "vnet"
        self._drops = drops
        self._tunnel = seqpacket.connect(tunnel_sock)
        self._tunnel.setblocking(True)
        self._tunnel.settimeout(DEADLINE_S)
        self._tunnel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._tunnel.send(json.dumps(context).encode())
        answer = json.loads(self._tunnel.recv(16384))
        assert "admitted" in answer, answer
        admitted = answer["admitted"]
        self.mtu = int(admitted["mtu"])
        plain_addresses: list[str] = [address.partition("/")[0] for address in admitted["addresses"]]
        self._addresses = {
            family: next(address for address in plain_addresses if (":" in address) == (family == "ipv6"))
            for family in FAMILIES
        }
        self._inbox: list[Seen] = []
        self._fences = {family: self._raise_fence(family, *fences[family]) for family in FAMILIES}

    def address(self, family: str) -> str:
        """The device's."""
        return self._addresses[family]

    def send(self, packet: bytes, *, whole: bool = False, gso: int = 0) -> bytes:
        """One datagram."""
        if self.name == "raw":
            self._tunnel.send(packet)
            return packet
        framed = _behind_header(packet, whole, gso)
        self._tunnel.send(framed)
        return framed[VNET.size :]

    def receive(self, deadline: float) -> Seen | None:
        """The next packet."""
        while not self._inbox:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._tunnel], [], [], left)[0]:
                return None
            data = self._tunnel.recv(1 << 17)
            assert data, "the tunnel was closed"
            for part in plain(data) if self.partial else [data]:
                self._inbox.append(seen(part))
        return self._inbox.pop(0)

    def settle(self) -> list[Seen]:
        """See the module's docstring."""
        rest = []
        for family in FAMILIES:
            connection, base = self._fences[family]
            self.send(_segment(connection, family, ".", 1000, base + 1, b"x"))
            deadline = time.monotonic() + DEADLINE_S
            while True:
                packet = self.receive(deadline)
                assert packet is not None, "the fence didn't answer"
                if packet.destination_port == _FENCE_PORT:
                    break
                rest.append(packet)
        return rest

    def dropped(self) -> dict[str, int] | None:
        """The flow tracker's own count."""
        found: dict[str, int] | None = self._drops() if self._drops else None
        return found

    def close(self) -> None:
        """End the tunnel."""
        self._tunnel.close()

    def _raise_fence(self, family: str, host: str, port: int) -> tuple[Endpoints, int]:
        ends = Endpoints(self.address(family), host, _FENCE_PORT, port)
        self.send(_segment(ends, family, "S", 999, 0, b""))
        answer = self.receive(time.monotonic() + DEADLINE_S)
        assert answer is not None, "no fence"
        assert answer.flags == "S.", str(answer)
        base = answer.sequence
        self.send(_segment(ends, family, ".", 1000, base + 1, b"x"))
        assert self.receive(time.monotonic() + DEADLINE_S) is not None
        return ends, base


def _segment(ends: Endpoints, family: str, flags: str, sequence: int, ack: int, payload: bytes) -> bytes:
    return craft.ip(_BARE, ends, family, 6, craft.tcp(_BARE, ends, flags, sequence, ack, payload))


def _behind_header(packet: bytes, whole: bool, gso: int) -> bytes:
    """As a kernel would give it: TCP and UDP with a partial checksum."""
    four = packet[:1] and packet[0] >> 4 == 4
    upper = (packet[0] & 15) * 4 if four else 40
    protocol = packet[9] if four and len(packet) > 9 else packet[6] if len(packet) > 6 else 0
    fragment = four and len(packet) > 7 and int.from_bytes(packet[6:8], "big") & 0x3FFF
    if whole or fragment or protocol not in (6, 17) or len(packet) < upper + (20 if protocol == 6 else 8):
        return bytes(VNET.size) + packet
    offset = 16 if protocol == 6 else 6
    addresses = (packet[12:16], packet[16:20]) if four else (packet[8:24], packet[24:40])
    if protocol == 17 and packet[upper + 6 : upper + 8] == b"\0\0":
        return bytes(VNET.size) + packet
    total = craft.pseudo(addresses[0], addresses[1], protocol, len(packet) - upper)
    at = upper + offset
    packet = packet[:at] + struct.pack(">H", total) + packet[at + 2 :]
    kind = 0 if not gso else 5 if protocol == 17 else 1 if four else 4
    header = upper + ((packet[upper + 12] >> 4) * 4 if protocol == 6 else 8)
    return VNET.pack(1, kind, header if gso else 0, gso, upper, offset) + packet
