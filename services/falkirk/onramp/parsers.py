"""Context parsers by name: the two that are built in, and any that a package offers as an entry point.

A package offers one in its metadata, and the setting `onramp.context_parser` chooses it:

    [project.entry-points."falkirk.context_parsers"]
    acme = "acme_falkirk:parse"

Parsers are imported when chosen, so that the JSON one costs no protobuf. Whatever a third-party parser raises that parsing code
raises when its input is wrong (ValueError, KeyError and the like) refuses the producer and harms nobody else.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, Final

from falkirk.onramp.context import Code, ContextRequest, Refusal, checked

Parser = Callable[[bytes], ContextRequest]

GROUP: Final = "falkirk.context_parsers"
# As text: an import statement here would make every worker depend on protobuf.
BUILT_IN: Final = {
    "json": "falkirk.onramp.context_json:parse",
    "protobuf": "falkirk.onramp.context_protobuf:parse",
}
_WRONG_INPUT: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class UnknownParser(LookupError):
    """No parser of that name is installed; an operator's error."""


def load(name: str) -> Parser:
    """The parser of that name. Raises UnknownParser; ImportError where it is broken."""
    if name in BUILT_IN:
        parser: Parser = pkgutil.resolve_name(BUILT_IN[name])
        return parser
    found = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        raise UnknownParser(f"no context parser {name!r}; there are {sorted({*BUILT_IN, *found})}")
    return guarded(found[name].load())


def guarded(parser: Callable[[bytes], Any]) -> Parser:
    """A third-party parser whose faults refuse the producer that met them."""

    def parse(data: bytes) -> ContextRequest:
        try:
            request = parser(data)
        except _WRONG_INPUT as error:
            raise Refusal(Code.INVALID_CONTEXT, f"the context parser failed: {type(error).__name__}") from error
        if not isinstance(request, ContextRequest):
            raise Refusal(Code.INVALID_CONTEXT, "the context parser gave no ContextRequest")
        return checked(request)

    return parse
