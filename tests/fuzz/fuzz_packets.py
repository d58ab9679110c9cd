"""Fuzz target: a flow worker, fed a little story of what a client, an upgrader and a kernel do; its books must close after it.

An input is a sequence of steps: a byte that says what happens, two of length, and that many bytes:

    0 raw datagram         1 vnet datagram        2, 3 the same with IP and TCP checksums made right first
    4 raw segment from the kernel to the newest slot    5 the same, vnet        6 what the upgrader says of it (see `_upgrader`)
    7 seconds pass
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import time
from pathlib import Path

from falkirk.flow.settings import FlowSettings
from falkirk.runtime.log import Log
from falkirk.wire import vnet
from falkirk.wire.context import Framing
from falkirk.wire.handover import Closed, Connected, DialFailed, Message, Prepare
from tests.flow_rig import FlowRig, read
from tests.fuzz.mutants import fix

STEPS = 24
REASONS = ("finished", "client_reset", "upstream_reset", "idle", "aborted", "never_opened")
ERRNOS = (111, 113, 101, 110, 13, 0)


class Stage:
    """A worker that is kept over all inputs; tunnels are new for each."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="falkirk-packets-"))
        self.rig = FlowRig(self.directory, FlowSettings(slots=256, max_flows=128))
        self.rig.worker.log = Log("fuzz", fd=-1)
        self.ahead = 0
        self.rig.worker.clock = lambda: time.monotonic_ns() + self.ahead

    def close(self) -> None:
        """Give everything back."""
        self.rig.close()
        shutil.rmtree(self.directory)

    def play(self, data: bytes) -> None:
        """One input."""
        rig = self.rig
        socks = {framing: rig.tunnel(framing) for framing in Framing}
        slot = 0
        for _ in range(STEPS):
            if len(data) < 3:
                break
            what, length = data[0] & 7, data[1] << 8 | data[2]
            part, data = data[3 : 3 + length], data[3 + length :]
            if what < 4:
                framing = Framing.VNET if what & 1 else Framing.RAW
                socks[framing].send(self._fixed(part, what))
            elif what < 6:
                self._kernel(Framing.VNET if what & 1 else Framing.RAW, slot, part)
            elif what == 6:
                rig.say_upgrader(*self._upgrader(slot, part))
            else:
                self.ahead += sum(part[:2]) * 1_000_000_000
            for message in rig.asked():
                if isinstance(message, Prepare):
                    slot = message.slot
            for sock in (*rig.tun.values(), *socks.values()):
                read(sock)
            assert rig.worker._epoll.poll(0) == []
        for sock in socks.values():
            sock.close()
        rig.step()
        rig.asked()
        rig.told()
        worker = rig.worker
        assert (worker.tunnels, worker.flow_count, worker.tunnels.devices, len(worker.wheel)) == ({}, 0, {}, 0)
        assert all(worker.lane(framing).pool.active == 0 for framing in Framing)
        assert rig.balanced(), rig.drops()
        self.ahead += 601_000_000_000

    @staticmethod
    def _fixed(part: bytes, what: int) -> bytes:
        if not what & 2:
            return part
        head = part[: vnet.SIZE] if what & 1 else b""
        packet = bytearray(part[len(head) :])
        fix(packet, partial=bool(head and head[0] & 1))
        return head + packet

    def _kernel(self, framing: Framing, slot: int, part: bytes) -> None:
        plan = self.rig.plan
        if len(part) < 21:
            return
        address, family = (plan.address6, 6) if part[0] & 1 else (plan.address4, 4)
        listener, inside = address(0, plan.slot(framing, 1)), address(0, slot)
        segment = part[1:]
        if family == 4:
            head = bytearray.fromhex("450000000007400040060000") + listener + inside
            head[2:4] = (20 + len(segment)).to_bytes(2, "big")
        else:
            head = bytearray.fromhex("6000000000000640") + listener + inside
            head[4:6] = len(segment).to_bytes(2, "big")
        packet = head + segment
        fix(packet)
        self.rig.tun[framing].send(vnet.ZERO + packet)
        self.rig.step()

    @staticmethod
    def _upgrader(slot: int, part: bytes) -> list[Message]:
        said: list[Message] = []
        for byte in part[:4]:
            which, kind = byte >> 2, byte & 3
            if kind < 2:
                said.append(Connected(slot + kind, 1))
            elif kind == 2:
                said.append(DialFailed(slot, ERRNOS[which % len(ERRNOS)], 1))
            else:
                said.append(Closed(slot, REASONS[which % len(REASONS)], 1, 1))
        return said or [Connected(slot, 1)]


_stages: list[Stage] = []


def one(data: bytes) -> None:
    """Play it on the stage, which is made for the first input."""
    if not _stages:
        _stages.append(Stage())
        atexit.register(close)
    _stages[0].play(data)


def close() -> None:
    """Clear the stage."""
    while _stages:
        _stages.pop().close()


if __name__ == "__main__":
    from tests.fuzz.coverage import script

    sys.exit(script("packets", sys.argv[1:]))
