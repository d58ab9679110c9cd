"""The one error type crosses a status and comes back whole."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import status_pb2  # type: ignore[import-untyped]

from falkirk.runtime.errors import FalkirkError, from_rpc, from_status


class Failed(grpc.RpcError):
    """A failed call as grpc raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, bytes], ...]) -> None:
        super().__init__(details)
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def test_there_and_back() -> None:
    error = FalkirkError(grpc.StatusCode.ALREADY_EXISTS, "PREFIX_TAKEN", "10.0.0.0/8 is there", code_=1014, vnet="a")
    back = from_rpc(Failed(error.code, error.message, error.trailing_metadata()))
    assert (back.code, back.reason, back.message) == (error.code, "PREFIX_TAKEN", "10.0.0.0/8 is there")
    assert back.metadata == {"code_": "1014", "vnet": "a"}


def test_a_failure_without_details_keeps_its_code() -> None:
    back = from_rpc(Failed(grpc.StatusCode.UNAVAILABLE, "no such file", ()))
    assert (back.code, back.reason, str(back)) == (
        grpc.StatusCode.UNAVAILABLE,
        "UNAVAILABLE",
        "UNAVAILABLE: no such file",
    )


def test_a_status_of_another_domain_is_not_ours() -> None:
    assert from_status(status_pb2.Status(code=5, message="x")) is None
