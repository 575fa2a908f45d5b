# SPDX-License-Identifier: Apache-2.0
"""Messages as plain dicts, and failed calls as the errors the service raised."""

from __future__ import annotations

import json
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from checkpointd.errors import (
    CheckpointError,
    FrozenTooLong,
    NotPermitted,
    ServiceUnreachable,
    VersionMismatch,
)

_DETAILS_KEY = "grpc-status-details-bin"


def plain(message: Message) -> dict[str, Any]:
    """Every field by name with its value: 64-bit integers as int, times in RFC 3339, enums as lower-case words."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            result[field.name] = dict(value)
        elif hasattr(value, "extend"):  # repeated; the descriptor's own word for it differs between versions
            result[field.name] = [_plain_value(field, item) for item in value]
        elif field.message_type is None or message.HasField(field.name):
            result[field.name] = _plain_value(field, value)
        elif field.containing_oneof is None:
            result[field.name] = None
    return result


def _plain_value(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        names = field.enum_type.values_by_number
        prefix = names[0].name.removesuffix("UNSPECIFIED")
        return names[value].name.removeprefix(prefix).lower() if value in names else str(value)
    if field.message_type is None:
        return value
    if field.message_type.full_name == "google.protobuf.Timestamp":
        return value.ToJsonString()
    return plain(value)


def event(message: Any) -> dict[str, Any]:
    """An event of a long operation as one flat dict with a "message_type"."""
    kind = message.WhichOneof("event")
    value = plain(getattr(message, kind))
    stats = value.pop("stats", None) or {}
    return {"message_type": kind, **value, **stats}


def error_of(failure: grpc.RpcError, where: str) -> CheckpointError:
    """The error behind a failed call to the service at `where`."""
    call: Any = failure
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            found = _error_in(status_pb2.Status.FromString(value))
            if found is not None:
                return found
    code, said = call.code(), call.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return FrozenTooLong(
            "the service did not answer before the deadline; what it was doing is cancelled",
            hint="allow it more time with --timeout",
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionMismatch(
            f"the service at {where} does not know this call: it is of another version",
            hint="restart the service after an upgrade",
        )
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return NotPermitted(f"the service at {where} refused us: {said}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        # we cancel no call ourselves: a service that ends does
        return ServiceUnreachable(
            f"the service at {where} cannot be reached or went away: {said}",
            hint="what it was doing is undone, targets run on: try again",
        )
    return CheckpointError(f"the service at {where} failed: {said or code.name}", hint="its log may say more")


def _error_in(status: status_pb2.Status) -> CheckpointError | None:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            try:
                details = json.loads(info.metadata.get("details", "{}"))
            except ValueError:
                details = {}
            return CheckpointError.from_dict(
                {
                    "reason": info.reason,
                    "message": status.message,
                    "hint": info.metadata.get("hint", ""),
                    "details": details if isinstance(details, dict) else {},
                }
            )
    return None
