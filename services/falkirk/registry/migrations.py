"""The store's schema, as numbered steps that only go forward. PURE.

Step n brings a store from version n - 1 to n (`PRAGMA user_version`), each in its own transaction. A step that has
been released is never edited; a store of a newer version than this program knows is refused.
"""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # epoch (text) and revision (integer) of the store.
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
        # body is the resource's message as it is sent; tenant is its tenant's name ('' for tenants), kept with it for ordered pages.
        """CREATE TABLE resource (
            id TEXT PRIMARY KEY, kind INTEGER NOT NULL, tenant_id TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL
        )""",
        "CREATE UNIQUE INDEX resource_name ON resource (kind, tenant, name)",
        "CREATE INDEX resource_tenant ON resource (tenant_id, kind)",
        # References by id; bodies show the names of the moment.
        "CREATE TABLE reference (source TEXT NOT NULL, field TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (source, field)) WITHOUT ROWID",
        "CREATE INDEX reference_target ON reference (target)",
        # What one resource at a time may hold: a prefix in a virtual network, an address in a tenant.
        "CREATE TABLE claim (scope TEXT NOT NULL, key TEXT NOT NULL, holder TEXT NOT NULL, PRIMARY KEY (scope, key)) WITHOUT ROWID",
        "CREATE INDEX claim_holder ON claim (holder)",
        # The last index that was handed out of a tenant's pool.
        "CREATE TABLE pool (tenant_id TEXT NOT NULL, version INTEGER NOT NULL, cursor INTEGER NOT NULL, PRIMARY KEY (tenant_id, version)) WITHOUT ROWID",
        # The history that watches resume from. body is NULL for a removal.
        "CREATE TABLE past (revision INTEGER PRIMARY KEY, size INTEGER NOT NULL, time_ns INTEGER NOT NULL)",
        """CREATE TABLE change (
            revision INTEGER NOT NULL, position INTEGER NOT NULL, kind INTEGER NOT NULL, id TEXT NOT NULL, tenant_id TEXT NOT NULL, body BLOB,
            PRIMARY KEY (revision, position)
        )""",
    ),
    (
        # Enrolment tokens: hash is the SHA-256 of the secret, body the DeviceToken, user_id '' where it has no user, ended_ns when it ends or was used up.
        """CREATE TABLE enrolment_token (
            id TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, tenant_id TEXT NOT NULL, user_id TEXT NOT NULL, ended_ns INTEGER NOT NULL, body BLOB NOT NULL
        )""",
        "CREATE INDEX enrolment_token_tenant ON enrolment_token (tenant_id)",
        # By which token a device enrolled.
        "CREATE TABLE enrolled (device_id TEXT PRIMARY KEY, token_id TEXT NOT NULL) WITHOUT ROWID",
        # The time of the last proof of a device that was accepted: none is accepted twice.
        "CREATE TABLE proved (device_id TEXT PRIMARY KEY, time_ns INTEGER NOT NULL) WITHOUT ROWID",
        # Whom an OIDC issuer's subject is.
        "CREATE TABLE subject (tenant_id TEXT NOT NULL, issuer TEXT NOT NULL, subject TEXT NOT NULL, user_id TEXT NOT NULL, PRIMARY KEY (tenant_id, issuer, subject)) WITHOUT ROWID",
        "CREATE INDEX subject_user ON subject (user_id)",
    ),
    (
        # The mesh's roots: certificates as PEM; sealed is the private key (falkirk.registry.sealing), NULL once a newer root signs.
        # crossed is this root's certificate made by the one before it, '' for the first.
        """CREATE TABLE authority_root (
            number INTEGER PRIMARY KEY, certificate TEXT NOT NULL, crossed TEXT NOT NULL, sealed BLOB, create_ns INTEGER NOT NULL, retire_ns INTEGER
        )""",
        # Who may hold certificates. tenant_id '' is the whole mesh; user_id is an owner's user, whose name is the one that counts.
        """CREATE TABLE principal (
            id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, user_id TEXT NOT NULL,
            create_ns INTEGER NOT NULL, login_ns INTEGER, revoke_ns INTEGER
        )""",
        "CREATE UNIQUE INDEX principal_name ON principal (tenant_id, name) WHERE revoke_ns IS NULL",
        # Login tokens that weren't used: SHA-256 of the secret only.
        "CREATE TABLE login (digest BLOB PRIMARY KEY, principal TEXT NOT NULL, end_ns INTEGER NOT NULL) WITHOUT ROWID",
    ),
    (
        # 1: by an OIDC sign-in; each certificate takes another one.
        "ALTER TABLE principal ADD COLUMN signed_in INTEGER NOT NULL DEFAULT 0",
    ),
)

SCHEMA = len(MIGRATIONS)
"""The version that this program writes."""
