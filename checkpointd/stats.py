# SPDX-License-Identifier: Apache-2.0
"""Counters of a dump and of a restore, with CRIU's names where CRIU has one (images/stats.proto).

Times are microseconds, sizes bytes, `pages_*` count 4 KiB pages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass
class DumpStats:
    """What one dump did.

    pages_scanned = pages_skipped_parent + pages_same + pages_zero + pages_written.
    """

    image_id: str = ""
    parent_id: str = ""
    pid: int = 0
    backend: str = ""
    backend_reason: str = ""
    incremental: bool = False
    pages_scanned: int = 0  # pages that hold data, in all tracked objects
    pages_dirty: int = 0  # of those, what the tracker (or lack of one) made us read
    pages_skipped_parent: int = 0  # inherited without being read
    pages_same: int = 0  # read, and equal to the parent's
    pages_zero: int = 0  # read, and all zero
    pages_written: int = 0  # stored in this image
    pages_delta: int = 0  # of those, stored as differences from the parent's
    delta_reason: str = ""  # why none could be, when that was asked for
    bytes_raw: int = 0  # pages_written * 4096
    bytes_stored: int = 0  # what this image takes on disk, index and state included
    freezing_time: int = 0  # first interrupt to last thread stopped
    frozen_time: int = 0  # last thread stopped to first thread let go
    total_time: int = 0
    read_mode: str = ""  # "stopped" or "fork"
    nr_vmas: int = 0
    nr_threads: int = 0
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class RestoreStats:
    """What one restore did."""

    image_id: str = ""
    pid: int = 0
    pages_restored: int = 0
    total_time: int = 0
    restore_time: int = 0  # from the first call in the new process to the last thread let go
    nr_threads: int = 0
    tracking: str = ""  # backend armed before the first instruction, "" when none
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
