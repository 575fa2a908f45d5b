# SPDX-License-Identifier: Apache-2.0
"""The index of one object: which page lies where, as extents (runs of pages that lie one after the other).

Three sorted columns: `firsts` (page numbers), `counts` (pages), `locations`.  A location is
`pack ordinal << 32 | page ordinal in that pack`; `ZERO_LOCATION` for an extent of zero pages.

On disk the columns of all objects follow each other, as differences from what the previous extent predicts, so
that an ordinary dump is a column of zeroes and ones (docs/image-format.md, "Index").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd.errors import ImageDamaged
from checkpointd.image.format import (
    MAX_IMAGE_PAGES,
    MISSING_LOCATION,
    ZERO_LOCATION,
)
from checkpointd.memory import PageNumbers

U64 = npt.NDArray[np.uint64]
_ZERO = np.uint64(ZERO_LOCATION)
_MISSING = np.uint64(MISSING_LOCATION)
MAX_PAGE_NUMBER = 1 << 52  # byte addresses are 64 bit


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """Extents of one object, sorted by page, not overlapping."""

    firsts: U64
    counts: U64
    locations: U64

    @property
    def nr_pages(self) -> int:
        return int(self.counts.sum())

    def pages(self) -> PageNumbers:
        """All page numbers, sorted."""
        return expand(self.firsts, self.counts)

    def page_locations(self) -> U64:
        """The location of each of `pages()`."""
        return expand_locations(self.locations, self.counts)

    def locate(self, pages: PageNumbers) -> U64:
        """The location of each of `pages`, `MISSING_LOCATION` where the index has none."""
        out = np.full(len(pages), _MISSING, dtype=np.uint64)
        if len(self.firsts) == 0 or len(pages) == 0:
            return out
        at = np.searchsorted(self.firsts, pages, side="right").astype(np.int64) - 1
        at_or_0 = np.maximum(at, 0)
        inside = pages - self.firsts[at_or_0]
        found = (at >= 0) & (inside < self.counts[at_or_0])
        base = self.locations[at_or_0]
        out[found] = np.where(base == _ZERO, _ZERO, base + inside)[found]
        return out


NO_INDEX = ObjectIndex(*(np.zeros(0, dtype=np.uint64) for _ in range(3)))


def expand(firsts: U64, counts: U64) -> U64:
    """Every number of the runs `[first, first + count)`, in order."""
    lengths = counts.astype(np.int64)
    total = int(lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    steps = np.arange(total, dtype=np.uint64)
    return np.repeat(firsts - offsets.astype(np.uint64), lengths) + steps  # wraps around and back


def expand_locations(locations: U64, counts: U64) -> U64:
    """As `expand`, but zero extents stay `ZERO_LOCATION`."""
    out = expand(locations, counts)
    out[np.repeat(locations == _ZERO, counts.astype(np.int64))] = _ZERO
    return out


def index_of(pages: PageNumbers, locations: U64) -> ObjectIndex:
    """Extents of sorted, distinct pages and their locations."""
    if len(pages) == 0:
        return NO_INDEX
    zero = locations == _ZERO
    goes_on = (np.diff(pages) == 1) & np.where(zero[1:], zero[:-1], np.diff(locations) == 1)
    # A page after a zero page: the difference of ZERO_LOCATION and location 0 is 1 as well.
    goes_on &= zero[1:] == zero[:-1]
    # An extent lies in one pack.
    goes_on &= (locations[1:] >> np.uint64(32)) == (locations[:-1] >> np.uint64(32))
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(~goes_on) + 1))
    ends = np.append(starts[1:], len(pages))
    return ObjectIndex(pages[starts], (ends - starts).astype(np.uint64), locations[starts])


def encode_columns(indexes: list[ObjectIndex]) -> tuple[bytes, bytes, bytes]:
    """The three columns of all objects, as they are stored before compression."""
    firsts, counts, locations = [], [], []
    for index in indexes:
        firsts.append(_differences(index.firsts, index.counts))
        counts.append(index.counts)
        locations.append(_differences(index.locations, index.counts))
    return (_joined(firsts), _joined(counts), _joined(locations))


def decode_columns(columns: tuple[bytes, bytes, bytes], extents: list[int], path: str) -> list[ObjectIndex]:
    """The index of each object, `extents[k]` being how many extents the k-th has.

    Raises:
        ImageDamaged: lengths that do not fit, extents out of order, empty or out of range.
    """
    if any(len(column) != 8 * sum(extents) for column in columns):
        raise ImageDamaged(f"{path}: the index has the wrong length", path=path)
    firsts, counts, locations = (np.frombuffer(column, dtype="<u8") for column in columns)
    indexes = []
    at = 0
    nr_pages = 0
    for nr in extents:
        part = slice(at, at + nr)
        at += nr
        index = ObjectIndex(
            _sums(firsts[part], counts[part]), counts[part], _sums(locations[part], counts[part])
        )
        ends = index.firsts + index.counts
        if (
            nr
            and not (
                bool((index.counts - np.uint64(1) < MAX_PAGE_NUMBER).all())  # 0 wraps around
                and bool((index.firsts < MAX_PAGE_NUMBER).all())
                and bool((index.firsts[1:] >= ends[:-1]).all())
                and float(index.counts.astype(np.float64).sum()) <= MAX_IMAGE_PAGES
            )
        ):
            raise ImageDamaged(f"{path}: the index is not in order", path=path)
        nr_pages += index.nr_pages
        indexes.append(index)
    if nr_pages > MAX_IMAGE_PAGES:
        raise ImageDamaged(f"{path}: the index claims {nr_pages} pages", path=path)
    return indexes


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
