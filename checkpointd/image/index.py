# SPDX-License-Identifier: Apache-2.0
"""The index of one object: which page lies where, as extents (runs of pages that lie one after the other).

Columns, sorted by page: `firsts` (page numbers), `counts` (pages), `locations`, `bases`.  A location is
`pack ordinal << 32 | page ordinal in that pack`; `ZERO_LOCATION` for an extent of zero pages.  The pages of an extent
with a base are stored as differences from the plain pages there (delta.py); `NO_BASE` for all others.

On disk the columns of all objects follow each other, as differences from what the previous extent predicts, so
that an ordinary dump is a column of zeroes and ones; bases are stored for the extents that have one, in two columns
of their own (docs/image-format.md, "Index").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd.errors import ImageDamaged
from checkpointd.image.format import (
    MAX_IMAGE_PAGES,
    MISSING_LOCATION,
    NO_BASE,
    ZERO_LOCATION,
)
from checkpointd.memory import NO_PAGES, PageNumbers

U64 = npt.NDArray[np.uint64]
_ZERO = np.uint64(ZERO_LOCATION)
_MISSING = np.uint64(MISSING_LOCATION)
NO_BASE_U64 = np.uint64(NO_BASE)
MAX_PAGE_NUMBER = 1 << 52  # byte addresses are 64 bit


@dataclass(frozen=True, slots=True)
class Places:
    """Where pages lie: columns of equal length, one row a page."""

    locations: U64
    bases: U64

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> Places:
        return Places(self.locations[rows], self.bases[rows])


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """Extents of one object, sorted by page, not overlapping."""

    firsts: U64
    counts: U64
    locations: U64
    bases: U64

    @property
    def nr_pages(self) -> int:
        return int(self.counts.sum())

    def pages(self) -> PageNumbers:
        """All page numbers, sorted."""
        return expand(self.firsts, self.counts)

    def page_places(self) -> Places:
        """The place of each of `pages()`."""
        return Places(
            expand_locations(self.locations, self.counts), expand_locations(self.bases, self.counts)
        )

    def locate(self, pages: PageNumbers) -> Places:
        """The place of each of `pages`; its location is `MISSING_LOCATION` where the index has none."""
        out = nowhere(len(pages))
        if len(self.firsts) == 0 or len(pages) == 0:
            return out
        at = np.searchsorted(self.firsts, pages, side="right").astype(np.int64) - 1
        at_or_0 = np.maximum(at, 0)
        inside = pages - self.firsts[at_or_0]
        found = (at >= 0) & (inside < self.counts[at_or_0])
        for column, starts in ((out.locations, self.locations), (out.bases, self.bases)):
            start = starts[at_or_0]
            column[found] = np.where(start == _ZERO, _ZERO, start + inside)[found]
        return out

    def delta_extents(self) -> ObjectIndex:
        """Only the extents that have a base."""
        some = self.bases != NO_BASE_U64
        return ObjectIndex(self.firsts[some], self.counts[some], self.locations[some], self.bases[some])


NO_INDEX = ObjectIndex(*(np.zeros(0, dtype=np.uint64) for _ in range(4)))


def nowhere(nr_pages: int) -> Places:
    """The places of pages that an index lacks."""
    return Places(np.full(nr_pages, _MISSING, dtype=np.uint64), no_bases(nr_pages))


def no_bases(nr_pages: int) -> U64:
    """The column of bases of pages without one."""
    return np.full(nr_pages, NO_BASE_U64, dtype=np.uint64)


def expand(firsts: U64, counts: U64) -> U64:
    """Every number of the runs `[first, first + count)`, in order."""
    lengths = counts.astype(np.int64)
    total = int(lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    steps = np.arange(total, dtype=np.uint64)
    return np.repeat(firsts - offsets.astype(np.uint64), lengths) + steps  # wraps around and back


def expand_locations(locations: U64, counts: U64) -> U64:
    """As `expand`, but zero extents stay `ZERO_LOCATION`, and for bases `NO_BASE`, which is the same number."""
    out = expand(locations, counts)
    out[np.repeat(locations == _ZERO, counts.astype(np.int64))] = _ZERO
    return out


def index_of(pages: PageNumbers, places: Places) -> ObjectIndex:
    """Extents of sorted, distinct pages and their places."""
    if len(pages) == 0:
        return NO_INDEX
    goes_on = np.diff(pages) == 1
    for column in (places.locations, places.bases):
        none = column == _ZERO
        goes_on &= np.where(none[1:], none[:-1], np.diff(column) == 1)
        # A page after a zero page: the difference of ZERO_LOCATION and location 0 is 1 as well.
        goes_on &= none[1:] == none[:-1]
        # An extent, and the extent of its bases, lies in one pack.
        goes_on &= (column[1:] >> np.uint64(32)) == (column[:-1] >> np.uint64(32))
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(~goes_on) + 1))
    ends = np.append(starts[1:], len(pages))
    at = places[starts]
    return ObjectIndex(pages[starts], (ends - starts).astype(np.uint64), at.locations, at.bases)


def encode_columns(indexes: list[ObjectIndex]) -> tuple[bytes, bytes, bytes]:
    """The three columns of all objects, as they are stored before compression."""
    firsts, counts, locations = [], [], []
    for index in indexes:
        firsts.append(_differences(index.firsts, index.counts))
        counts.append(index.counts)
        locations.append(_differences(index.locations, index.counts))
    return (_joined(firsts), _joined(counts), _joined(locations))


def encode_deltas(indexes: list[ObjectIndex]) -> tuple[bytes, bytes]:
    """Which extents of all objects have a base, and the bases; empty when none has."""
    bases = np.concatenate([index.bases for index in indexes] or [NO_PAGES])
    counts = np.concatenate([index.counts for index in indexes] or [NO_PAGES])
    numbers = np.flatnonzero(bases != NO_BASE_U64).astype(np.uint64)
    at = numbers.astype(np.int64)
    ones = np.ones(len(numbers), dtype=np.uint64)
    return _joined([_differences(numbers, ones)]), _joined([_differences(bases[at], counts[at])])


def decode_columns(
    columns: tuple[bytes, bytes, bytes], deltas: tuple[bytes, bytes], extents: list[int], path: str
) -> list[ObjectIndex]:
    """The index of each object, `extents[k]` being how many extents the k-th has.

    Raises:
        ImageDamaged: lengths that do not fit, extents out of order, empty or out of range, a base of a zero page.
    """
    if any(len(column) != 8 * sum(extents) for column in columns):
        raise ImageDamaged(f"{path}: the index has the wrong length", path=path)
    firsts, counts, locations = (np.frombuffer(column, dtype="<u8") for column in columns)
    bases = _decode_bases(deltas, counts, path)
    indexes = []
    at = 0
    nr_pages = 0
    for nr in extents:
        part = slice(at, at + nr)
        at += nr
        index = ObjectIndex(
            _sums(firsts[part], counts[part]),
            counts[part],
            _sums(locations[part], counts[part]),
            bases[part],
        )
        ends = index.firsts + index.counts
        if (
            nr
            and not (
                bool((index.counts - np.uint64(1) < MAX_PAGE_NUMBER).all())  # 0 wraps around
                and bool((index.firsts < MAX_PAGE_NUMBER).all())
                and bool((index.firsts[1:] >= ends[:-1]).all())
                and float(index.counts.astype(np.float64).sum()) <= MAX_IMAGE_PAGES
                and not bool(((index.locations == _ZERO) & (index.bases != NO_BASE_U64)).any())
            )
        ):
            raise ImageDamaged(f"{path}: the index is not in order", path=path)
        nr_pages += index.nr_pages
        indexes.append(index)
    if nr_pages > MAX_IMAGE_PAGES:
        raise ImageDamaged(f"{path}: the index claims {nr_pages} pages", path=path)
    return indexes


def _decode_bases(deltas: tuple[bytes, bytes], counts: U64, path: str) -> U64:
    """The base of each extent of all objects."""
    out = no_bases(len(counts))
    if any(len(column) % 8 for column in deltas) or len(deltas[0]) != len(deltas[1]):
        raise ImageDamaged(f"{path}: its delta extents make no sense", path=path)
    gaps, bases = (np.frombuffer(column, dtype="<u8") for column in deltas)
    if len(gaps) == 0:
        return out
    # Each gap is below the number of extents and there are not more gaps than that, so that the sums do not wrap.
    if len(gaps) > len(counts) or int(gaps.max()) >= len(counts):
        raise ImageDamaged(f"{path}: its delta extents make no sense", path=path)
    numbers = _sums(gaps, np.ones(len(gaps), dtype=np.uint64)).astype(np.int64)
    if int(numbers[-1]) >= len(counts):
        raise ImageDamaged(f"{path}: its delta extents make no sense", path=path)
    out[numbers] = _sums(bases, counts[numbers])
    return out


def _joined(parts: list[U64]) -> bytes:
    return b"".join(part.astype("<u8", copy=False).tobytes() for part in parts)


def _differences(values: U64, counts: U64) -> U64:
    """Each value minus where the previous extent ends (modulo 2**64)."""
    out = values.copy()
    out[1:] -= values[:-1] + counts[:-1]
    return out


def _sums(differences: U64, counts: U64) -> U64:
    """The inverse of `_differences`."""
    steps = differences.copy()
    steps[1:] += counts[:-1]
    return np.cumsum(steps, dtype=np.uint64)
