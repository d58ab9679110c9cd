"""Reasons are part of the API."""

from __future__ import annotations

import grpc

from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.service import refusal


def test_every_reason_is_called_what_it_says() -> None:
    assert [reason for reason in Reason if reason.name != reason.value] == []


def test_a_refusal_becomes_a_status_with_its_metadata() -> None:
    error = refusal(Refused(Reason.PREFIX_TAKEN, "taken", code="1014", field="prefix"))
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.ALREADY_EXISTS, "PREFIX_TAKEN", "taken")
    assert error.metadata == {"code": "1014", "field": "prefix"}


def test_what_is_not_listed_is_the_callers_fault() -> None:
    assert refusal(Refused(Reason.INVALID_FIELD, "bad")).code is grpc.StatusCode.INVALID_ARGUMENT
