"""JSON lines on stderr, for processes that must start fast.

Packet workers and helpers import this and nothing heavier (structlog, gRPC and OpenTelemetry stay in the parents; see
`falkirk.runtime.telemetry`). Both write the same fields: `ts` (RFC 3339, UTC, microseconds), `level`, `service`, `event` in snake_case,
then whatever the event has. Secrets (keys, tokens, payload) never are fields. One line is one write(2), so lines of several processes
on one stderr don't mix up to PIPE_BUF (4096 bytes).
"""

from __future__ import annotations

import os
import time
from typing import Any, Final

import msgspec

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_encoder: Final = msgspec.json.Encoder(enc_hook=str)


def timestamp(nanoseconds: int) -> str:
    """Wall-clock nanoseconds as RFC 3339 in UTC with microseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"


def line(format: str, fields: dict[str, Any]) -> bytes:
    """One line, "json" or "text", with its newline."""
    if format == "json":
        return _encoder.encode(fields) + b"\n"
    head = (fields["ts"][11:23], fields["level"], fields["service"], fields["event"])
    rest = (f"{key}={value}" for key, value in fields.items() if key not in {"ts", "level", "service", "event"})
    return (" ".join((*head, *rest)) + "\n").encode(errors="backslashreplace")


class Log:
    """Writes lines of one process; `level` and `format` as in LogSettings."""

    def __init__(self, service: str, level: str = "info", format: str = "json", fd: int = 2) -> None:
        self._service, self._format, self._fd = service, format, fd
        self._threshold = LEVELS[level]

    def debug(self, event: str, **fields: object) -> None:
        """For whoever looks for a fault."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Something worth knowing happened."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something went wrong and was coped with."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Something went wrong and someone must look."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        if LEVELS[level] < self._threshold:
            return
        head = {"ts": timestamp(time.time_ns()), "level": level, "service": self._service, "event": event}
        try:
            os.write(self._fd, line(self._format, head | fields))
        except OSError:
            return  # a closed or full stderr must not end a packet worker
