"""The caller of the call that is being answered."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from falkirk.decide.callers import Caller

current: Final[ContextVar[Caller | None]] = ContextVar("falkirk_caller", default=None)
"""Whom the client's certificate names; None by a unix socket, whose directory is all there is to know, and for calls without a certificate."""


def actor(said: str, most: int = 200) -> str:
    """Who acts, for records: the caller as certified, with what it says of itself behind it; at most `most` bytes in UTF-8."""
    caller = current.get()
    if caller is None:
        return said
    return (f"{caller}: {said}" if said else str(caller)).encode()[:most].decode(errors="ignore")
