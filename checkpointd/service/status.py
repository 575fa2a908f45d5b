# SPDX-License-Identifier: Apache-2.0
"""Errors as gRPC statuses.  The only place of the service that knows gRPC codes.

A status carries the error's sentence and one google.rpc.ErrorInfo with reason, hint, exit code and details,
so that the client can raise the very same error again.
"""

from __future__ import annotations

import json
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from checkpointd.errors import CheckpointError

DOMAIN = "checkpointd"

MAX_DETAILS = 16 << 10
"""Bytes of details sent.  Trailing metadata over the peer's limit loses the whole error."""

MAX_SENTENCE = 4 << 10

_CODES = {
    "USAGE": grpc.StatusCode.INVALID_ARGUMENT,
    "TARGET_GONE": grpc.StatusCode.NOT_FOUND,
    "TARGET_EXECED": grpc.StatusCode.ABORTED,
    "NOT_PERMITTED": grpc.StatusCode.PERMISSION_DENIED,
    "KERNEL_LACKS": grpc.StatusCode.FAILED_PRECONDITION,
    "UNSUPPORTED": grpc.StatusCode.FAILED_PRECONDITION,
    "RESTORE_CONFLICT": grpc.StatusCode.FAILED_PRECONDITION,
    "IMAGE_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "STORE_MISSING": grpc.StatusCode.FAILED_PRECONDITION,
    "BUSY": grpc.StatusCode.ABORTED,
    "IMAGE_DAMAGED": grpc.StatusCode.DATA_LOSS,
    "UNKNOWN_FORMAT": grpc.StatusCode.DATA_LOSS,
    "NO_SPACE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "FROZEN_TOO_LONG": grpc.StatusCode.DEADLINE_EXCEEDED,
    "PAGES_MISSED": grpc.StatusCode.DATA_LOSS,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "SERVICE_UNREACHABLE": grpc.StatusCode.UNAVAILABLE,
    "VERSION_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
}


def code_of(error: CheckpointError) -> grpc.StatusCode:
    return _CODES.get(error.reason, grpc.StatusCode.INTERNAL)


def status_of(error: CheckpointError) -> status_pb2.Status:
    """The error as google.rpc.Status; details that are too large are cut down to their first entries."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={
            "hint": error.hint[:MAX_SENTENCE],
            "exit_code": str(error.exit_code),
            "details": _fitting_json(error.details),
        },
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    return status_pb2.Status(
        code=code_of(error).value[0], message=error.message[:MAX_SENTENCE], details=[packed]
    )


def abort(context: grpc.ServicerContext, error: CheckpointError) -> None:
    """End the call with this error; raises, as `ServicerContext.abort` does."""
    context.abort_with_status(rpc_status.to_status(status_of(error)))


def _fitting_json(details: dict[str, Any]) -> str:
    text = json.dumps(details, default=str)
    while len(text) > MAX_DETAILS:
        longest = max(details, key=lambda name: len(json.dumps(details[name], default=str)))
        value = details[longest]
        if isinstance(value, list) and len(value) > 1:
            kept = value[: len(value) // 2]
            details = details | {
                longest: kept,
                f"{longest}_left_out": _left_out(details, longest, value, kept),
            }
        else:
            details = {name: other for name, other in details.items() if name != longest}
        text = json.dumps(details, default=str)
    return text


def _left_out(details: dict[str, Any], name: str, before: list[Any], after: list[Any]) -> int:
    return int(details.get(f"{name}_left_out", 0)) + len(before) - len(after)
