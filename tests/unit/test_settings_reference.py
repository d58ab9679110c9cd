"""services/SETTINGS.md names every setting, with its default and what the code says of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from falkirk.cli.checks import section_kind
from falkirk.runtime.settings import SERVICES, Shell

REFERENCE = Path(__file__).resolve().parents[2] / "services" / "SETTINGS.md"
BY_USER = {
    "run_dir": "`/run/falkirk`; not root: `$XDG_RUNTIME_DIR/falkirk`",
    "data_dir": "`/var/lib/falkirk`; not root: `$XDG_DATA_HOME/falkirk`",
}
"""Defaults that depend on who starts it."""


def texts(kind: type) -> dict[str, str]:
    """The docstrings of a struct's fields."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """The struct that a list of a field holds."""
    for inner in (hint, *get_args(hint), *(deeper for option in get_args(hint) for deeper in get_args(option))):
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            return inner
    return None


def shown(key: str, value: Any) -> str:
    """A default as YAML takes it."""
    if value is msgspec.NODEFAULT:
        return "(needed)"
    if key.rpartition(".")[2].endswith("mode"):
        return f"`0o{value:o}`"
    if isinstance(value, bool | int | float):
        return f"`{value}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(repr, value))}]`" if value else "`[]`"
    return f"`{value}`" if value not in (None, "", {}) else "`{}`" if value == {} else "not set"


def rows(
    kind: type[msgspec.Struct], prefix: str, instance: msgspec.Struct | None = None
) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every setting below a struct."""
    described, hints = texts(kind), get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        key = prefix + field.name
        default = getattr(instance, field.name) if instance is not None else field.default
        if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if isinstance(default, msgspec.Struct):
            yield from rows(type(default), f"{key}.", default)
            continue
        yield key, BY_USER.get(key) or shown(key, default), described.get(field.name, "")
        inner = struct_in(hints[field.name])
        if inner is not None:
            yield from rows(inner, f"{key}[].")


def reference() -> str:
    """The tables of services/SETTINGS.md."""
    parts = [("The whole mesh", list(rows(Shell, "")))]
    for service in sorted(SERVICES):
        importlib.import_module(f"falkirk.{service}.settings")
        parts.append((f"`{service}`", list(rows(section_kind(service), f"{service}."))))
    lines = []
    for title, found in parts:
        lines += ["", f"## {title}", "", "| Key | Default | Meaning |", "|---|---|---|"]
        lines += [f"| `{key}` | {default} | {text.replace('|', chr(92) + '|')} |" for key, default, text in found]
    return "\n".join(lines) + "\n"


def test_the_reference_is_what_the_code_says() -> None:
    """Where it differs: `PYTHONPATH=services:. python tests/unit/test_settings_reference.py`."""
    head, _, tables = REFERENCE.read_text().partition("\n## ")
    assert f"\n## {tables}" == reference()
    assert head.startswith("# Settings")


def test_every_setting_is_described() -> None:
    for line in reference().splitlines():
        if line.startswith("| `"):
            assert len(line.split(" | ")[2]) > 10, line


if __name__ == "__main__":
    REFERENCE.write_text(REFERENCE.read_text().partition("\n## ")[0] + reference())
