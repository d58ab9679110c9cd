"""Settings of the router."""

from __future__ import annotations

from falkirk.decide.resolver import endpoint
from falkirk.decide.routes import DEFAULT_CONNECT_TIMEOUT_MS
from falkirk.runtime.settings import Section


class Settings(Section, frozen=True, kw_only=True):
    """Section `router`."""

    connect_timeout_ms: int = DEFAULT_CONNECT_TIMEOUT_MS
    """How long a dial may take where its route doesn't say, in milliseconds."""
    resolver_upstreams: tuple[str, ...] = ()
    """Addresses of the resolvers that tenants' resolvers ask for names of the world, in this order ("9.9.9.9", or with a port
    "9.9.9.9:5353"); empty takes those of /etc/resolv.conf, which is read again when it changes. At most 4."""
    resolver_timeout_ms: int = 2000
    """How long one of them, or one that a private zone is forwarded to, may take to answer before the next one is asked, in milliseconds."""
    resolver_questions: int = 2000
    """Questions that may wait for other resolvers at once; one device has at most a twentieth of them. More are refused."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("connect_timeout_ms", 1, 3_600_000),
            ("resolver_timeout_ms", 50, 10_000),
            ("resolver_questions", 20, 100_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}")
        if len(self.resolver_upstreams) > 4:
            raise ValueError("resolver_upstreams takes at most 4 addresses")
        for text in self.resolver_upstreams:
            try:
                endpoint(text)
            except ValueError as error:
                raise ValueError(f"resolver_upstreams: {error}") from error
