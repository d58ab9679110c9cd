"""Kill -9 of the audit writer at any moment: every record is stored exactly once, and none that was acknowledged is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from falkirk.policy import query
from falkirk.policy.records import Filter
from falkirk.policy.store import AuditStore, Limits

WRITER = Path(__file__).with_name("policy_audit_writer.py")
KILLS = 25
EPOCHS = (1, 2)


def test_killed_again_and_again_each_record_is_stored_once(tmp_path: Path) -> None:
    rng = random.Random(1)
    acknowledged = dict.fromkeys(EPOCHS, 0)
    sent = dict.fromkeys(EPOCHS, 0)
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            at = dict(acknowledged)
            for _ in range(rng.randrange(20, 60)):
                epoch = rng.choice(EPOCHS)
                last = at[epoch] + rng.randrange(1, 40)
                writer.stdin.write(f"{epoch} {at[epoch] + 1} {last}\n")
                at[epoch] = last
                sent[epoch] = max(sent[epoch], last)
            writer.stdin.flush()
            for _ in range(rng.randrange(1, 20)):
                epoch, mark = map(int, writer.stdout.readline().split())
                acknowledged[epoch] = mark
            writer.kill()
    store = AuditStore(tmp_path, Limits())
    store.open()
    try:
        found = [json.loads(record) for _, record in query.newest(store, Filter(), 10**6)]
        segments = store.segments()
        damaged = store.counters["segments_damaged"] + store.counters["tails_damaged"]
    finally:
        store.close()
    assert len(segments) > 3
    assert damaged == 0
    for epoch in EPOCHS:
        sequences = [record["sequence"] for record in found if record["epoch"] == epoch]
        assert sequences == list(range(1, len(sequences) + 1))
        assert acknowledged[epoch] <= len(sequences) <= sent[epoch]
        assert acknowledged[epoch] > 0
