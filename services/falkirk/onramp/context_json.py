"""The default context format: one JSON object. PURE.

    {"v":1,"tenant":"acme","device":"laptop","virtual_network":"default","framing":"raw"|"vnet","packed":false,
     "transport":"socket"|"device","attributes":{"k":"v"}}

`v`, `tenant` and `device` are required. `packed` with raw framing says that the producer takes several packets in one datagram, one behind
another; it may send so in any case. A version that isn't 1 is told before anything else is looked at, since a later
version may have other keys. Stricter than RFC 8259 asks: no duplicate keys, no NaN or Infinity, UTF-8 without a mark.
"""

from __future__ import annotations

import json
from typing import Any, Final

from falkirk.onramp.context import PRODUCERS, VERSION, Code, ContextRequest, Refusal, checked, shown
from falkirk.wire.context import Framing, Transport

_STRINGS: Final = ("tenant", "device", "virtual_network", "framing", "transport")
_KEYS: Final = {"v", "attributes", "packed", *_STRINGS}


def parse(data: bytes) -> ContextRequest:
    """The request in a first datagram. Raises Refusal."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise Refusal(Code.INVALID_CONTEXT, f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise Refusal(Code.INVALID_CONTEXT, f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise Refusal(Code.INVALID_CONTEXT, "JSON with a number or a nesting beyond reason") from error
    if not isinstance(value, dict):
        raise Refusal(Code.INVALID_CONTEXT, "the context must be a JSON object")
    _version(value)
    for key in value:
        if key not in _KEYS:
            raise Refusal(Code.UNKNOWN_KEY, f"unknown key {shown(key)}")
    texts = {key: _text(value[key], key) for key in _STRINGS if key in value}
    framing = texts.pop("framing", Framing.RAW.value)
    if framing not in list(Framing):
        raise Refusal(Code.INVALID_CONTEXT, f'framing must be "raw" or "vnet", not {shown(framing)}')
    transport = texts.pop("transport", Transport.SOCKET.value)
    if transport not in PRODUCERS:
        raise Refusal(Code.INVALID_CONTEXT, f'transport must be "socket" or "device", not {shown(transport)}')
    return checked(
        ContextRequest(
            tenant=texts.get("tenant", ""),
            device=texts.get("device", ""),
            virtual_network=texts.get("virtual_network", ""),
            framing=Framing(framing),
            transport=Transport(transport),
            attributes=_attributes(value.get("attributes", {})),
            packed=_packed(value.get("packed", False)),
        )
    )


def _version(value: dict[str, Any]) -> None:
    version = value.get("v")
    if type(version) is not int:  # `true` is an int to Python, and not a version
        raise Refusal(Code.INVALID_CONTEXT, "v is missing" if version is None else "v must be an integer")
    if version != VERSION:
        raise Refusal(Code.UNSUPPORTED_VERSION, f"v must be {VERSION}, not {shown(version)}")


def _packed(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refusal(Code.INVALID_CONTEXT, "packed must be true or false")
    return value


def _attributes(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Refusal(Code.INVALID_CONTEXT, "attributes must be an object of strings")
    return {key: _text(inner, f"attributes.{key}") for key, inner in value.items()}


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise Refusal(Code.INVALID_CONTEXT, f"{shown(where)} must be a string")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise Refusal(Code.INVALID_CONTEXT, f"duplicate key {shown(twice)}")
    return value


def _constant(name: str) -> Any:
    raise Refusal(Code.INVALID_CONTEXT, f"{name} isn't JSON")
