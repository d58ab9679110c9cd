"""Settings of the registry: the `registry` section of the settings file."""

from __future__ import annotations

from falkirk.runtime.settings import Section


class Settings(Section, frozen=True, kw_only=True):
    """How much the registry keeps and serves."""

    history_bytes: int = 64 << 20
    """Bytes of past transactions that watches can resume from; the newest one is always kept."""
    max_watches: int = 256
    """Watches open at once; further ones are refused with RESOURCE_EXHAUSTED."""

    def __post_init__(self) -> None:
        if self.history_bytes < 0:
            raise ValueError("history_bytes must not be negative")
        if self.max_watches < 1:
            raise ValueError("max_watches must be at least 1")
