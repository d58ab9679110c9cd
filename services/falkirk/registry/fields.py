"""What may stand in a field of a resource, and its one canonical form. PURE.

Each function takes a value and the field's path, and gives the canonical value or raises `Refused` with the path, so
that stored values need no second look. Limits keep one resource well below a megabyte: 64 entries in a list or map of
words, 1024 characters of free text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from falkirk.registry.refusal import Reason, Refused

ENTRIES = 64
"""Most entries of a list of groups, of labels and of posture."""
ENDPOINTS = 8
"""Most endpoints of a node."""
TEXT = 1024
"""Most characters of free text and of a map's value."""
WORD = 128
"""Most characters of a group and of a map's key."""

# RFC 1123 section 2.1 with RFC 1034 section 3.5: letters, digits and inner hyphens, at most 63 octets.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_DOMAIN_LABEL = re.compile(r"_?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
# RFC 9562 section 4. A name that looks like an id could be taken for one where both are allowed.
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def label(value: str, field: str) -> str:
    """A DNS label that can't be taken for an id."""
    if not _LABEL.match(value):
        raise Refused(
            Reason.INVALID_NAME,
            f"{field}: {_shown(value)} isn't a name: 1 to 63 lower-case letters, digits and inner hyphens (RFC 1123)",
            field=field,
        )
    if _UUID.match(value):
        raise Refused(Reason.INVALID_NAME, f"{field}: {value} looks like an id, names mustn't", field=field)
    return value


def text(value: str, field: str, limit: int = TEXT) -> str:
    """Free text without control characters, except line feeds and tabs."""
    if len(value) > limit:
        raise _illegal(field, f"has {len(value)} characters, at most {limit} are kept")
    if _CONTROL.search(value.replace("\n", "").replace("\t", "")):
        raise _illegal(field, "holds control characters")
    return value


def email(value: str, field: str) -> str:
    """Empty, or something with one @ and no blanks. RFC 5321 section 4.5.3.1 limits it to 254 octets."""
    if value and (len(value) > 254 or not re.match(r"[^@\s]+@[^@\s]+\Z", value) or _CONTROL.search(value)):
        raise _illegal(field, f"{_shown(value)} isn't a mail address")
    return value


def words(values: Iterable[str], field: str) -> list[str]:
    """A list of groups: each once, none empty, in the order given."""
    found: dict[str, None] = {}
    for position, value in enumerate(values):
        _word(value, f"{field}[{position}]")
        if value in found:
            raise _illegal(f"{field}[{position}]", f"{_shown(value)} stands twice")
        found[value] = None
    if len(found) > ENTRIES:
        raise _illegal(field, f"has {len(found)} entries, at most {ENTRIES} are kept")
    return list(found)


def pairs(values: Mapping[str, str], field: str) -> None:
    """Labels or posture: legal keys, short values."""
    if len(values) > ENTRIES:
        raise _illegal(field, f"has {len(values)} entries, at most {ENTRIES} are kept")
    for key, value in values.items():
        _word(key, f"{field}[{key}]")
        text(value, f"{field}[{key}]")


def address(value: str, field: str, version: int = 0) -> str:
    """A unicast address in canonical text (RFC 5952), of the version asked for where that isn't 0."""
    try:
        parsed = ip_address(value)
    except ValueError:
        raise _illegal(field, f"{_shown(value)} isn't an address") from None
    if version and parsed.version != version:
        raise _illegal(field, f"{parsed} isn't an IPv{version} address")
    if parsed.version == 6 and (parsed.scope_id or parsed.ipv4_mapped):
        # RFC 4007 section 11 (zones mean something on one link only), RFC 4291 section 2.5.5.2 (never on the wire).
        raise _illegal(field, f"{parsed} has a zone or is IPv4-mapped")
    if (
        parsed.is_multicast
        or parsed.is_unspecified
        or parsed.is_loopback
        or parsed.is_link_local
        or _class_e(parsed.version, parsed.packed)
    ):
        raise _illegal(field, f"{parsed} isn't a unicast address that packets can carry between networks (RFC 6890)")
    return str(parsed)


def prefix(value: str, field: str) -> str:
    """A prefix in canonical text; a bare address is its longest prefix. Host bits are refused, with the prefix that was probably meant."""
    try:
        parsed = ip_network(value, strict=False)
    except ValueError:
        raise _illegal(field, f"{_shown(value)} isn't a prefix such as 10.1.0.0/16 or 2001:db8::/32") from None
    if "%" in value:
        raise _illegal(field, f"{_shown(value)} has a zone (RFC 4007 section 11)")
    given = value.partition("/")[0]
    if ip_address(given) != parsed.network_address:
        raise Refused(
            Reason.HOST_BITS_SET,
            f"{field}: {_shown(value)} has bits set beyond /{parsed.prefixlen}; {parsed} is the prefix",
            field=field,
            suggestion=str(parsed),
        )
    return str(parsed)


def pool4(value: str, field: str) -> str:
    """The IPv4 prefix that device addresses come from: /8 to /29, so that at least five devices fit."""
    parsed = ip_network(prefix(value, field))
    if not isinstance(parsed, IPv4Network) or not 8 <= parsed.prefixlen <= 29:
        raise _illegal(field, f"{parsed} isn't an IPv4 prefix of /8 to /29")
    address(str(parsed.network_address + 1), field)
    return str(parsed)


def pool6(value: str, field: str) -> str:
    """The ULA /64 that device addresses come from: in fd00::/8, the locally assigned half of RFC 4193 section 3.1."""
    parsed = ip_network(prefix(value, field))
    if not isinstance(parsed, IPv6Network) or parsed.prefixlen != 64 or parsed.network_address.packed[0] != 0xFD:
        raise _illegal(field, f"{parsed} isn't a /64 of fd00::/8 (RFC 4193)")
    return str(parsed)


def domain(value: str, field: str) -> str:
    """A domain name in lower case without its last dot. Labels may begin with an underscore (RFC 8552)."""
    canonical = value.lower().removesuffix(".")
    # RFC 1035 section 2.3.4: 255 octets on the wire, which are 253 characters.
    if not canonical or len(canonical) > 253 or not all(map(_DOMAIN_LABEL.match, canonical.split("."))):
        raise _illegal(field, f"{_shown(value)} isn't a domain name")
    return canonical


def zone_record(kind: str, value: str, field: str) -> str:
    """What a record of a private zone says, `kind` being A, AAAA, CNAME, PTR, SRV or TXT."""
    if kind in ("A", "AAAA"):
        return address(value, field, 4 if kind == "A" else 6)
    if kind in ("CNAME", "PTR"):
        return domain(value, field)
    if kind == "TXT":
        return text(value, field)
    parts = value.split()
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) < 65536 for part in parts[:3]):
        raise _illegal(field, f"{_shown(value)} isn't PRIORITY WEIGHT PORT TARGET (RFC 2782)")
    # RFC 2782: a target of "." says that the service isn't there.
    target = parts[3] if parts[3] == "." else domain(parts[3], field)
    return " ".join([*(str(int(part)) for part in parts[:3]), target])


def endpoint(value: str, field: str) -> str:
    """An address, or one with a port: 10.1.0.2, 10.1.0.2:5353, [fd00::1]:5353."""
    host, port = value, ""
    if value.startswith("["):
        host, bracket, port = value[1:].partition("]")
        if not bracket or not port.startswith(":"):
            raise _illegal(field, f"{_shown(value)} isn't [ADDRESS]:PORT")
        port = port[1:]
    elif value.count(":") == 1:
        host, _, port = value.partition(":")
    canonical = address(host, field)
    if host == value:
        return canonical
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise _illegal(field, f"{_shown(port)} isn't a port")
    return f"[{canonical}]:{int(port)}" if ":" in canonical else f"{canonical}:{int(port)}"


def public_key(value: str, field: str) -> str:
    """A Curve25519 public key in canonical base64 (RFC 4648 section 4), or empty. The refusal doesn't show it: it may be a private one."""
    if not value:
        return value
    try:
        key = base64.b64decode(value, validate=True)
    except ValueError:
        key = b""
    if len(key) != 32 or base64.b64encode(key).decode() != value:
        raise _illegal(field, "isn't a public key: 32 bytes in base64, as `wg pubkey` prints it")
    if not any(key):
        # RFC 7748 section 6.1: what is agreed on with it is known to everybody.
        raise _illegal(field, "is the zero key, which anybody could speak for")
    return value


def endpoints(values: Iterable[str], field: str) -> list[str]:
    """Up to 8 places in the net, each once, in the order given: host:port or [host]:port with a name (RFC 1123) or an address."""
    found: list[str] = []
    for position, value in enumerate(values):
        place = f"{field}[{position}]"
        host, colon, port = value.rpartition(":")
        inner = host[1:-1] if host.startswith("[") and host.endswith("]") else ""
        if not colon or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
            raise _illegal(place, f"{_shown(value)} isn't host:port or [host]:port")
        if inner:
            host = f"[{_endpoint_address(inner, value, place)}]"
        elif ":" in host:
            raise _illegal(place, f"{_shown(value)} needs brackets around its IPv6 address: [{host}]:{port}")
        elif re.fullmatch(r"[0-9.]+", host):
            host = _endpoint_address(host, value, place)
        elif len(host) > 253 or not all(_LABEL.match(part) for part in host.lower().removesuffix(".").split(".")):
            raise _illegal(place, f"{_shown(value)} doesn't begin with a host's name or address")
        canonical = f"{host.lower()}:{int(port)}"
        if canonical in found:
            raise _illegal(place, f"{_shown(value)} stands twice")
        found.append(canonical)
    if len(found) > ENDPOINTS:
        raise _illegal(field, f"has {len(found)} entries, at most {ENDPOINTS} are kept")
    return found


def _endpoint_address(host: str, value: str, place: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        raise _illegal(place, f"{_shown(value)} doesn't begin with a host's name or address") from None


def instant(seconds: int, nanos: int, field: str) -> int:
    """A time as nanoseconds since 1970, within what RFC 3339 can write after that."""
    if not 0 < seconds < 253_402_300_800 or not 0 <= nanos < 1_000_000_000:
        raise _illegal(field, "isn't a time between the years 1970 and 9999")
    return seconds * 1_000_000_000 + nanos


def at_most(value: int, field: str, limit: int) -> None:
    """A number with an upper limit."""
    if value > limit:
        raise _illegal(field, f"{value} is more than {limit}")


def empty(value: object, field: str) -> None:
    """A field that the registry fills in itself."""
    if value:
        raise _illegal(field, "is given by the registry; leave it empty")


def _word(value: str, field: str) -> None:
    if not value or len(value) > WORD or _CONTROL.search(value) or value != value.strip():
        raise _illegal(field, f"must have 1 to {WORD} characters, no control characters and no blanks at its ends")


def _class_e(version: int, packed: bytes) -> bool:
    """RFC 1112 section 4 (240/4) with limited broadcast, and RFC 791's 0/8."""
    return version == 4 and (packed[0] >= 240 or packed[0] == 0)


def _illegal(field: str, what: str) -> Refused:
    return Refused(Reason.INVALID_FIELD, f"{field}: {what}", field=field)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
