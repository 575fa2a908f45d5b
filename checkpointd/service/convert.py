# SPDX-License-Identifier: Apache-2.0
"""Plain values (dicts, dataclasses) as protobuf messages."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.service.operations import Event, Operation

if TYPE_CHECKING:
    from checkpointd.image.info import ImageInfo

_STATES = {
    "running": pb.OPERATION_STATE_RUNNING,
    "done": pb.OPERATION_STATE_DONE,
    "failed": pb.OPERATION_STATE_FAILED,
}

_CATEGORIES = {
    "required": pb.CHECK_CATEGORY_REQUIRED,
    "optional": pb.CHECK_CATEGORY_OPTIONAL,
    "target": pb.CHECK_CATEGORY_TARGET,
}


def timestamp(seconds: float) -> Timestamp:
    found = Timestamp()
    found.FromMicroseconds(int(seconds * 1e6))
    return found


def timestamp_of(rfc3339: str) -> Timestamp | None:
    """None for "" and for what is not a time."""
    try:
        return timestamp(datetime.datetime.fromisoformat(rfc3339).timestamp())
    except (ValueError, OverflowError):
        return None


def dump_event(event: Event) -> pb.DumpEvent:
    if event["type"] == "stats":
        return pb.DumpEvent(stats=_stats(pb.DumpStats(), event["value"]))
    if event["type"] == "summary":
        value = event["value"]
        summary = _known(pb.DumpSummary(), value)
        summary.stats.CopyFrom(_stats(pb.DumpStats(), value))
        return pb.DumpEvent(summary=summary)
    return pb.DumpEvent(**_common(event))


def restore_event(event: Event) -> pb.RestoreEvent:
    if event["type"] == "stats":
        return pb.RestoreEvent(stats=_stats(pb.RestoreStats(), event["value"]))
    if event["type"] == "summary":
        value = event["value"]
        summary = _known(pb.RestoreSummary(), value)
        summary.stats.CopyFrom(_stats(pb.RestoreStats(), value))
        return pb.RestoreEvent(summary=summary)
    return pb.RestoreEvent(**_common(event))


def verify_event(event: Event) -> pb.VerifyEvent:
    if event["type"] == "summary":
        return pb.VerifyEvent(summary=_known(pb.VerifySummary(), event["value"]))
    return pb.VerifyEvent(**_common(event))


def measure_event(event: Event) -> pb.MeasureEvent:
    if event["type"] == "record":
        return pb.MeasureEvent(record=pb.MeasureRecord(json=event["json"]))
    if event["type"] == "summary":
        return pb.MeasureEvent(summary=_known(pb.MeasureSummary(), event["value"]))
    return pb.MeasureEvent(**_common(event))


def watch_event(kind: str, event: Event) -> pb.WatchOperationEvent:
    if kind == "dump":
        return pb.WatchOperationEvent(dump=dump_event(event))
    if kind == "restore":
        return pb.WatchOperationEvent(restore=restore_event(event))
    if kind == "measure":
        return pb.WatchOperationEvent(measure=measure_event(event))
    return pb.WatchOperationEvent(verify=verify_event(event))


def operation(found: Operation) -> pb.OperationInfo:
    return pb.OperationInfo(
        id=found.id,
        kind=found.kind,
        pid=found.pid,
        image_id=found.image_id,
        state=_STATES[found.state],
        started_at=timestamp(found.started_at),
    )


def operation_state(found: Operation) -> pb.OperationState:
    return _STATES[found.state]


def image(info: ImageInfo) -> pb.Image:
    values = info.to_dict()
    message: pb.Image = _known(pb.Image(), values)
    message.name = str(values.get("comm", ""))
    created = timestamp_of(str(values.get("created", "")))
    if created is not None:
        message.created_at.CopyFrom(created)
    return message


def check_response(result: Mapping[str, Any]) -> pb.CheckResponse:
    items = [
        pb.CheckItem(
            name=str(item["name"]),
            category=_CATEGORIES.get(str(item["category"]), pb.CHECK_CATEGORY_OPTIONAL),
            ok=bool(item["ok"]),
            detail=str(item.get("detail", "")),
            hint=str(item.get("hint", "")),
        )
        for item in result.get("items", [])
    ]
    return pb.CheckResponse(
        ok=all(item.ok or item.category == pb.CHECK_CATEGORY_OPTIONAL for item in items),
        items=items,
        backend=str(result.get("backend", "")),
        backend_reason=str(result.get("backend_reason", "")),
    )


def _common(event: Event) -> dict[str, Any]:
    if event["type"] == "started":
        return {"started": pb.OperationStarted(operation_id=event["operation_id"])}
    if event["type"] == "phase":
        return {"phase": pb.OperationPhase(phase=event["phase"])}
    return {
        "progress": pb.OperationProgress(done=event["done"], total=event["total"], unit=event["unit"]),
    }


def _stats(message: Any, values: Mapping[str, Any]) -> Any:
    for name, spent_us in values.get("phases", {}).items():
        message.phases[name] = int(spent_us)
    return _known(message, values)


def _known(message: Any, values: Mapping[str, Any]) -> Any:
    """Set the scalar fields (and lists of scalars) that both sides know by the same name."""
    for descriptor in message.DESCRIPTOR.fields:
        value = values.get(descriptor.name)
        if value is None or descriptor.message_type is not None:
            continue
        if isinstance(value, (list, tuple)):
            getattr(message, descriptor.name).extend(value)
        else:
            setattr(message, descriptor.name, value)
    return message
