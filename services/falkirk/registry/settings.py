"""Settings of the registry: the `registry` section of the settings file."""

from __future__ import annotations

from pathlib import Path

from falkirk.runtime.settings import Section


class AuthoritySettings(Section, frozen=True, kw_only=True):
    """The mesh's certificate authority."""

    key_file: Path | None = None
    """Holds the key under which the authority's private keys are stored, in hexadecimal, 0600. Not set: `<data_dir>/registry/authority.key`, made at the first start; keep it apart from backups of the store."""
    passphrase_file: Path | None = None
    """Holds a passphrase that is used instead, at least 12 bytes, 0600."""
    root_days: int = 365
    """Days after which the next root is made, 1 to 3650."""
    node_hours: int = 24
    """Life of a node's certificate, in hours, 1 to 720; it is renewed after two thirds."""
    principal_hours: int = 12
    """The same for administrators, auditors, owners and connectors, 1 to 720. Who doesn't renew within it must log in again."""

    def __post_init__(self) -> None:
        for name, most in (("root_days", 3650), ("node_hours", 720), ("principal_hours", 720)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between 1 and {most}")


class Settings(Section, frozen=True, kw_only=True):
    """How much the registry keeps and serves."""

    history_bytes: int = 64 << 20
    """Bytes of past transactions that watches can resume from; the newest one is always kept."""
    max_watches: int = 256
    """Watches open at once; further ones are refused with RESOURCE_EXHAUSTED."""
    authority: AuthoritySettings = AuthoritySettings()
    """Certificates."""

    def __post_init__(self) -> None:
        if self.history_bytes < 0:
            raise ValueError("history_bytes must not be negative")
        if self.max_watches < 1:
            raise ValueError("max_watches must be at least 1")
