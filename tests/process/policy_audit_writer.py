"""A process that owns an audit store: reads "epoch first last" lines, stores those records, answers "epoch mark" lines.

Records have a worker of 0 and a text of varying length. It stores as fast as lines come, so it is always in the middle of something.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from pathlib import Path

from falkirk.policy.records import Key, accept
from falkirk.policy.store import AuditStore, Limits


def main(directory: Path) -> None:
    """Until the input ends."""
    store = AuditStore(directory, Limits(segment_bytes=30_000, flush_milliseconds=1))
    store.open()

    def answer(done: Future[dict[Key, int]]) -> None:
        for (_, _, epoch), mark in done.result().items():
            sys.stdout.write(f"{epoch} {mark}\n")
            sys.stdout.flush()

    for line in sys.stdin:
        epoch, first, last = map(int, line.split())
        records = [
            accept("local", 0, epoch, n, f'{{"event":"started","pad":"{"x" * (n * 37 % 400)}"}}')
            for n in range(first, last + 1)
        ]
        store.append(records).add_done_callback(answer)
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
