"""Reasons are names of counters: short, plain, each once."""

from __future__ import annotations

import pickle
import re

from falkirk.wire.malformed import REASONS, MalformedPacket, PeerError


def test_reasons() -> None:
    assert len(set(REASONS)) == len(REASONS)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", reason) for reason in REASONS)


def test_the_error_says_its_reason() -> None:
    error = MalformedPacket("too_short")
    assert isinstance(error, PeerError)
    assert (error.reason, str(error)) == ("too_short", "too_short")
    assert pickle.loads(pickle.dumps(error)).reason == "too_short"
