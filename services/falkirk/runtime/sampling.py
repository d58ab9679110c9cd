"""Which flows are traced. A flow's id is its trace id, so everyone who knows the id knows the answer.

As OpenTelemetry's TraceIdRatioBased: the low 64 bits of the trace id lie below ratio * 2^64. Imports nothing, so packet workers may use it.
"""

from __future__ import annotations


def bound(ratio: float) -> int:
    """The bound for `sampled`; 0 samples nothing, 2^64 everything."""
    return round(ratio * (1 << 64))


def sampled(trace_id: bytes, bound: int) -> bool:
    """True where the trace with this 16-byte id is recorded."""
    return int.from_bytes(trace_id[8:16], "big") < bound
