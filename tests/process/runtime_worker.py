"""A worker as small as can be: answers each message with its pid; obeys b"exit", b"stuck" and b"ignore"; sends back a descriptor that it gets."""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from falkirk.linux import seqpacket


def main() -> None:
    fd = int(sys.argv[1])
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        poll.poll()
        message = seqpacket.receive(fd, 65536)
        if message is None:
            continue
        data, fds = message
        if not data:
            return
        if data == b"exit":
            sys.exit(7)
        if data == b"stuck":
            time.sleep(3600)
        if data == b"ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        seqpacket.send(fd, b"%d %s" % (os.getpid(), data[:100]), fds)


if __name__ == "__main__":
    main()
