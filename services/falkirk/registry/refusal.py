"""Why the registry says no. PURE.

One exception carries a reason that programs can act on, a sentence for people, and what it is about; `service` maps
reasons to gRPC statuses in one table. Every `Reason` is part of the API: it may be added to, never renamed.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What is wrong, as google.rpc.ErrorInfo.reason."""

    INVALID_FIELD = "INVALID_FIELD"
    """A field's value isn't legal; metadata `field` names it."""
    INVALID_NAME = "INVALID_NAME"
    """A name isn't an RFC 1123 label, or looks like an id."""
    HOST_BITS_SET = "HOST_BITS_SET"
    """A prefix has bits beyond its length; metadata `suggestion` is the prefix without them."""
    RULE_INVALID = "RULE_INVALID"
    """A rule's expression doesn't compile; metadata `rule`, `line`, `column`."""
    DUPLICATE = "DUPLICATE"
    """One request names the same resource twice."""
    TARGET_NOT_BUILT = "TARGET_NOT_BUILT"
    """This version can't lead packets to such a target."""
    TREATMENT_NOT_BUILT = "TREATMENT_NOT_BUILT"
    """This version can't lift flows that high."""
    NOT_FOUND = "NOT_FOUND"
    """There is no such resource; metadata `kind`, `name`."""
    NAME_TAKEN = "NAME_TAKEN"
    """Another resource of the kind has the name."""
    PREFIX_TAKEN = "PREFIX_TAKEN"
    """Another route of the virtual network has the prefix; metadata `code` is 1014."""
    ADDRESS_TAKEN = "ADDRESS_TAKEN"
    """Another device of the tenant has the address."""
    KEY_TAKEN = "KEY_TAKEN"
    """Another device of the mesh has the public key."""
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"
    """The enrolment token isn't one, or was revoked."""
    TOKEN_EXPIRED = "TOKEN_EXPIRED"
    """The enrolment token has ended."""
    TOKEN_USED = "TOKEN_USED"
    """The one-time enrolment token was used by another device."""
    TOO_MANY_TOKENS = "TOO_MANY_TOKENS"
    """The tenant has as many enrolment tokens as it may."""
    PROOF_REFUSED = "PROOF_REFUSED"
    """A device's proof isn't one of its present key, or is too old, or was used before."""
    SIGN_IN_REFUSED = "SIGN_IN_REFUSED"
    """The OIDC token, or whom it is about, isn't accepted here."""
    POOL_EXHAUSTED = "POOL_EXHAUSTED"
    """The tenant's pool has no free address."""
    REVISION_CONFLICT = "REVISION_CONFLICT"
    """The resource changed since it was read; metadata `current` is its revision."""
    IN_USE = "IN_USE"
    """Other resources refer to it or live in it; metadata `left` counts them by kind."""
    IS_DEFAULT = "IS_DEFAULT"
    """A tenant's default virtual network can't be removed."""
    TRANSACTION_TOO_LARGE = "TRANSACTION_TOO_LARGE"
    """The change doesn't fit into one message of a watch."""
    REVISION_GONE = "REVISION_GONE"
    """A watch can't resume there: too old, or of another epoch. Watch again without it."""
    WATCH_TOO_SLOW = "WATCH_TOO_SLOW"
    """The watcher fell behind what the store keeps of its history. Watch again."""
    TOO_MANY_WATCHES = "TOO_MANY_WATCHES"
    """The service has as many watchers as it may have."""
    AUTHORITY_LOCKED = "AUTHORITY_LOCKED"
    """The authority's private key can't be opened with what the settings name."""
    LOGIN_REFUSED = "LOGIN_REFUSED"
    """The login token is unknown, used up or expired, or whom it is for may no longer log in."""
    NOT_FIRST = "NOT_FIRST"
    """Asked for the first principal only, and there has been one."""
    NO_CERTIFICATE = "NO_CERTIFICATE"
    """The call must come over TCP, with a client certificate."""
    NODE_FORBIDDEN = "NODE_FORBIDDEN"
    """A node asks for another node's certificate."""


class Refused(Exception):
    """The registry refuses a request; nothing was changed. `about` is where: `field`, `kind`, `name`, `index`…"""

    def __init__(self, reason: Reason, message: str, **about: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.about = about
