"""The house's own rules: what reviewers would otherwise have to look for in every change."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor

from falkirk.api.net.v1 import access_pb2

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "services"
PROTOS = ROOT / "protos" / "falkirk" / "api"
API = SOURCE / "falkirk" / "api"
SERVICES = {"onramp", "flow", "policy", "upgrader", "router", "registry"}
MAX_LINES = 600


def _modules() -> list[Path]:
    """Every module that is written by hand."""
    return sorted(path for path in (SOURCE / "falkirk").rglob("*.py") if not path.is_relative_to(API))


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _declared_pure() -> set[str]:
    """Packages and modules of the import-linter contract that forbids I/O."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["name"].startswith("PURE"))
    return set(contract["source_modules"])


def _is_pure(name: str, declared: set[str]) -> bool:
    return any(name == pure or name.startswith(f"{pure}.") for pure in declared)


def _relative(paths: Iterator[Path] | list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("folder", ["services/falkirk", "tests", "tools"])
def test_every_module_has_a_docstring(folder: str) -> None:
    paths = sorted(path for path in (ROOT / folder).rglob("*.py") if not path.is_relative_to(API))
    assert _relative(path for path in paths if not _docstring(path)) == []


@pytest.mark.parametrize("folder", ["services/falkirk", "tests", "tools"])
def test_no_module_is_over_600_lines(folder: str) -> None:
    paths = (path for path in (ROOT / folder).rglob("*.py") if not path.is_relative_to(API))
    long = [path for path in paths if len(path.read_text().splitlines()) > MAX_LINES]
    assert _relative(long) == []


def test_services_and_protos_name_the_same_set() -> None:
    assert {path.name for path in PROTOS.iterdir()} - {"net"} == SERVICES
    packages = {path.parent.name for path in (SOURCE / "falkirk").glob("*/__main__.py")} - {"cli"}
    assert packages == SERVICES


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_every_service_has_the_same_skeleton(service: str) -> None:
    skeleton = {"__init__.py", "__main__.py", "service.py", "settings.py"}
    present = {path.name for path in (SOURCE / "falkirk" / service).glob("*.py")}
    assert skeleton - present == set()


def test_pure_modules_are_declared_and_declared_ones_exist() -> None:
    """A docstring whose first line says `PURE.` is held to it by the contract in pyproject.toml."""
    declared = _declared_pure()
    names = {_name(path) for path in _modules()}
    assert declared - names == set()
    saying = {_name(path) for path in _modules() if re.search(r"\bPURE[.:]", _docstring(path).partition("\n")[0])}
    assert {name for name in saying if not _is_pure(name, declared)} == set()


def test_every_pure_module_has_a_test_file() -> None:
    """falkirk/wire/tcp.py is tested by tests/unit/wire/test_tcp.py (or test_tcp_*.py)."""
    declared = _declared_pure()
    untested = []
    for path in _modules():
        if path.name == "__init__.py" or not _is_pure(_name(path), declared):
            continue
        folder = ROOT / "tests" / "unit" / path.parent.relative_to(SOURCE / "falkirk")
        if not [*folder.glob(f"test_{path.stem}.py"), *folder.glob(f"test_{path.stem}_*.py")]:
            untested.append(path)
    assert _relative(untested) == []


def _methods() -> Iterator[MethodDescriptor]:
    for proto in sorted(PROTOS.rglob("*.proto")):
        module = ".".join(proto.relative_to(ROOT / "protos").with_suffix("").parts) + "_pb2"
        descriptor: FileDescriptor = importlib.import_module(module).DESCRIPTOR
        for service in descriptor.services_by_name.values():
            yield from service.methods


def test_every_rpc_says_who_may_call_it() -> None:
    access: Any = access_pb2.access  # protoc's .pyi calls an extension a FieldDescriptor
    levels = {method.full_name: method.GetOptions().Extensions[access] for method in _methods()}
    assert levels
    assert [name for name, level in levels.items() if level == access_pb2.ACCESS_UNSPECIFIED] == []


def test_every_rpc_has_its_own_request_and_response() -> None:
    """One pair per RPC, so that a field can be added to one call without meaning in another."""
    seen: dict[str, str] = {}
    for method in _methods():
        for message in (method.input_type.full_name, method.output_type.full_name):
            assert message not in seen, f"{method.full_name} shares {message} with {seen[message]}"
            seen[message] = method.full_name


def test_every_message_field_and_enum_value_is_commented() -> None:
    """What buf's COMMENTS rules check too; here it also holds where buf isn't installed."""
    declaration = re.compile(
        r"^\s*(message|enum|service|rpc|oneof|(repeated |optional )?[\w.<>, ]+ \w+ = \d+|[A-Z0-9_]+ = \d+)\b"
    )
    bare = []
    for proto in sorted(PROTOS.rglob("*.proto")):
        lines = proto.read_text().splitlines()
        for number, line in enumerate(lines):
            if declaration.match(line) and not line.lstrip().startswith(("//", "option")):
                before = lines[number - 1].strip() if number else ""
                if not before.startswith("//"):
                    bare.append(f"{proto.relative_to(ROOT)}:{number + 1}: {line.strip()}")
    assert bare == []


def test_the_locks_name_no_host() -> None:
    for lock in sorted((ROOT / "tools").glob("requirements*.txt")):
        lines = [line for line in lock.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert lines
        assert [line for line in lines if "://" in line or line.startswith("-")] == [], lock.name
        pins = [line for line in lines if not line.startswith(" ")]
        assert [line for line in pins if "==" not in line] == [], lock.name
