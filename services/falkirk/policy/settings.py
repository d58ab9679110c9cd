"""Settings of the policy service: the `policy` section of the settings file."""

from __future__ import annotations

from falkirk.policy.store import Limits
from falkirk.runtime.settings import Section


class AuditSettings(Section, frozen=True, kw_only=True):
    """How the audit log is kept."""

    segment_bytes: int = 64 << 20
    """Bytes after which a new segment begins."""
    segment_hours: int = 24
    """Hours after which a new segment begins."""
    retain_bytes: int = 4 << 30
    """Bytes of log beyond which the oldest segments are removed."""
    retain_days: int = 90
    """Days after which segments are removed."""
    flush_milliseconds: int = 20
    """How long a record may wait for others to share an fsync, 0 to 50 milliseconds."""

    def __post_init__(self) -> None:
        if self.segment_bytes < 4096 or self.retain_bytes < self.segment_bytes:
            raise ValueError("segment_bytes must be at least 4096, and retain_bytes at least segment_bytes")
        if self.segment_hours < 1 or self.retain_days < 1:
            raise ValueError("segment_hours and retain_days must be at least 1")
        if not 0 <= self.flush_milliseconds <= 50:
            raise ValueError("flush_milliseconds must lie between 0 and 50")

    def limits(self) -> Limits:
        """As the store takes them."""
        return Limits(
            segment_bytes=self.segment_bytes,
            segment_seconds=self.segment_hours * 3600,
            retain_bytes=self.retain_bytes,
            retain_seconds=self.retain_days * 86400,
            flush_milliseconds=self.flush_milliseconds,
        )


class Settings(Section, frozen=True, kw_only=True):
    """What the policy service can be told."""

    audit: AuditSettings = AuditSettings()
    """The audit log."""
