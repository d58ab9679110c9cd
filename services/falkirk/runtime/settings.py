"""Settings of a process: one YAML file for the whole mesh, frozen values for each service.

The file's head is `apiVersion: falkirk.dev/v1alpha1` and `kind: Settings`. What all services share (`Shell`) stands at the top
level; each service has one section of its own name::

    apiVersion: falkirk.dev/v1alpha1
    kind: Settings
    workers: 2
    telemetry: {otlp_endpoint: "127.0.0.1:4317", sample_ratio: 1.0}
    roads: {read: {mode: 0o755}}
    flow: {max_flows: 4096}

A service reads the shell and its own section only: a section of another service is not judged here (`falkirk up` judges all of
them before it starts anything). Unknown keys, at any depth, duplicate keys and values of the wrong type are refused with file and
path. Sections are frozen msgspec structs, each field documented with its unit; derive them from `Section`.

Precedence of the two directories: argument, then FALKIRK_RUN_DIR / FALKIRK_DATA_DIR, then the file, then the default of the user
(`/run/falkirk` and `/var/lib/falkirk` for root; the XDG directories for others). FALKIRK_CONFIG names the file where --config doesn't.

Limits: paths of unix sockets hold at most 107 bytes, so a run directory that would exceed that is refused here, not at bind.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec
import yaml

from falkirk.runtime import supervised

API_VERSION: Final = "falkirk.dev/v1alpha1"
KIND: Final = "Settings"
SERVICES: Final = ("registry", "policy", "router", "upgrader", "flow", "onramp")
"""Every service, in the order in which a mesh starts; it drains in the reverse order."""
ROADS: Final = ("admin", "mesh", "read")
"""Socket directories, most privileged first."""
UNIX_PATH_MAX: Final = 107
"""Bytes of a unix socket's path (sockaddr_un without its final NUL)."""

Road = Literal["admin", "mesh", "read"]
S = TypeVar("S", bound=msgspec.Struct)


class SettingsError(Exception):
    """The operator's fault: the file or an argument is wrong. The message names file and path."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every settings struct."""


class LogSettings(Section, frozen=True, kw_only=True):
    """What a process says on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    format: Literal["json", "text"] = "json"
    """`json`: one object a line; `text`: for people."""


class TelemetrySettings(Section, frozen=True, kw_only=True):
    """Where traces go, and how many."""

    otlp_endpoint: str | None = None
    """host:port of an OTLP/gRPC receiver, plain text; not set exports nothing and samples nothing."""
    sample_ratio: float = 0.1
    """Share of new flows (and of RPCs that bring no trace) that are traced, 0.0 to 1.0."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise ValueError("sample_ratio must lie between 0.0 and 1.0")
        if self.otlp_endpoint is not None:
            try:
                host_port(self.otlp_endpoint)
            except ValueError as error:
                raise ValueError(f"otlp_endpoint: {error}") from error


class RoadSettings(Section, frozen=True, kw_only=True):
    """Who may enter one socket directory; the directory guards, the sockets in it only repeat it."""

    mode: int
    """Permission bits of the directory."""
    owner: str = ""
    """User name or number; empty keeps the process's own."""
    group: str = ""
    """Group name or number; empty keeps the process's own."""

    def __post_init__(self) -> None:
        if not 0 <= self.mode <= 0o777:
            raise ValueError("mode must lie between 0 and 0o777")


class Roads(Section, frozen=True, kw_only=True):
    """The three socket directories under the run directory."""

    admin: RoadSettings = RoadSettings(mode=0o700)
    """Changes things."""
    mesh: RoadSettings = RoadSettings(mode=0o750)
    """Spoken between services."""
    read: RoadSettings = RoadSettings(mode=0o755)
    """Reads only."""

    def get(self, road: Road) -> RoadSettings:
        """Settings of one road."""
        return {"admin": self.admin, "mesh": self.mesh, "read": self.read}[road]


class Shell(Section, frozen=True, kw_only=True):
    """What every process of a mesh shares."""

    run_dir: Path = Path()
    """Sockets and locks; made by whoever starts first. `load` fills in the default."""
    data_dir: Path = Path()
    """What must survive a restart. `load` fills in the default."""
    node: str = "local"
    """This node's name in audit records."""
    workers: int = 1
    """Packet workers of onramp, flow and upgrader each, 1 to 64. A WireGuard device is one on-ramp worker's, by its key; a tunnel one flow worker's, by its device."""
    log: LogSettings = LogSettings()
    """What is written on stderr."""
    telemetry: TelemetrySettings = TelemetrySettings()
    """Traces."""
    metrics: dict[str, str] = {}
    """By service: host:port where Prometheus metrics are served besides read/<svc>.metrics.sock."""
    listen_tcp: dict[str, str] = {}
    """By service: host:port where its gRPC is served over TCP besides its unix sockets, with mutual TLS and roles (services/ROLES.md)."""
    tcp_names: tuple[str, ...] = ()
    """DNS names and addresses of this node, for clients that check them in its certificate; Falkirk's own check another name."""
    roads: Roads = Roads()
    """Who may enter the socket directories."""
    mesh_uids: tuple[int, ...] = ()
    """Uids besides the process's own and 0 whose packet processes are accepted as peers."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 64:
            raise ValueError("workers must lie between 1 and 64")
        for key, addresses in (("metrics", self.metrics), ("listen_tcp", self.listen_tcp)):
            for service, address in addresses.items():
                if service not in SERVICES:
                    raise ValueError(f"{key}: {service!r} is not a service")
                try:
                    host_port(address)
                except ValueError as error:
                    raise ValueError(f"{key}.{service}: {error}") from error
        if self.listen_tcp and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", self.node):
            raise ValueError("node: with listen_tcp it stands in certificates: at most 63 letters, digits and ._-")

    def socket(self, road: Road, service: str) -> Path:
        """The gRPC socket of a service on a road."""
        return self.run_dir / road / f"{service}.sock"

    def data(self, service: str) -> Path:
        """The service's own directory below the data directory."""
        return self.data_dir / service


def host_port(address: str) -> tuple[str, int]:
    """Splits "host:port" (IPv6 in brackets); ValueError where it isn't one."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def default_run_dir() -> Path:
    """Where sockets go when nobody says."""
    if os.geteuid() == 0:
        return Path("/run/falkirk")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "falkirk" if runtime else Path(f"/tmp/falkirk-{os.geteuid()}")


def default_data_dir() -> Path:
    """Where lasting state goes when nobody says."""
    if os.geteuid() == 0:
        return Path("/var/lib/falkirk")
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "falkirk"


def config_path(argument: Path | None) -> Path | None:
    """The settings file: the argument, else FALKIRK_CONFIG, else none."""
    if argument is not None:
        return argument
    named = os.environ.get("FALKIRK_CONFIG")
    return Path(named) if named else None


def load(
    path: Path | None, section: str, kind: type[S], *, run_dir: Path | None = None, data_dir: Path | None = None
) -> tuple[Shell, S]:
    """The shell and one section; a missing file or section gives defaults. Raises SettingsError."""
    document = read(path)
    return shell_of(document, path, run_dir=run_dir, data_dir=data_dir), section_of(document, path, section, kind)


def read(path: Path | None) -> dict[str, Any]:
    """The file as plain values, its head and its top-level names checked. Raises SettingsError."""
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: must be a mapping that starts with apiVersion: {API_VERSION}")
    for key, value in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(key) != value:
            raise SettingsError(f"{path}: {key} must be {value}, not {document.get(key)!r}")
    known = {"apiVersion", "kind", *SERVICES, *Shell.__struct_fields__}
    for key in document:
        if key not in known:
            raise SettingsError(f"{path}: {key}: unknown key")
    return document


def shell_of(
    document: Mapping[str, Any], path: Path | None, *, run_dir: Path | None = None, data_dir: Path | None = None
) -> Shell:
    """The shell of a document that `read` gave, its directories absolute. Raises SettingsError."""
    values = {key: value for key, value in document.items() if key in Shell.__struct_fields__}
    shell = _convert(values, Shell, "", path)
    run = _directory(run_dir, "FALKIRK_RUN_DIR", values.get("run_dir"), default_run_dir)
    data = _directory(data_dir, "FALKIRK_DATA_DIR", values.get("data_dir"), default_data_dir)
    longest = run / "mesh" / f"upgrader.worker.{shell.workers - 1}.sock"
    if len(os.fsencode(longest)) > UNIX_PATH_MAX:
        raise SettingsError(f"run_dir {run}: {longest} has more than {UNIX_PATH_MAX} bytes; choose a shorter directory")
    return msgspec.structs.replace(shell, run_dir=run, data_dir=data)


def section_of(document: Mapping[str, Any], path: Path | None, section: str, kind: type[S]) -> S:
    """One service's section of a document that `read` gave. Raises SettingsError."""
    values = document.get(section)
    return _convert({} if values is None else values, kind, section, path)


def arguments(section: str, kind: type[S], argv: Sequence[str] | None = None) -> tuple[Shell, S]:
    """Parses --config --run-dir --data-dir and loads; a wrong setting ends the process with status 2 and a message.

    A service calls this first: it also binds the process to `falkirk up`, where that started it.
    """
    supervised.bind()
    parser = argparse.ArgumentParser(prog=f"falkirk {section}", description=f"The {section} service of a Falkirk mesh.")
    parser.add_argument("--config", type=Path, help="settings file (FALKIRK_CONFIG)")
    parser.add_argument("--run-dir", type=Path, help="directory of sockets (FALKIRK_RUN_DIR)")
    parser.add_argument("--data-dir", type=Path, help="directory of lasting state (FALKIRK_DATA_DIR)")
    options = parser.parse_args(argv)
    try:
        return load(config_path(options.config), section, kind, run_dir=options.run_dir, data_dir=options.data_dir)
    except SettingsError as error:
        parser.error(str(error))


def _directory(argument: Path | None, variable: str, value: str | None, default: Any) -> Path:
    if argument is None:
        named = os.environ.get(variable) or value
        argument = Path(named) if named else default()
    return argument.expanduser().absolute()


def _convert(values: Any, kind: type[S], section: str, path: Path | None) -> S:
    where = f"{path or 'settings'}: "
    for unknown in _unknown_keys(values, msgspec.inspect.type_info(kind), section):
        raise SettingsError(f"{where}{unknown}: unknown key")
    try:
        return msgspec.convert(values, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        text = str(error)
        match = re.search(r" - at `\$\.?([^`]*)`$", text)
        if match:
            text = text[: match.start()]
        place = ".".join(part for part in (section, match.group(1) if match else "") if part)
        raise SettingsError(f"{where}{place}: {text}" if place else where + text) from error


def _unknown_keys(value: Any, kind: msgspec.inspect.Type, path: str) -> Iterator[str]:
    """Paths that no field stands for; structs that tolerate unknown keys are not excused."""
    match kind:
        case msgspec.inspect.StructType() if isinstance(value, dict):
            fields = {field.encode_name: field.type for field in kind.fields}
            for key, inner in value.items():
                place = f"{path}.{key}" if path else str(key)
                if key not in fields:
                    yield place
                else:
                    yield from _unknown_keys(inner, fields[key], place)
        case msgspec.inspect.UnionType():
            for option in kind.types:
                if isinstance(option, msgspec.inspect.StructType):
                    yield from _unknown_keys(value, option, path)
        case msgspec.inspect.DictType() if isinstance(value, dict):
            for key, inner in value.items():
                yield from _unknown_keys(inner, kind.value_type, f"{path}.{key}")
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType() if isinstance(value, list):
            for index, inner in enumerate(value):
                yield from _unknown_keys(inner, kind.item_type, f"{path}[{index}]")


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"a {kind.__name__} can't be made of {type(value).__name__}")


class _Loader(yaml.SafeLoader):
    """YAML with 0o755 as an octal number (YAML 1.2) and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _octal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)), 8)


_Loader.add_implicit_resolver("!octal", re.compile(r"^0o[0-7]+$"), ["0"])
_Loader.add_constructor("!octal", _octal)

assert get_args(Road) == ROADS
