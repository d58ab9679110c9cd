"""IP packets out of capture files: pcap and pcapng, with whatever link layer around them that captures usually have.

Ethernet (with VLAN tags), Linux "cooked" captures of both versions, BSD loopback and raw IP are taken off; frames of anything but IP are left out, and
so is the padding behind a short packet. Raises ValueError for a file that is neither, or of another link layer.

Limit: a packet that the capture has cut is given as far as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import dpkt

ETHERNET: Final = 1
RAW: Final = frozenset((12, 14, 101, 228, 229))
LOOPBACK: Final = frozenset((0, 108))
COOKED: Final = 113
COOKED2: Final = 276
_VLAN: Final = frozenset((0x8100, 0x88A8, 0x9100))
_IP: Final = frozenset((0x0800, 0x86DD))


def packets(path: Path) -> Iterator[tuple[float, bytes]]:
    """(seconds since the epoch, packet) of each IP packet in a file, in its order."""
    with path.open("rb") as file:
        try:
            reader = dpkt.pcap.UniversalReader(file)
        except (ValueError, dpkt.UnpackError) as error:
            raise ValueError(f"{path}: neither pcap nor pcapng") from error
        kind = reader.datalink()
        if kind not in RAW | LOOPBACK | {ETHERNET, COOKED, COOKED2}:
            raise ValueError(f"{path}: link type {kind} isn't one that is read here")
        try:
            for time, frame in reader:
                packet = _inside(kind, frame)
                if packet:
                    yield float(time), _trimmed(packet)
        except dpkt.UnpackError as error:
            raise ValueError(f"{path}: {error}") from error


def _inside(kind: int, frame: bytes) -> bytes:
    """What a frame carries; empty where it isn't IP."""
    if kind in RAW:
        return frame
    if kind in LOOPBACK:
        return frame[4:] if frame[4:5] and frame[4] >> 4 in (4, 6) else b""
    if kind == COOKED:
        return frame[16:] if int.from_bytes(frame[14:16], "big") in _IP else b""
    if kind == COOKED2:
        return frame[20:] if int.from_bytes(frame[:2], "big") in _IP else b""
    at = 12
    while (ethertype := int.from_bytes(frame[at : at + 2], "big")) in _VLAN:
        at += 4
    return frame[at + 2 :] if ethertype in _IP else b""


def _trimmed(packet: bytes) -> bytes:
    """Without what is behind its end (Ethernet pads frames to 60 bytes)."""
    four = packet[0] >> 4 == 4
    length = int.from_bytes(packet[2:4] if four else packet[4:6], "big") + (0 if four else 40)
    return packet[:length] if 20 <= length <= len(packet) else packet
