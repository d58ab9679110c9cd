"""Settings of the router."""

from __future__ import annotations

from falkirk.decide.routes import DEFAULT_CONNECT_TIMEOUT_MS
from falkirk.runtime.settings import Section


class Settings(Section, frozen=True, kw_only=True):
    """Section `router`."""

    connect_timeout_ms: int = DEFAULT_CONNECT_TIMEOUT_MS
    """How long a dial may take where its route doesn't say, in milliseconds."""

    def __post_init__(self) -> None:
        if not 1 <= self.connect_timeout_ms <= 3_600_000:
            raise ValueError("connect_timeout_ms must lie between 1 and 3600000")
