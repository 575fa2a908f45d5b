# SPDX-License-Identifier: Apache-2.0
"""What `ls` shows of an image.  Frozen values, no I/O."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageInfo:
    """Facts of one image; those of the dump come from the image's meta and may be empty.

    Attributes:
        sequence: commits of one store are numbered 1, 2, ...; `latest` is the highest.
        created: RFC 3339, UTC.
        nr_pages: pages in the index, zero pages included.
        pages_delta: of the pages this image itself stored, those that are differences.
        bytes_raw: size of the pages this image itself stored, uncompressed.
        bytes_stored: what this image added to the disk: its packs, index and state.
        damaged: why the header cannot be read; empty when it can.  All else is then unknown.
    """

    id: str
    parent_id: str = ""
    sequence: int = 0
    created: str = ""
    pid: int = 0
    comm: str = ""
    cmdline: str = ""
    tag: str = ""
    backend: str = ""
    incremental: bool = False
    host: str = ""
    boot_id: str = ""
    start_time: int = 0
    nr_pages: int = 0
    pages_delta: int = 0
    bytes_raw: int = 0
    bytes_stored: int = 0
    format_version: int = 0
    damaged: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


MAX_CMDLINE = 4096
"""Characters of a command line that are kept: it is there to be recognised."""

_LIMITS = {"pid": 1 << 31, "format_version": 1 << 31}
"""All other numbers fit 64 bits with a sign."""


@dataclass(frozen=True)
class PageCounts:
    """What became of pages given to a builder: zero, same as the parent's, written, and how many of these as deltas."""

    zero: int = 0
    same: int = 0
    written: int = 0
    delta: int = 0

    def __add__(self, other: PageCounts) -> PageCounts:
        return PageCounts(
            self.zero + other.zero,
            self.same + other.same,
            self.written + other.written,
            self.delta + other.delta,
        )


def now_rfc3339() -> str:
    """The time of now, UTC, to the microsecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def info_from_meta(image_id: str, meta: dict[str, Any], **facts: Any) -> ImageInfo:
    """The info of an image whose meta says `meta`; values of the wrong type or range count as absent."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ImageInfo):
        value = meta.get(field.name)
        default = field.default
        if field.name == "cmdline" and isinstance(value, list):
            value = " ".join(str(word) for word in value)
        if field.name == "cmdline" and isinstance(value, str):
            value = value[:MAX_CMDLINE]
        if type(value) is int and not 0 <= value < _LIMITS.get(field.name, 1 << 63):
            continue
        if value is not None and type(value) is type(default):
            values[field.name] = value
    values.update(facts)
    values["id"] = image_id
    return ImageInfo(**values)
