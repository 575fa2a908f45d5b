# SPDX-License-Identifier: Apache-2.0
"""Judging one tracker's report of one epoch against the truth.  Pure.

Truth of an epoch is two full reads.  A page *changed* when its bytes differ, where a page that holds no data reads
as zeroes in an anonymous mapping; in a mapping of a file any page of one's own that was not there before counts.

Every page a tracker reports has one *cause*::

    written     held data before, and its bytes differ
    new         held no data before
    new_zero    held no data before, and holds only zeroes: costs an index entry, no data
    forced      unchanged; its kind cannot be tracked (copied-on-write file pages, pinned, KSM, somebody else's uffd)
    merged      unchanged; soft-dirty only: its VMA as a whole is marked (new, or merged with a new one)
    huge        unchanged; soft-dirty only: all 512 pages of a huge page are marked together
    silent      unchanged, yet reported page by page: it was written with the bytes it held

reported = changed + over_reported, and changed = written + new.  *silent* is part of over_reported: where none of
the other causes fits, the kernel has told of this one page, and its bytes are the same.

A page is *missed* when a restore made of the report would hold other bytes: called clean and changed; called clean
and gone; not mentioned at all though it holds data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from checkpointd.measure.truth import NO_PAGES, OBJECTS, U64, Bools, Mapping, object_index

CAUSES = ("written", "new", "new_zero", "forced", "merged", "huge", "silent")
_HUGE_PAGES = 512
MAX_MISSED_NAMED = 64
MAX_MAPPINGS = 400


@dataclass(slots=True)
class Truth:
    """Two reads compared.  All arrays of pages are sorted.

    Attributes:
        before, now: pages that held data then and hold data now.
        before_zero, now_zero: which of them hold only zeroes.
        written: pages in both whose bytes differ.
        mappings: the VMAs now, by address.
        objects: names of shared memory objects by index.
    """

    mappings: Sequence[Mapping]
    before: U64
    before_zero: Bools
    now: U64
    now_zero: Bools
    written: U64
    objects: Sequence[str] = ()
    _starts: U64 = field(init=False)
    _ends: U64 = field(init=False)

    def __post_init__(self) -> None:
        self._starts = np.array([m.start >> 12 for m in self.mappings] or [0], dtype=np.uint64)
        self._ends = np.array([m.end >> 12 for m in self.mappings] or [0], dtype=np.uint64)

    def places(self, pages: U64) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Index into `mappings` of each page; -1 - index for shared objects, and the last + 1 for nowhere."""
        at = np.searchsorted(self._starts, pages, side="right").astype(np.int64) - 1
        outside = (at < 0) | (pages >= self._ends[np.maximum(at, 0)])
        at[outside] = len(self.mappings)
        shared = np.flatnonzero(pages >= np.uint64(OBJECTS))
        at[shared] = [-1 - object_index(int(page)) for page in pages[shared].tolist()]
        return at

    def marked(self, pages: U64, fits: Sequence[bool]) -> Bools:
        """Which pages lie in a mapping that `fits` (one word for each mapping)."""
        places = self.places(pages)
        table = np.array([*fits, False], dtype=bool)
        found: Bools = table[np.clip(places, 0, None)] & (places >= 0)
        return found

    def holds_bytes(self, pages: U64, zero: Bools) -> Bools:
        """Which of these pages would be wrong if they were not there at all."""
        anonymous = self.marked(pages, [m.anonymous for m in self.mappings])
        shared = pages >= np.uint64(OBJECTS)
        nowhere = self.places(pages) == len(self.mappings)
        found: Bools = ~zero | ~(anonymous | shared | nowhere)
        return found

    def new(self) -> tuple[U64, Bools]:
        """Pages that held no data before, and which of them hold only zeroes that an absent page would read as."""
        fresh = ~within(self.now, self.before)
        pages = self.now[fresh]
        return pages, ~self.holds_bytes(pages, self.now_zero[fresh])

    def changed(self) -> U64:
        """All pages that really changed."""
        pages, empty = self.new()
        return np.union1d(self.written, pages[~empty])

    def name(self, page: int) -> str:
        if page >= OBJECTS:
            return f"shared {self.objects[object_index(page)]} page {page & ((1 << 36) - 1)}"
        place = int(self.places(np.array([page], dtype=np.uint64))[0])
        if place == len(self.mappings):
            return f"{page << 12:x} (unmapped)"
        mapping = self.mappings[place]
        return f"{page << 12:x} in {mapping.start:x}-{mapping.end:x} {mapping.prot} {mapping.path}".rstrip()


@dataclass(slots=True)
class Report:
    """What a tracker said, of private pages.

    Attributes:
        clean: inherit these.
        dirty: save these.
        forced: those of `dirty` that are there only because of their kind.
        soft_dirty: the report comes from soft-dirty bits.
        by_content: `dirty` is what digests found different, over all memory.
    """

    clean: U64
    dirty: U64
    forced: U64 = field(default_factory=lambda: NO_PAGES)
    soft_dirty: bool = False
    by_content: bool = False


@dataclass(slots=True)
class Verdict:
    """Counts of pages, and the pages themselves that somebody may want to size."""

    causes: dict[str, int]
    reported: U64
    missed: U64
    missed_why: list[str]
    nr_read: int
    mappings: list[list[int]]

    @property
    def nr_changed(self) -> int:
        return self.causes["written"] + self.causes["new"]

    @property
    def nr_over(self) -> int:
        return len(self.reported) - self.nr_changed

    def to_dict(self, truth: Truth) -> dict[str, Any]:
        return {
            "pages_read": self.nr_read,
            "pages_reported": len(self.reported),
            "pages_changed": self.nr_changed,
            "pages_over_reported": self.nr_over,
            "pages_silent": self.causes["silent"],
            "pages_missed": len(self.missed),
            "causes": self.causes,
            "missed": [
                {"page": truth.name(int(page)), "why": why}
                for page, why in zip(self.missed[:MAX_MISSED_NAMED].tolist(), self.missed_why, strict=False)
            ],
            "mappings": self.mappings,
        }


def within(pages: U64, among: U64) -> Bools:
    """Which of `pages` are in sorted `among`."""
    if len(among) == 0:
        return np.zeros(len(pages), dtype=bool)
    at = np.searchsorted(among, pages)
    at[at == len(among)] = len(among) - 1
    found: Bools = among[at] == pages
    return found


def judge(truth: Truth, report: Report) -> Verdict:
    """See the module's text."""
    shared = truth.now >= np.uint64(OBJECTS)
    if report.by_content:
        clean, reported = report.clean, report.dirty
        nr_read = len(truth.now)
    else:
        # shared memory is no tracker's business: every dump reads it whole and compares
        changed = truth.changed()
        own_shared = truth.now[shared]
        same = own_shared[~within(own_shared, changed)]
        clean = np.union1d(report.clean, same)
        reported = np.union1d(report.dirty, changed[changed >= np.uint64(OBJECTS)])
        nr_read = len(report.dirty) + len(own_shared)
    causes = _causes(truth, report, reported)
    counts = {name: int(where.sum()) for name, where in causes.items()}
    missed, why = _missed(truth, clean, reported)
    return Verdict(counts, reported, missed, why, nr_read, _by_mapping(truth, reported, causes, missed))


def _causes(truth: Truth, report: Report, reported: U64) -> dict[str, Bools]:
    held = within(reported, truth.before)
    fresh, empty = truth.new()
    new_zero = ~held & (within(reported, fresh[empty]) | ~within(reported, truth.now))
    written = held & within(reported, truth.written)
    same = held & ~written
    kinds = [not m.anonymous or m.huge_tlb or (report.soft_dirty and "mg" in m.flags) for m in truth.mappings]
    if report.by_content:
        kinds = [False] * len(kinds)
    forced = same & (within(reported, report.forced) | truth.marked(reported, kinds))
    left = same & ~forced
    merged = huge = np.zeros(len(reported), dtype=bool)
    if report.soft_dirty:
        merged = left & truth.marked(reported, ["sd" in m.flags for m in truth.mappings])
        left &= ~merged
        huge = (
            left
            & _in_whole_blocks(reported)
            & truth.marked(reported, [m.huge_bytes > 0 for m in truth.mappings])
        )
        left &= ~huge
    return {
        "written": written,
        "new": ~held & ~new_zero,
        "new_zero": new_zero,
        "forced": forced,
        "merged": merged,
        "huge": huge,
        "silent": left,
    }


def _in_whole_blocks(pages: U64) -> Bools:
    """Which pages have all pages of their aligned 2 MiB among `pages`."""
    blocks, at, counts = np.unique(pages // np.uint64(_HUGE_PAGES), return_inverse=True, return_counts=True)
    if len(blocks) == 0:
        return np.zeros(0, dtype=bool)
    found: Bools = (counts == _HUGE_PAGES)[at]
    return found


def _missed(truth: Truth, clean: U64, reported: U64) -> tuple[U64, list[str]]:
    changed_yet_clean = clean[within(clean, truth.written)]
    gone = truth.before[~within(truth.before, truth.now)]
    gone_zero = truth.before_zero[~within(truth.before, truth.now)]
    gone = gone[truth.holds_bytes(gone, gone_zero)]
    gone_yet_clean = clean[within(clean, gone)]
    fresh, empty = truth.new()
    new_yet_clean = clean[within(clean, fresh[~empty])]
    silent = ~within(truth.now, clean) & ~within(truth.now, reported)
    unmentioned = truth.now[silent & truth.holds_bytes(truth.now, truth.now_zero)]
    parts = (
        (changed_yet_clean, "it changed and was called clean"),
        (gone_yet_clean, "it is gone and was called clean"),
        (new_yet_clean, "it held no data before and was called clean"),
        (unmentioned, "it holds data and was not mentioned"),
    )
    pages = np.concatenate([part for part, _ in parts])
    why = [text for part, text in parts for _ in range(len(part))]
    return pages, why


def _by_mapping(truth: Truth, reported: U64, causes: dict[str, Bools], missed: U64) -> list[list[int]]:
    """Rows [place, reported, changed, over-reported, missed]; see `Truth.places`; the busiest first."""
    places, at = np.unique(truth.places(reported), return_inverse=True)
    changed = causes["written"] | causes["new"]
    total = np.bincount(at, minlength=len(places))
    real = np.bincount(at, weights=changed, minlength=len(places)).astype(np.int64)
    lost = dict(zip(*(v.tolist() for v in np.unique(truth.places(missed), return_counts=True)), strict=True))
    rows = [
        [int(place), int(nr), int(ok), int(nr - ok), int(lost.pop(int(place), 0))]
        for place, nr, ok in zip(places, total, real, strict=True)
    ]
    rows += [[int(place), 0, 0, 0, int(nr)] for place, nr in lost.items()]
    rows.sort(key=lambda row: (-row[4], -row[1]))
    return rows[:MAX_MAPPINGS]
