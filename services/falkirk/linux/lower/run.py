"""One run: be admitted, enter the namespace, start the command, pump until it has ended, end as it did.

SIGTERM and SIGHUP go on to the command; an interrupt from the terminal reaches it by itself. When the tunnel ends first
the command gets SIGHUP, as from a lost terminal line, then SIGTERM and SIGKILL. When the tool is killed, so that
nothing would move the command's packets any more, the kernel sends the command SIGHUP.

When the command has ended, connections that it closed may still have data under way: what this end of the tunnel has acknowledged a slow
server may not have taken yet. So the pump goes on until each is closed by both sides, or the linger time is over, which is said.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from falkirk.linux import scheduling
from falkirk.linux.lower.admission import admit
from falkirk.linux.lower.carried import Carried
from falkirk.linux.lower.namespace import DEVICE, device_mtu, enter
from falkirk.linux.lower.pump import Pump
from falkirk.linux.lower.request import PROGRAM, Exit, LowerRequest, Stopped
from falkirk.wire.context import Transport

_PR_SET_PDEATHSIG: Final = 1
_HANG_UP_STEPS: Final = ((signal.SIGHUP, 2.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0))
"""Signals to a command whose tunnel is gone, each with the seconds that it is given."""
_FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP)
_ORPHANS_TURN_S: Final = 0.01
_CLOSING_STATES: Final = frozenset({"04", "05", "09", "0B"})
"""FIN-WAIT-1, LAST-ACK and CLOSING: RFC 9293 3.3.2, our FIN (and what precedes it) isn't acknowledged. FIN-WAIT-2: the other side hasn't ended, so nobody knows
whether it has read all; Falkirk passes its FIN on behind the last byte, and aborts a stream whose tunnel goes first."""


def run(request: LowerRequest) -> int:
    """The exit code: the command's, or one of `Exit` after a message on standard error."""
    try:
        return _run(request)
    except Stopped as stopped:
        print(f"{PROGRAM}: {stopped}", file=sys.stderr)
        return stopped.exit_code


def _run(request: LowerRequest) -> int:
    tunnel, admitted = admit(request)
    device = enter(request, admitted)
    pump: Pump | Carried
    if admitted.transport is Transport.DEVICE:
        pump = Carried(device, tunnel, DEVICE)
    else:
        pump = Pump(device, tunnel, request.framing, device_mtu(request, admitted), packed=request.packed)
    command = _start(request.command)
    # After the start: the command is none of ours.
    scheduling.batch()
    ended: list[bool] = []
    watch = os.pidfd_open(command.pid)
    pump.watch(watch, lambda: ended.append(True))
    try:
        while not ended and not pump.closed:
            pump.turn()
        if not ended:
            _hang_up(command)
            raise Stopped(Exit.TUNNEL_CLOSED, "TUNNEL_CLOSED", "the on-ramp ended the tunnel")
        _linger(pump, request.linger_s)
    finally:
        if request.stats:
            print(json.dumps(_counters(pump)), file=sys.stderr)
        os.close(watch)
        pump.close()
        tunnel.close()
        os.close(device)
    code = command.wait()
    return code if code >= 0 else 128 - code


def _start(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    # Loaded here: between fork and exec nothing should be.
    prctl = ctypes.CDLL(None).prctl
    # Until there is a command to send them to, they wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        started = subprocess.Popen(command, preexec_fn=_tie_to(os.getpid(), prctl))
    except FileNotFoundError as error:
        raise Stopped(Exit.NOT_FOUND, "COMMAND_NOT_FOUND", f"{command[0]}: no such command") from error
    except OSError as error:
        raise Stopped(Exit.NOT_EXECUTABLE, "COMMAND_NOT_EXECUTABLE", f"{command[0]}: {error.strerror}") from error
    for number in _FORWARDED:
        signal.signal(number, lambda got, _: started.send_signal(got))
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    return started


def _tie_to(parent: int, prctl: Callable[[int, int], int]) -> Callable[[], None]:
    def tie() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGHUP)

    return tie


def _hang_up(command: subprocess.Popen[bytes]) -> None:
    for number, seconds in _HANG_UP_STEPS:
        command.send_signal(number)
        try:
            command.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        return


def _linger(pump: Pump | Carried, seconds: float) -> None:
    """Go on while connections that nobody owns any more are closing, and until the device has nothing to read."""
    end = time.monotonic() + seconds
    while not pump.closed:
        left = closing()
        if time.monotonic() >= end:
            if left:
                what = f"{left} connection{'s' if left > 1 else ''} of the command hadn't ended after {seconds:g} s (--linger)"
                print(f"{PROGRAM}: warning: {what}: the other side may miss data", file=sys.stderr)
            return
        if not pump.turn(_ORPHANS_TURN_S if left else 0) and not left:
            return


def closing() -> int:
    """TCP connections of this namespace that nobody owns any more and that aren't closed by both sides."""
    count = 0
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            # sl local remote st tx:rx tr:when retransmit uid timeout inode
            columns = line.split()
            count += columns[3] in _CLOSING_STATES and columns[9] == "0"
    return count


def _counters(pump: Pump | Carried) -> dict[str, object]:
    return {
        "sent_datagrams": pump.sent_datagrams,
        "received_datagrams": pump.received_datagrams,
        "dropped": dict(pump.dropped),
    }
