"""Which trace this task works for: W3C Trace Context in, W3C Trace Context out.

The server sets the current span for the length of a call, the client injects it into the calls made meanwhile; both work whether or not
this process exports spans, so a trace isn't cut by a service without telemetry. `tracestate` isn't carried.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final, NamedTuple

HEADER: Final = "traceparent"
# W3C Trace Context §3.2.2: version 00 is exactly this; a higher version may go on after another dash, ff is invalid.
_TRACEPARENT: Final = re.compile(r"^(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$")


class SpanContext(NamedTuple):
    """A span as others may refer to it."""

    trace_id: bytes
    """16 bytes; a flow's id where the trace is a flow's."""
    span_id: bytes
    """8 bytes."""
    sampled: bool
    """True where the trace is recorded."""


current: ContextVar[SpanContext | None] = ContextVar("falkirk_span", default=None)
"""The span that the running task works for."""


def parse(value: str) -> SpanContext | None:
    """A traceparent header's span; None where it is malformed (§3.2.2.3-4: all-zero ids are invalid), to be ignored."""
    match = _TRACEPARENT.match(value)
    if match is None or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = bytes.fromhex(match[2]), bytes.fromhex(match[3])
    if not any(trace_id) or not any(span_id):
        return None
    return SpanContext(trace_id, span_id, bool(int(match[4], 16) & 1))


def render(span: SpanContext) -> str:
    """The traceparent header of a span."""
    return f"00-{span.trace_id.hex()}-{span.span_id.hex()}-{'01' if span.sampled else '00'}"
