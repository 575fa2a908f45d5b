# SPDX-License-Identifier: Apache-2.0
"""Nothing a dump or a restore counted is lost between the agent and the user."""

from __future__ import annotations

import dataclasses

from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.client.wire import event, plain
from checkpointd.image.info import ImageInfo
from checkpointd.service import convert
from checkpointd.stats import DumpStats, RestoreStats


def filled(cls):
    """An instance with a different value in every field."""
    values = {}
    for number, field in enumerate(dataclasses.fields(cls), start=1):
        kind = str(field.type)
        if kind.startswith("dict"):
            values[field.name] = {"freezing": 3, "copying": 1 << 40}
        elif kind.startswith("list"):
            values[field.name] = ["one", "two"]
        elif kind == "bool":
            values[field.name] = True
        elif kind == "int":
            values[field.name] = number
        else:
            values[field.name] = f"word {number}"
    return cls(**values)


def test_a_dump_summary_has_every_counter():
    stats = filled(DumpStats)
    stats.bytes_raw = 1 << 50
    got = event(convert.dump_event({"type": "summary", "value": stats.to_dict()}))
    assert got == {"message_type": "summary", **stats.to_dict()}


def test_a_restore_summary_has_every_counter():
    stats = filled(RestoreStats)
    got = event(convert.restore_event({"type": "summary", "value": stats.to_dict()}))
    assert got == {"message_type": "summary", **stats.to_dict()}


def test_criu_s_names_are_kept():
    names = {field.name for field in pb.DumpStats.DESCRIPTOR.fields}
    assert {"pages_scanned", "pages_skipped_parent", "pages_written", "freezing_time", "frozen_time"} <= names


def test_an_image_keeps_its_facts():
    info = dataclasses.replace(filled(ImageInfo), created="2026-01-02T03:04:05.678901Z")
    got = plain(convert.image(info))
    assert got.pop("created_at") == info.created
    assert got.pop("name") == info.comm
    assert got == {name: value for name, value in info.to_dict().items() if name in got}


def test_a_time_that_is_none_is_left_out():
    assert plain(convert.image(ImageInfo(id="ab")))["created_at"] is None


def test_a_check_is_ok_when_only_optional_things_are_missing():
    optional = {"name": "n", "category": "optional", "ok": False, "detail": "d", "hint": "h"}
    assert convert.check_response({"items": [optional]}).ok
    for category in ("required", "target"):
        assert not convert.check_response({"items": [optional, {**optional, "category": category}]}).ok


def test_enums_are_words():
    assert plain(pb.OperationInfo(state=pb.OPERATION_STATE_FAILED))["state"] == "failed"
