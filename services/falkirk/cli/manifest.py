"""Resources as YAML documents, and where in them each field stands.

A document is `apiVersion`, `kind`, `metadata` {name, tenant, labels} and `spec`, whose keys are the fields of the
resource's proto message in lowerCamelCase. Keys that aren't there, keys given twice and values of the wrong type are
refused with file, line and field; nothing is guessed: a number where text belongs must be quoted. Enum values are
written short (`allow`, `l4`). A message of no fields may be written as nothing (`blackhole:`).

The other way round, `render` makes the document that would produce a resource. Limit: anchors may be used, merge keys
(`<<`) not.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from falkirk.api.registry.v1.registry_service_pb2 import Resource

API_VERSION = "falkirk.dev/v1alpha1"
KINDS = {
    "Tenant": "tenant",
    "User": "user",
    "Device": "device",
    "VirtualNetwork": "virtual_network",
    "Route": "route",
    "Policy": "policy",
    "Node": "node",
    "Zone": "zone",
}
"""Kinds of documents, and their field in `Resource`."""

_METADATA = ("name", "tenant", "labels")
_TIME = "google.protobuf.Timestamp"
_TAG = "tag:yaml.org,2002:"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAXIMA = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class ManifestError(Exception):
    """A document is wrong; the message starts with file:line."""


@dataclass(frozen=True, slots=True)
class Document:
    """A resource and the YAML that it came from."""

    resource: Resource
    source: str
    """The file's name as given; `-` is standard input."""
    root: yaml.MappingNode

    @property
    def kind(self) -> str:
        """The field in `Resource` that is set."""
        return self.resource.WhichOneof("resource") or ""

    @property
    def value(self) -> Any:
        """The resource's own message."""
        return getattr(self.resource, self.kind)

    def locate(self, field: str) -> str:
        """`file:line: key` of a field as the registry names it (`rules[3].when`, `metadata.name`), of the closest one that is written."""
        head = "" if field.startswith("metadata") else "spec."
        node: yaml.Node = self.root
        line = node.start_mark.line
        for part in re.findall(r"[^.\[\]]+", head + field):
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == _camel(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = node.start_mark.line
            else:
                break
        return f"{self.source}:{line + 1}"


def read(paths: list[Path]) -> list[Document]:
    """All documents of files, of standard input (`-`) and of the *.yaml and *.yml in directories. Raises `ManifestError`."""
    return [document for path in paths for source, text in _texts(path) for document in _parse(source, text)]


def parse(source: str, text: str) -> list[Document]:
    """All documents of a text. Raises `ManifestError`."""
    return list(_parse(source, text))


def render(value: Message) -> str:
    """The document that would produce a resource: what the registry alone sets is left out, but for a comment."""
    kind = type(value).DESCRIPTOR.name
    metadata = value.metadata  # type: ignore[attr-defined]
    head: dict[str, Any] = {"name": metadata.name}
    if metadata.tenant:
        head["tenant"] = metadata.tenant
    if metadata.labels:
        head["labels"] = dict(sorted(metadata.labels.items()))
    spec = {name: shown for name, shown in _plain(value).items() if name != "metadata"}
    document = {"apiVersion": API_VERSION, "kind": kind, "metadata": head, "spec": spec}
    comment = f"# id: {metadata.id}\n# revision: {metadata.revision}\n"
    return comment + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    if str(path) == "-":
        yield "-", sys.stdin.read()
        return
    try:
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix in (".yaml", ".yml"))
            if not inside:
                raise ManifestError(f"{path}: holds no *.yaml")
        else:
            inside = [path]
        for file in inside:
            yield str(file), file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "isn't UTF-8"
        raise ManifestError(f"{path}: {reason}") from error


def _parse(source: str, text: str) -> Iterator[Document]:
    try:
        for root in yaml.compose_all(text, Loader=_Loader):
            if not _is_null(root):
                yield _document(source, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ManifestError(f"{source}:{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{source}: {error}") from error


def _document(source: str, root: yaml.Node) -> Document:
    pairs = _mapping(source, root, "document")
    _known(source, pairs, "", ("apiVersion", "kind", "metadata", "spec"))
    for key, allowed in (("apiVersion", [API_VERSION]), ("kind", list(KINDS))):
        if key not in pairs:
            raise _wrong(source, root, key, "is missing")
        node = pairs[key][1]
        if not isinstance(node, yaml.ScalarNode) or node.value not in allowed:
            raise _wrong(source, node, key, f"must be {' or '.join(allowed)}")
    resource = Resource()
    value = getattr(resource, KINDS[pairs["kind"][1].value])
    value.SetInParent()
    if "metadata" not in pairs:
        raise _wrong(source, root, "metadata", "is missing")
    metadata = _mapping(source, pairs["metadata"][1], "metadata")
    _known(source, metadata, "metadata.", _METADATA)
    _message(source, pairs["metadata"][1], value.metadata, "metadata")
    if "spec" in pairs and not _is_null(pairs["spec"][1]):
        spec = _mapping(source, pairs["spec"][1], "spec")
        allowed = [field.json_name for field in type(value).DESCRIPTOR.fields if field.name != "metadata"]
        _known(source, spec, "spec.", allowed)
        _message(source, pairs["spec"][1], value, "spec")
    assert isinstance(root, yaml.MappingNode)
    return Document(resource, source, root)


def _message(source: str, node: yaml.Node, message: Any, path: str) -> None:
    """Fill a message from a mapping."""
    descriptor: Descriptor = message.DESCRIPTOR
    by_name = {field.json_name: field for field in descriptor.fields}
    pairs = _mapping(source, node, path)
    _known(source, pairs, f"{path}.", list(by_name))
    chosen: dict[str, str] = {}
    for key, (key_node, inner) in pairs.items():
        field = by_name[key]
        place = f"{path}.{key}"
        if field.containing_oneof is not None:
            other = chosen.setdefault(field.containing_oneof.name, key)
            if other != key:
                raise _wrong(source, key_node, place, f"can't stand beside {other}: only one of them")
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for name, (_, item) in _mapping(source, inner, place).items():
                getattr(message, field.name)[name] = _scalar(
                    source, item, field.message_type.fields_by_name["value"], f"{place}.{name}"
                )
        elif field.is_repeated:
            if not isinstance(inner, yaml.SequenceNode):
                raise _wrong(source, inner, place, "must be a list")
            for position, item in enumerate(inner.value):
                if field.message_type is not None:
                    _message(source, item, getattr(message, field.name).add(), f"{place}[{position}]")
                else:
                    getattr(message, field.name).append(_scalar(source, item, field, f"{place}[{position}]"))
        elif field.message_type is not None and field.message_type.full_name == _TIME:
            if not isinstance(inner, yaml.ScalarNode):
                raise _wrong(source, inner, place, "must be a time such as 2027-01-31T12:00:00Z")
            try:
                getattr(message, field.name).FromJsonString(inner.value)
            except ValueError:
                raise _wrong(source, inner, place, "must be a time such as 2027-01-31T12:00:00Z") from None
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            if not _is_null(inner):
                _message(source, inner, getattr(message, field.name), place)
        else:
            setattr(message, field.name, _scalar(source, inner, field, place))


def _scalar(source: str, node: yaml.Node, field: FieldDescriptor, place: str) -> Any:
    """A value of a field's type."""
    tag, text = node.tag.removeprefix(_TAG), node.value
    if not isinstance(node, yaml.ScalarNode):
        raise _wrong(source, node, place, "must be a single value")
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if tag == "str":
            return text
        case FieldDescriptor.CPPTYPE_STRING:
            raise _wrong(source, node, place, f"must be text; quote it: '{text}'")
        case FieldDescriptor.CPPTYPE_BOOL if tag == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        case FieldDescriptor.CPPTYPE_BOOL:
            raise _wrong(source, node, place, "must be true or false")
        case FieldDescriptor.CPPTYPE_ENUM:
            names = _enum_names(field)
            # DNS types are written in capitals by everybody.
            if text.lower() not in names:
                raise _wrong(source, node, place, f"must be {' or '.join(names)}")
            return names[text.lower()]
        case cpp_type:
            low, high = _MAXIMA[cpp_type]
            if tag != "int" or not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text) or not low <= int(text) <= high:
                raise _wrong(source, node, place, f"must be a whole number from {low} to {high}")
            return int(text)


def _plain(message: Message) -> dict[str, Any]:
    """The set fields of a message, as a document shows them."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.json_name] = dict(sorted(value.items()))
        elif field.message_type is not None and field.message_type.full_name == _TIME:
            found[field.json_name] = value.ToJsonString()
        elif field.message_type is not None:
            found[field.json_name] = [_plain(item) for item in value] if field.is_repeated else _plain(value)
        elif field.enum_type is not None:
            found[field.json_name] = next(name for name, number in _enum_names(field).items() if number == value)
        else:
            found[field.json_name] = list(value) if field.is_repeated else value
    return found


def _enum_names(field: FieldDescriptor) -> dict[str, int]:
    """RULE_ACTION_ALLOW is written `allow`; the unspecified value isn't written."""
    enum = field.enum_type
    assert enum is not None
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in enum.values if value.number}


def _mapping(source: str, node: yaml.Node, place: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping by key, each once."""
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(source, node, place, "must be a mapping")
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _wrong(source, key, place, "has a key that isn't a single value")
        if key.value in found:
            raise _wrong(source, key, f"{place}.{key.value}", "is given twice")
        found[key.value] = (key, value)
    return found


def _known(source: str, pairs: dict[str, tuple[yaml.Node, yaml.Node]], prefix: str, allowed: Any) -> None:
    for key, (node, _) in pairs.items():
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(allowed)}" if allowed else ""
            raise _wrong(source, node, f"{prefix}{key}", f"unknown key{hint}")


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"


def _wrong(source: str, node: yaml.Node, place: str, what: str) -> ManifestError:
    return ManifestError(f"{source}:{node.start_mark.line + 1}: {place}: {what}")


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)
