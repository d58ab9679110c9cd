"""One error type that crosses RPC.

A service raises `FalkirkError`; the server's interceptor turns it into a status with `google.rpc.ErrorInfo` (domain
"falkirk.dev", a reason in UPPER_SNAKE_CASE that programs may rely on, metadata as strings). A client turns a failed call back with
`from_rpc`. Anything else that a handler raises is the server's own fault: INTERNAL, reason INTERNAL, and metadata `id` names the
log line that tells more; the message never carries what the exception said.
"""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

DOMAIN: Final = "falkirk.dev"
DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata in which gRPC carries a google.rpc.Status."""

_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


class FalkirkError(Exception):
    """An error with a gRPC code, a reason for programs, a message for people, and metadata (values become strings)."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def status(self) -> status_pb2.Status:
        """The google.rpc.Status that says all of this."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        detail = any_pb2.Any()
        detail.Pack(info)
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=[detail])

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What a server sends beside code and message."""
        return ((DETAILS_KEY, self.status().SerializeToString()),)


def from_rpc(error: grpc.RpcError) -> FalkirkError:
    """The error as the server raised it. A failure without details (no server, deadline) gets the code's name as its reason."""
    call: Any = error
    code = call.code() if hasattr(call, "code") else None
    message = (call.details() if hasattr(call, "details") else None) or str(error)
    for key, value in (call.trailing_metadata() if hasattr(call, "trailing_metadata") else None) or ():
        if key == DETAILS_KEY:
            found = from_status(status_pb2.Status.FromString(value))
            if found is not None:
                return found
    code = code or grpc.StatusCode.UNKNOWN
    return FalkirkError(code, code.name, message)


def from_status(status: status_pb2.Status) -> FalkirkError | None:
    """The error in a status, None where it carries no ErrorInfo of this domain."""
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
            found = FalkirkError(code, info.reason, status.message)
            found.metadata.update(info.metadata)
            return found
    return None
