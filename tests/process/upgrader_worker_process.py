"""A worker as a process of its own over loopback, for tests that kill it: `python … DIRECTORY LISTENER_FD`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from falkirk.linux import seqpacket
from falkirk.runtime.counters import Counters
from falkirk.upgrader import control
from falkirk.upgrader.worker import Worker, raise_descriptor_limit


def main() -> None:
    path = Path(sys.argv[1]) / "upgrader.worker.0.sock"
    listener = socket.socket(fileno=int(sys.argv[2]))
    listener.setblocking(False)
    setup = control.Setup(0, 1, 5, str(path), 0o600, (os.getuid(),), 1024, 1500, 30.0, "", "info", "json")
    null = os.open(os.devnull, os.O_RDWR)
    worker = Worker(
        setup,
        [listener],
        lambda address: int.from_bytes(socket.inet_aton(address)[-2:], "big"),
        seqpacket.listen(path),
        (null, null, null, null),
        Counters.create(control.COUNTERS),
        lambda _span: True,
        raise_descriptor_limit(),
    )
    while True:
        worker.turn()


if __name__ == "__main__":
    main()
