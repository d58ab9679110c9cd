"""The kinds of resources as one table: message, references, what must be unique, and how a value is judged.

The engine knows nothing of a single kind; whatever differs stands here as a row of `KINDS` and a function without
I/O. `judge` brings a message to its canonical form in place and raises `Refused` with the field's path where it
can't. What needs the store (addresses from a pool, the default virtual network) is in `defaults`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from falkirk.api.net.v1 import net_pb2
from falkirk.api.registry.v1 import registry_service_pb2 as registry_pb2
from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.api.registry.v1.node_service_pb2 import Node
from falkirk.api.registry.v1.policy_document_service_pb2 import RULE_ACTION_ALLOW, RULE_ACTION_DENY, Policy
from falkirk.api.registry.v1.route_service_pb2 import Route
from falkirk.api.registry.v1.tenant_service_pb2 import Tenant
from falkirk.api.registry.v1.user_service_pb2 import User
from falkirk.api.registry.v1.virtual_network_service_pb2 import VirtualNetwork
from falkirk.api.registry.v1.zone_service_pb2 import Zone, ZoneRecordType
from falkirk.decide import resolver
from falkirk.decide import rules as decide_rules
from falkirk.registry import fields
from falkirk.registry.refusal import Reason, Refused

Value = Tenant | User | Device | VirtualNetwork | Route | Policy | Node | Zone
"""A resource of any kind, as it is stored and sent."""

RULES = 10_000
"""Most rules of one policy."""
EXPRESSION = 8192
"""Most characters of a rule's expression."""

ZONE_RECORDS = 1000
"""Most records of one zone."""
ZONE_FORWARDERS = 4
"""Most resolvers that a zone is forwarded to."""
_ZONE_TTL_S = 604_800

_BUILT_TARGETS = frozenset({"internet", "device", "blackhole"})
_BUILT_TREATMENTS = frozenset({net_pb2.TREATMENT_UNSPECIFIED, net_pb2.TREATMENT_L3, net_pb2.TREATMENT_L4})
_DIAL_LIMIT_MS = 600_000


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that one resource at a time may hold within a scope, beside its name."""

    scope: str
    key: str
    taken: Reason
    message: str
    about: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reference:
    """A field that names another resource of the same tenant; inside a message it is a path with dots, as a field in errors is."""

    field: str
    kind: str

    def given(self, value: Value) -> str:
        """What the field says; empty where it, or a message around it, isn't set."""
        return str(self._at(value)[1])

    def show(self, value: Value, name: str) -> None:
        """Set a field that is set."""
        message, _ = self._at(value)
        setattr(message, self.field.rpartition(".")[2], name)

    def _at(self, value: Value) -> tuple[object, object]:
        """The message around the field, and the field. Reading makes no message that isn't there."""
        message: object = value
        *path, last = self.field.split(".")
        for part in path:
            message = getattr(message, part)
        return message, getattr(message, last)


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table."""

    number: int
    """As in falkirk.api.registry.v1.Kind."""
    name: str
    """The field in messages and requests: `virtual_network`."""
    plural: str
    """The field of lists: `virtual_networks`."""
    service: str
    """The full name of its service."""
    message: type[Value]
    judge: Callable[[Value], None]
    references: tuple[Reference, ...] = ()
    claims: Callable[[Value, Mapping[str, str]], list[Claim]] | None = None
    """What a value holds beside its name; the second argument gives ids of references by field."""

    @property
    def scoped(self) -> bool:
        """Whether it lives in a tenant."""
        return self.number not in (registry_pb2.KIND_TENANT, registry_pb2.KIND_NODE)

    @property
    def holds_others(self) -> bool:
        """Whether others live in it."""
        return self.number == registry_pb2.KIND_TENANT

    @property
    def label(self) -> str:
        """For people."""
        return self.name.replace("_", " ")


def judge_metadata(kind: Kind, value: Value) -> None:
    """What all kinds share: a legal name and labels, no tenant on a tenant."""
    fields.label(value.metadata.name, "metadata.name")
    fields.pairs(value.metadata.labels, "metadata.labels")
    if not kind.scoped:
        fields.empty(value.metadata.tenant, "metadata.tenant")


def _judge_tenant(value: Value) -> None:
    assert isinstance(value, Tenant)
    fields.text(value.display_name, "display_name", 200)
    if value.device_pool4:
        value.device_pool4 = fields.pool4(value.device_pool4, "device_pool4")
    if value.device_pool6:
        value.device_pool6 = fields.pool6(value.device_pool6, "device_pool6")


def _judge_user(value: Value) -> None:
    assert isinstance(value, User)
    fields.email(value.email, "email")
    value.groups[:] = fields.words(value.groups, "groups")


def _judge_device(value: Value) -> None:
    assert isinstance(value, Device)
    value.groups[:] = fields.words(value.groups, "groups")
    fields.pairs(value.posture, "posture")
    value.public_key = fields.public_key(value.public_key, "public_key")
    if value.HasField("expire_time"):
        fields.instant(value.expire_time.seconds, value.expire_time.nanos, "expire_time")
    found: dict[int, str] = {}
    for position, text in enumerate(value.addresses):
        place = f"addresses[{position}]"
        canonical = fields.address(text, place)
        version = ip_address(canonical).version
        if version in found:
            raise Refused(Reason.INVALID_FIELD, f"{place}: a device has at most one IPv{version} address", field=place)
        found[version] = canonical
    value.addresses[:] = [found[version] for version in sorted(found)]


def _device_claims(value: Value, references: Mapping[str, str]) -> list[Claim]:
    assert isinstance(value, Device)
    return _key_claims(value.public_key) + [
        Claim(
            f"address:{value.metadata.tenant_id}",
            text,
            Reason.ADDRESS_TAKEN,
            f"another device of tenant {value.metadata.tenant} has the address {text}",
            {"field": f"addresses[{position}]", "address": text},
        )
        for position, text in enumerate(value.addresses)
    ]


def _key_claims(public_key: str) -> list[Claim]:
    """One holder in the mesh, device or node: a key that two have would be told apart by nothing."""
    message = "another device or node has this public key"
    return [Claim("key", public_key, Reason.KEY_TAKEN, message, {"field": "public_key"})] * bool(public_key)


def _judge_virtual_network(value: Value) -> None:
    assert isinstance(value, VirtualNetwork)
    fields.text(value.comment, "comment")


def _virtual_network_claims(value: Value, references: Mapping[str, str]) -> list[Claim]:
    assert isinstance(value, VirtualNetwork)
    if not value.is_default:
        return []
    scope = default_scope(value.metadata.tenant_id)
    return [Claim(scope, "", Reason.IS_DEFAULT, "the tenant has two default virtual networks", {"field": "is_default"})]


def default_scope(tenant_id: str) -> str:
    """The scope of the one claim that a tenant's default virtual network holds."""
    return f"default:{tenant_id}"


def _judge_route(value: Value) -> None:
    assert isinstance(value, Route)
    value.prefix = fields.prefix(value.prefix, "prefix")
    fields.text(value.comment, "comment")
    target = value.target.WhichOneof("target")
    if target is None:
        raise Refused(Reason.INVALID_FIELD, "target: a route needs one, such as internet or blackhole", field="target")
    if target not in _BUILT_TARGETS:
        raise Refused(
            Reason.TARGET_NOT_BUILT,
            f"target.{target}: this version leads packets to {', '.join(sorted(_BUILT_TARGETS))} only",
            field=f"target.{target}",
        )
    if target == "device" and not value.target.device.device:
        where = "target.device.device"
        raise Refused(Reason.INVALID_FIELD, f"{where}: names the device that packets go to", field=where)
    if target == "internet":
        internet = value.target.internet
        if internet.egress_address4:
            internet.egress_address4 = fields.address(internet.egress_address4, "target.internet.egress_address4", 4)
        if internet.egress_address6:
            internet.egress_address6 = fields.address(internet.egress_address6, "target.internet.egress_address6", 6)
        fields.at_most(internet.connect_timeout_ms, "target.internet.connect_timeout_ms", _DIAL_LIMIT_MS)


def _route_claims(value: Value, references: Mapping[str, str]) -> list[Claim]:
    assert isinstance(value, Route)
    return [
        Claim(
            f"prefix:{references['virtual_network']}",
            value.prefix,
            Reason.PREFIX_TAKEN,
            f"virtual network {value.virtual_network} already has a route for exactly {value.prefix}",
            # The number that operators know from the reference.
            {"field": "prefix", "code": "1014", "prefix": value.prefix},
        )
    ]


def _judge_policy(value: Value) -> None:
    assert isinstance(value, Policy)
    fields.text(value.comment, "comment")
    fields.at_most(len(value.rules), "rules", RULES)
    seen: dict[str, int] = {}
    for position, rule in enumerate(value.rules):
        place = f"rules[{position}]"
        fields.label(rule.name, f"{place}.name")
        if rule.name in seen:
            raise Refused(
                Reason.INVALID_FIELD,
                f"{place}.name: rules[{seen[rule.name]}] is called {rule.name} too",
                field=f"{place}.name",
            )
        seen[rule.name] = position
        if not rule.when.strip() or len(rule.when) > EXPRESSION:
            raise Refused(
                Reason.INVALID_FIELD,
                f"{place}.when: needs an expression of at most {EXPRESSION} characters",
                field=f"{place}.when",
            )
        if rule.action not in (RULE_ACTION_ALLOW, RULE_ACTION_DENY):
            raise Refused(Reason.INVALID_FIELD, f"{place}.action: must be allow or deny", field=f"{place}.action")
        if rule.treatment not in _BUILT_TREATMENTS:
            raise Refused(
                Reason.TREATMENT_NOT_BUILT,
                f"{place}.treatment: this version lifts to l4 only",
                field=f"{place}.treatment",
            )
    for error in decide_rules.check([decide_rules.RuleSource(rule.name, rule.when) for rule in value.rules]):
        raise Refused(
            Reason.RULE_INVALID,
            f"rule {error.rule}, line {error.line}, column {error.column}: {error.message}",
            field=f"rules[{seen[error.rule]}].when",
            rule=error.rule,
            line=str(error.line),
            column=str(error.column),
        )


def _judge_node(value: Value) -> None:
    assert isinstance(value, Node)
    value.public_key = fields.public_key(value.public_key, "public_key")
    value.endpoints[:] = fields.endpoints(value.endpoints, "endpoints")
    if value.mtu and not 1280 <= value.mtu <= 65535:
        raise Refused(Reason.INVALID_FIELD, f"mtu: {value.mtu} doesn't lie between 1280 and 65535", field="mtu")
    fields.text(value.version, "version", fields.WORD)


def _node_claims(value: Value, references: Mapping[str, str]) -> list[Claim]:
    assert isinstance(value, Node)
    return _key_claims(value.public_key)


def _judge_zone(value: Value) -> None:
    assert isinstance(value, Zone)
    value.domain = fields.domain(value.domain, "domain")
    if value.domain == resolver.DOMAIN or value.domain.endswith(f".{resolver.DOMAIN}"):
        raise Refused(
            Reason.INVALID_FIELD,
            f"domain: names below {resolver.DOMAIN} are those of devices; choose another domain",
            field="domain",
        )
    fields.text(value.comment, "comment")
    fields.at_most(len(value.records), "records", ZONE_RECORDS)
    fields.at_most(len(value.forward_to), "forward_to", ZONE_FORWARDERS)
    if value.records and value.forward_to:
        raise Refused(
            Reason.INVALID_FIELD, "forward_to: a zone that is forwarded has no records of its own", field="forward_to"
        )
    value.forward_to[:] = [
        fields.endpoint(text, f"forward_to[{position}]") for position, text in enumerate(value.forward_to)
    ]
    _judge_zone_records(value)


def _judge_zone_records(zone: Zone) -> None:
    aliases: dict[str, bool] = {}
    for position, record in enumerate(zone.records):
        place = f"records[{position}]"
        full = zone.domain if record.name == "@" else f"{record.name}.{zone.domain}"
        full = fields.domain(full, f"{place}.name")
        record.name = full.removesuffix(zone.domain).removesuffix(".") or "@"
        if not record.type:
            raise Refused(Reason.INVALID_FIELD, f"{place}.type: must be given", field=f"{place}.type")
        kind = ZoneRecordType.Name(record.type).removeprefix("ZONE_RECORD_TYPE_")
        record.value = fields.zone_record(kind, record.value, f"{place}.value")
        fields.at_most(record.ttl_s, f"{place}.ttl_s", _ZONE_TTL_S)
        # RFC 1034 section 3.6.2.
        if aliases.setdefault(full, kind == "CNAME") != (kind == "CNAME") or (
            kind == "CNAME" and any(other.name == record.name for other in zone.records[:position])
        ):
            raise Refused(
                Reason.INVALID_FIELD,
                f"{place}: {full} is an alias (CNAME), and nothing else may stand beside one",
                field=place,
            )


def _zone_claims(value: Value, references: Mapping[str, str]) -> list[Claim]:
    assert isinstance(value, Zone)
    return [
        Claim(
            f"zone:{references['virtual_network']}",
            value.domain,
            Reason.NAME_TAKEN,
            f"virtual network {value.virtual_network} already has a zone for {value.domain}",
            {"field": "domain", "domain": value.domain},
        )
    ]


_PACKAGE = "falkirk.api.registry.v1."

KINDS: tuple[Kind, ...] = (
    Kind(registry_pb2.KIND_TENANT, "tenant", "tenants", f"{_PACKAGE}TenantService", Tenant, _judge_tenant),
    Kind(
        registry_pb2.KIND_VIRTUAL_NETWORK,
        "virtual_network",
        "virtual_networks",
        f"{_PACKAGE}VirtualNetworkService",
        VirtualNetwork,
        _judge_virtual_network,
        claims=_virtual_network_claims,
    ),
    Kind(registry_pb2.KIND_USER, "user", "users", f"{_PACKAGE}UserService", User, _judge_user),
    Kind(
        registry_pb2.KIND_DEVICE,
        "device",
        "devices",
        f"{_PACKAGE}DeviceService",
        Device,
        _judge_device,
        (Reference("user", "user"), Reference("virtual_network", "virtual_network")),
        _device_claims,
    ),
    Kind(
        registry_pb2.KIND_ROUTE,
        "route",
        "routes",
        f"{_PACKAGE}RouteService",
        Route,
        _judge_route,
        (Reference("virtual_network", "virtual_network"), Reference("target.device.device", "device")),
        _route_claims,
    ),
    Kind(registry_pb2.KIND_POLICY, "policy", "policies", f"{_PACKAGE}PolicyService", Policy, _judge_policy),
    Kind(registry_pb2.KIND_NODE, "node", "nodes", f"{_PACKAGE}NodeService", Node, _judge_node, claims=_node_claims),
    Kind(
        registry_pb2.KIND_ZONE,
        "zone",
        "zones",
        f"{_PACKAGE}ZoneService",
        Zone,
        _judge_zone,
        (Reference("virtual_network", "virtual_network"),),
        _zone_claims,
    ),
)
"""All kinds, in the order in which one transaction writes them: whatever is referred to comes before what refers to it."""

BY_NAME: Mapping[str, Kind] = {kind.name: kind for kind in KINDS}
BY_NUMBER: Mapping[int, Kind] = {kind.number: kind for kind in KINDS}


def unwrap(resource: registry_pb2.Resource) -> tuple[Kind, Value]:
    """The kind and value in a `Resource`. Raises `Refused` where none is set."""
    name = resource.WhichOneof("resource")
    if name is None:
        raise Refused(Reason.INVALID_FIELD, "resource: none is set", field="resource")
    value: Value = getattr(resource, name)
    return BY_NAME[name], value


def wrap(kind: Kind, body: bytes) -> registry_pb2.Resource:
    """A `Resource` of a stored body."""
    resource = registry_pb2.Resource()
    getattr(resource, kind.name).ParseFromString(body)
    return resource


def parse(kind: Kind, body: bytes) -> Value:
    """A stored body as its message."""
    value = kind.message()
    value.ParseFromString(body)
    return value


def serialise(value: Value) -> bytes:
    """The bytes to store: the same for equal values, so that bodies can be compared."""
    return value.SerializeToString(deterministic=True)
