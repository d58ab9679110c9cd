"""Equal values, held once. Of ten thousand devices most have the tenant, the network, the groups and the facts of some other; a decoder gives each its own copy.

`share` is for values that come from outside and stay, and that others have too. Whoever shares a dict has promised not to change it.

Limit: of each kind at most `KEPT` different values are remembered; then it begins anew, and only sharing suffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from msgspec.structs import force_setattr

KEPT: Final = 4096

_NOTHING: Final[dict[str, str]] = {}
_values: Final[dict[str | int, str | int]] = {}
_tuples: Final[dict[tuple[str, ...], tuple[str, ...]]] = {}
_dicts: Final[dict[tuple[tuple[str, str], ...], dict[str, str]]] = {}


def same(value: str | int) -> str | int:
    """An equal text or number."""
    if len(_values) >= KEPT:
        _values.clear()
    return _values.setdefault(value, value)


def words(value: tuple[str, ...]) -> tuple[str, ...]:
    """An equal tuple of texts."""
    if not value:
        return ()
    if len(_tuples) >= KEPT:
        _tuples.clear()
    return _tuples.setdefault(value, value)


def facts(value: dict[str, str]) -> dict[str, str]:
    """An equal dict of texts; not to be changed."""
    if not value:
        return _NOTHING
    if len(_dicts) >= KEPT:
        _dicts.clear()
    return _dicts.setdefault(tuple(sorted(value.items())), value)


def share(struct: Any, fields: Iterable[str]) -> None:
    """Replace these fields of a frozen struct (texts, numbers, tuples and dicts of texts) by equal values that others have."""
    for name in fields:
        value = getattr(struct, name)
        if isinstance(value, dict):
            force_setattr(struct, name, facts(value))
        elif value:
            force_setattr(struct, name, words(value) if isinstance(value, tuple) else same(value))
