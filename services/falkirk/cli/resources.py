"""`falkirk tenant|user|device|vnet|route|policy|node|zone create|get|list|update|delete|watch`, and `falkirk apply`.

Groups of the same six commands, built from the table in `falkirk.cli.fields`. `get` prints the document that
`apply` takes. `update` reads, changes what was given, and writes on condition that nobody else wrote meanwhile.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from falkirk.api.registry.v1.registry_service_pb2 import ApplyRequest, ApplyResponse
from falkirk.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from falkirk.cli import device, device_client, manifest
from falkirk.cli.connection import Json, RunDir, calling, fail, until_interrupted
from falkirk.cli.fields import LABELS, SPECS, TARGETS, Flag, Spec
from falkirk.cli.output import print_json, print_table, timestamp
from falkirk.runtime.client import MESSAGE_BYTES
from falkirk.runtime.errors import FalkirkError

_SERVICE = "registry"
_TIMEOUT_S = 30.0
_PAGE = 1000
_LINES = 100
"""Outcomes that `apply` prints one by one; more are counted."""

_Tenant = Annotated[str, typer.Option("--tenant", help="The tenant's name or id.")]
_AnyTenant = Annotated[str, typer.Option("--tenant", help="The tenant's name or id; not given takes all.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name or id.", show_default=False)]
_Files = Annotated[
    list[Path], typer.Option("--file", "-f", help="A YAML file, a directory of them, or - for standard input.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for spec in SPECS:
        group = typer.Typer(
            name=spec.command,
            help=f"{_label(spec).capitalize()}s." if spec.name != "policy" else "Policies.",
            no_args_is_help=True,
        )
        for make in (_create, _get, _list, _update, _delete, _watch):
            if make is _create and spec.name == "policy":
                continue
            command = make(spec)
            group.command(make.__name__.removeprefix("_"), help=command.__doc__)(command)
        if spec.name == "route":
            group.command("add")(route_add)
        if spec.name == "device":
            device.register(group)
            device_client.add(group)
        if spec.name == "policy":
            group.command("create")(policy_create)
        app.add_typer(group)
    app.command("apply")(apply)


def apply(
    file: _Files,
    run_dir: RunDir,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, store nothing.")] = False,
    json: Json = False,
) -> None:
    """Create or update resources from YAML documents, all or none."""
    documents = _documents(file)
    request = ApplyRequest(resources=[document.resource for document in documents], dry_run=dry_run)
    if request.ByteSize() > MESSAGE_BYTES:
        fail(
            f"the documents have {request.ByteSize()} bytes together, one transaction takes {MESSAGE_BYTES}",
            "TRANSACTION_TOO_LARGE",
        )
    with calling(run_dir, _SERVICE, lambda error: _locate(documents, error)) as channel:
        answer = RegistryServiceStub(channel).Apply(request, timeout=_TIMEOUT_S)
    if json:
        print_json(answer)
        return
    outcomes = [ApplyResponse.Outcome.Name(outcome).removeprefix("OUTCOME_").lower() for outcome in answer.outcomes]
    suffix = " (dry run)" if dry_run else ""
    if len(outcomes) <= _LINES:
        for resource, outcome in zip(answer.resources, outcomes, strict=True):
            kind = resource.WhichOneof("resource")
            print(f"{_shown(kind, getattr(resource, kind))} {outcome}{suffix}")
    else:
        counts = Counter(
            (resource.WhichOneof("resource"), outcome)
            for resource, outcome in zip(answer.resources, outcomes, strict=True)
        )
        print_table(
            ["kind", "outcome", "count"],
            [(kind, outcome + suffix, count) for (kind, outcome), count in sorted(counts.items())],
        )


def policy_create(file: _Files, run_dir: RunDir, json: Json = False) -> None:
    """Create policies from YAML documents; refuses those that are there already."""
    documents = _documents(file)
    spec = next(spec for spec in SPECS if spec.name == "policy")
    for document in documents:
        if document.kind != "policy":
            fail(
                f"{document.locate('kind')}: is a {document.kind}, not a policy",
                "INVALID_FIELD",
                "use `falkirk apply -f`",
            )
    for document in documents:
        place = document

        def locate(error: FalkirkError, place: manifest.Document = place) -> str:
            return place.locate(error.metadata.get("field", ""))

        with calling(run_dir, _SERVICE, locate) as channel:
            _made(
                spec,
                spec.stub(channel).Create(spec.request("Create", policy=document.value), timeout=_TIMEOUT_S),
                "created",
                json,
            )


def route_add(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Such as 10.1.0.0/16 or 2001:db8::/32.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{TARGETS}.")],
    tenant: _Tenant,
    run_dir: RunDir,
    vnet: Annotated[
        str, typer.Option("--vnet", help="Its virtual network; not given takes the tenant's default.")
    ] = "",
    name: Annotated[str, typer.Option("--name", help="Its name; not given makes one of network and prefix.")] = "",
    egress_address4: Annotated[str, typer.Option(help="The IPv4 address to leave from.")] = "",
    egress_address6: Annotated[str, typer.Option(help="The IPv6 address to leave from.")] = "",
    comment: Annotated[str, typer.Option(help="Free text for people.")] = "",
    json: Json = False,
) -> None:
    """Add a route, named by its prefix."""
    spec = next(spec for spec in SPECS if spec.name == "route")
    given = {
        "prefix": prefix,
        "vnet": vnet,
        "target": target,
        "egress_address4": egress_address4 or None,
        "egress_address6": egress_address6 or None,
        "comment": comment,
    }
    value = spec.messages.Route()
    value.metadata.name, value.metadata.tenant = name or route_name(vnet, prefix), tenant
    _set(spec.flags, value, given)
    with calling(run_dir, _SERVICE) as channel:
        _made(spec, spec.stub(channel).Create(spec.request("Create", route=value), timeout=_TIMEOUT_S), "created", json)


def route_name(vnet: str, prefix: str) -> str:
    """A legal name that says where a route leads to: blue-10-1-0-0-16."""
    return re.sub(r"[^a-z0-9]", "-", f"{vnet or 'to'}-{prefix}".lower())[:63].rstrip("-")


def _create(spec: Spec) -> Callable[..., None]:
    def command(name: str, run_dir: Path, json: bool, tenant: str = "", **given: Any) -> None:
        value = getattr(spec.messages, spec.service.removesuffix("Service"))()
        value.metadata.name = name
        if tenant:
            value.metadata.tenant = tenant
        _set((*spec.flags, LABELS), value, given)
        with calling(run_dir, _SERVICE) as channel:
            _made(
                spec,
                spec.stub(channel).Create(spec.request("Create", **{spec.name: value}), timeout=_TIMEOUT_S),
                "created",
                json,
            )

    return _signed(command, spec, f"Create a {_label(spec)}.", (*spec.flags, LABELS))


def _update(spec: Spec) -> Callable[..., None]:
    rename = Flag("--rename", str, "A new name.", lambda value, name: setattr(value.metadata, "name", name))

    def command(name: str, run_dir: Path, json: bool, tenant: str = "", **given: Any) -> None:
        with calling(run_dir, _SERVICE) as channel:
            stub = spec.stub(channel)
            value = getattr(stub.Get(spec.request("Get", **_key(spec, tenant, name)), timeout=_TIMEOUT_S), spec.name)
            _set((*spec.flags, LABELS, rename), value, given)
            _made(spec, stub.Update(spec.request("Update", **{spec.name: value}), timeout=_TIMEOUT_S), "updated", json)

    text = f"Change a {_label(spec)}: what isn't given stays as it is, an empty value clears." + (
        " Its rules go by `falkirk apply -f`." if spec.name == "policy" else ""
    )
    return _signed(command, spec, text, (*spec.flags, LABELS, rename))


def _get(spec: Spec) -> Callable[..., None]:
    def command(name: str, run_dir: Path, json: bool, tenant: str = "") -> None:
        with calling(run_dir, _SERVICE) as channel:
            value = getattr(
                spec.stub(channel).Get(spec.request("Get", **_key(spec, tenant, name)), timeout=_TIMEOUT_S), spec.name
            )
        if json:
            print_json(value)
        else:
            print(manifest.render(value), end="")

    return _signed(command, spec, f"Show a {_label(spec)} as the document that `falkirk apply` takes.")


def _list(spec: Spec) -> Callable[..., None]:
    def command(run_dir: RunDir, tenant: _AnyTenant = "", json: Json = False) -> None:
        of = {"tenant": tenant} if spec.scoped else {}
        with calling(run_dir, _SERVICE) as channel:
            stub = spec.stub(channel)
            answer = page = stub.List(spec.request("List", page_size=_PAGE, **of), timeout=_TIMEOUT_S)
            while page.next_page_token:
                page = stub.List(
                    spec.request("List", page_size=_PAGE, page_token=page.next_page_token, **of), timeout=_TIMEOUT_S
                )
                getattr(answer, spec.plural).extend(getattr(page, spec.plural))
                answer.next_page_token = page.next_page_token
            columns = dict(spec.columns)
            if spec.name == "device" and not json:
                columns |= device.presence_columns(channel, tenant)
        if json:
            print_json(answer)
            return
        head = ["tenant", "name"] if spec.scoped else ["name"]
        rows = [
            [
                *([value.metadata.tenant] if spec.scoped else []),
                value.metadata.name,
                *(show(value) for show in columns.values()),
                timestamp(value.metadata.update_time),
            ]
            for value in getattr(answer, spec.plural)
        ]
        print_table([*head, *columns, "changed"], rows)

    command.__doc__ = f"List {spec.plural.replace('_', ' ')}."
    return _without_tenant(command) if not spec.scoped else command


def _delete(spec: Spec) -> Callable[..., None]:
    def command(name: str, run_dir: Path, json: bool, tenant: str = "") -> None:
        with calling(run_dir, _SERVICE) as channel:
            answer = spec.stub(channel).Delete(spec.request("Delete", **_key(spec, tenant, name)), timeout=_TIMEOUT_S)
        if json:
            print_json(answer)
        else:
            print(f"{spec.command}/{f'{tenant}/' if tenant else ''}{name} deleted")

    return _signed(command, spec, f"Remove a {_label(spec)} that nothing refers to.")


def _watch(spec: Spec) -> Callable[..., None]:
    def command(run_dir: RunDir, tenant: _AnyTenant = "", json: Json = False) -> None:
        of = {"tenant": tenant} if spec.scoped else {}
        lines = _Lines(spec)
        with until_interrupted(), calling(run_dir, _SERVICE) as channel:
            for message in spec.stub(channel).Watch(spec.request("Watch", **of)):
                if json:
                    print_json(message, line=True)
                else:
                    print(
                        "".join(f"{message.revision.number} {line}\n" for line in lines.of(message)), end="", flush=True
                    )

    command.__doc__ = f"Show {spec.plural.replace('_', ' ')}, then every change to them, until interrupted."
    return _without_tenant(command) if not spec.scoped else command


class _Lines:
    """What a watch shows for people: removals come by id, so names are remembered."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._names: dict[str, str] = {}
        self._synced = False

    def of(self, message: Any) -> list[str]:
        """The lines of one message."""
        found = []
        for value in message.changed:
            known = value.metadata.id in self._names
            self._names[value.metadata.id] = _shown(self._spec.name, value)
            word = "exists" if not self._synced else "changed" if known else "created"
            found.append(f"{word} {self._names[value.metadata.id]}")
        found += [f"removed {self._names.pop(key, key)}" for key in message.removed_ids]
        if message.synced:
            self._synced = True
            found.append("synced")
        return found


def _signed(command: Callable[..., None], spec: Spec, doc: str, flags: tuple[Flag, ...] = ()) -> Callable[..., None]:
    """Give a command the parameters that its kind has, for typer to read."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("name", keyword, annotation=_Name),
        inspect.Parameter("run_dir", keyword, annotation=RunDir),
    ]
    if spec.scoped:
        parameters.append(inspect.Parameter("tenant", keyword, annotation=_Tenant))
    for flag in flags:
        option = typer.Option(flag.names, help=flag.help, show_default=False)
        annotation: Any = Annotated.__class_getitem__((flag.type | None, option))  # type: ignore[attr-defined]
        parameters.append(inspect.Parameter(flag.key, keyword, annotation=annotation, default=None))
    parameters.append(inspect.Parameter("json", keyword, annotation=Json, default=False))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = doc
    return command


def _without_tenant(command: Callable[..., None]) -> Callable[..., None]:
    """The same command without --tenant."""
    signature = inspect.signature(command, eval_str=True)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "tenant"]
    command.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
    return command


def _set(flags: tuple[Flag, ...], value: Any, given: dict[str, Any]) -> None:
    for flag in flags:
        # typer gives an empty list for a list option that isn't there.
        if given.get(flag.key) not in (None, []):
            flag.set(value, given[flag.key])


def _key(spec: Spec, tenant: str, name: str) -> dict[str, str]:
    return {"tenant": tenant, "name": name} if spec.scoped else {"name": name}


def _made(spec: Spec, answer: Any, outcome: str, json: bool) -> None:
    value = getattr(answer, spec.name)
    if json:
        print_json(answer)
        return
    extra = f" with {', '.join(value.addresses)}" if spec.name == "device" and outcome == "created" else ""
    print(f"{_shown(spec.name, value)} {outcome}{extra}")


def _shown(kind: str, value: Any) -> str:
    command = next(spec.command for spec in SPECS if spec.name == kind)
    return "/".join(part for part in (command, value.metadata.tenant, value.metadata.name) if part)


def _label(spec: Spec) -> str:
    return spec.name.replace("_", " ")


def _documents(files: list[Path]) -> list[manifest.Document]:
    try:
        documents = manifest.read(files)
    except manifest.ManifestError as error:
        fail(str(error), "INVALID_MANIFEST")
    if not documents:
        fail(f"{', '.join(map(str, files))}: no documents", "INVALID_MANIFEST")
    return documents


def _locate(documents: list[manifest.Document], error: FalkirkError) -> str:
    """Where the document that the registry refused stands, as far as it says which one."""
    index = error.metadata.get("index", "")
    if not index.isdecimal() or int(index) >= len(documents):
        return ""
    return documents[int(index)].locate(error.metadata.get("field", ""))
