"""Settings of the registry: the `registry` section of the settings file."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from falkirk.runtime.oidc import check_url
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


class OidcIssuer(Section, frozen=True, kw_only=True):
    """An issuer whose users may enrol devices in a tenant."""

    issuer: str
    """Its URL, exactly as its tokens say it (`iss`); https, or http on a loopback address."""
    audience: str
    """The client id that tokens must be for (`aud`)."""
    tenant: str
    """The tenant that its users belong to, by name. An issuer of several tenants has several entries."""
    name_claim: str = "preferred_username"
    """The claim that a new user's name is made of; what is before an @ counts."""
    groups_claim: str = ""
    """The claim that holds groups; the issuer then owns the groups of its users: each sign-in replaces them. Empty: it has no say in groups."""
    required_groups: tuple[str, ...] = ()
    """Only who is in one of them may sign in; empty: everyone whom the issuer signs in."""
    administrator_groups: tuple[str, ...] = ()
    """Who is in one of them administers the tenant over TCP (`falkirk login --oidc-token-file`)."""
    auditor_groups: tuple[str, ...] = ()
    """Who is in one of them, and in none of the former, may read everything of the tenant over TCP."""
    needs_approval: bool = False
    """Whether devices wait for an administrator's approval."""
    device_lifetime_s: int = 0
    """How long a device may connect after each sign-in, in seconds; 0 sets no end."""
    jwks_url: str = ""
    """Where its keys are; empty: found by OpenID Connect Discovery."""

    def __post_init__(self) -> None:
        check_url(self.issuer)
        if self.jwks_url:
            check_url(self.jwks_url)
        if not self.audience or not self.tenant:
            raise ValueError("audience and tenant must not be empty")
        if (self.required_groups or self.administrator_groups or self.auditor_groups) and not self.groups_claim:
            raise ValueError("required_groups, administrator_groups and auditor_groups need groups_claim")
        if not 0 <= self.device_lifetime_s <= 10 * 366 * 86400:
            raise ValueError("device_lifetime_s must lie between 0 and 316224000")


class Settings(Section, frozen=True, kw_only=True):
    """How much the registry keeps and serves."""

    history_bytes: int = 64 << 20
    """Bytes of past transactions that watches can resume from; the newest one is always kept."""
    max_watches: int = 256
    """Watches open at once; further ones are refused with RESOURCE_EXHAUSTED."""
    authority: AuthoritySettings = AuthoritySettings()
    """Certificates."""
    oidc: tuple[OidcIssuer, ...] = ()
    """Issuers whose users may enrol devices."""
    node_addresses: tuple[str, ...] = ("192.0.0.8", "fd66:616c:6b69:726b::1")
    """Addresses that nodes speak from themselves (`flow.icmp_source4` and `icmp_source6`, whose defaults these are): devices are told to take them from the tunnel,
    so that ICMP errors, among them those of path MTU discovery, and `falkirk connect` reach them."""

    def __post_init__(self) -> None:
        if self.history_bytes < 0:
            raise ValueError("history_bytes must not be negative")
        for address in self.node_addresses:
            ip_address(address)
        if self.max_watches < 1:
            raise ValueError("max_watches must be at least 1")
