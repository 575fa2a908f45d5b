# SPDX-License-Identifier: Apache-2.0
"""The index of an image in the making: which pages were given, and where they lie.

Packs are numbered from 0: first those of the parent, then the new ones; `renumbered` gives them the numbers they have
in the image.  Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from checkpointd.image.format import LOCATION_SHIFT, ZERO_LOCATION
from checkpointd.image.index import U64, ObjectIndex, Places, index_of
from checkpointd.memory import PageNumbers

SHIFT = np.uint64(LOCATION_SHIFT)
ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)
NOTHING = np.uint64(ZERO_LOCATION)
"""Of a location: a page of zeroes; of a base: none."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Pages of one object and their places."""

    pages: PageNumbers
    places: Places


def locations_of(pack_number: int, first: int, nr_pages: int) -> U64:
    """The locations of pages that lie one after the other in a pack."""
    start = (pack_number << LOCATION_SHIFT) + first
    return np.arange(start, start + nr_pages, dtype=np.uint64)


def checked_pages(obj: int, pages: PageNumbers) -> PageNumbers:
    """`pages` as a column.

    Raises:
        ValueError: they are not sorted and distinct.
    """
    if obj < 0:
        raise ValueError(f"object {obj} is negative")
    pages = np.asarray(pages, dtype=np.uint64)
    if len(pages) > 1 and not bool((pages[1:] > pages[:-1]).all()):
        raise ValueError("page numbers must be sorted and distinct")
    return pages


def merge(obj: int, parts: list[Columns]) -> Columns:
    """All parts of an object as one, sorted by page.

    Raises:
        ValueError: a page was given twice.
    """
    # each is sorted, and seldom do two overlap: in order there is nothing left to sort
    parts = sorted(parts, key=lambda part: int(part.pages[0]) if len(part.pages) else 0)
    pages = np.concatenate([part.pages for part in parts])
    places = Places(
        np.concatenate([part.places.locations for part in parts]),
        np.concatenate([part.places.bases for part in parts]),
    )
    if len(pages) > 1 and not bool((pages[1:] > pages[:-1]).all()):
        order = np.argsort(pages, kind="stable")
        pages, places = pages[order], places[order]
        twice = np.flatnonzero(pages[1:] == pages[:-1])
        if len(twice):
            raise ValueError(f"page {int(pages[twice[0]]):#x} of object {obj} was given twice")
    return Columns(pages, places)


def renumbered(merged: dict[int, Columns], nr_packs: int) -> tuple[list[int], dict[int, ObjectIndex]]:
    """Drop packs that hold neither a live page nor a base; returns those used, and the index in their new numbers."""
    seen = np.zeros(nr_packs, dtype=bool)
    for columns in merged.values():
        for column in (columns.places.locations, columns.places.bases):
            numbers = (column[column != NOTHING] >> SHIFT).astype(np.int64)
            seen |= np.bincount(numbers, minlength=nr_packs) > 0  # faster than np.unique
    used = np.flatnonzero(seen)
    renamed = np.zeros(nr_packs, dtype=np.uint64)
    renamed[used] = np.arange(len(used), dtype=np.uint64)
    objects = {}
    for obj, columns in merged.items():
        if len(columns.pages) == 0:
            continue
        places = Places(_renamed(columns.places.locations, renamed), _renamed(columns.places.bases, renamed))
        objects[obj] = index_of(columns.pages, places)
    return used.tolist(), objects


def _renamed(column: U64, renamed: U64) -> U64:
    new = column.copy()
    real = column != NOTHING
    numbers = renamed[(column[real] >> SHIFT).astype(np.int64)]
    new[real] = (numbers << SHIFT) | (column[real] & ORDINAL)
    return new
