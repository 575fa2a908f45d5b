# SPDX-License-Identifier: Apache-2.0
"""Which extents of an index fill whole blocks: these are read and handed on without a look at any single page.

Raises ImageDamaged when a block that is read does not have its checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd.image.digest import Bytes
from checkpointd.image.format import LOCATION_SHIFT, ZERO_LOCATION
from checkpointd.image.index import NO_BASE_U64, U64, ObjectIndex
from checkpointd.image.pack import PackReader
from checkpointd.memory import PageNumbers

_SHIFT = np.uint64(LOCATION_SHIFT)
_ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)
_MOST_BLOCKS = 16  # what a thread takes at once, 16 MiB of our own blocks
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WholeBlocks:
    """Adjacent blocks of one pack that hold adjacent pages of one object and nothing else.

    Attributes:
        first_page: the page at the start of the first block.
    """

    pack: PackReader
    first_block: int
    nr_blocks: int
    obj: int
    first_page: int

    def pages(self) -> PageNumbers:
        blocks = slice(self.first_block, self.first_block + self.nr_blocks)
        nr_pages = int(self.pack.block_pages[blocks].sum())
        return np.arange(self.first_page, self.first_page + nr_pages, dtype=np.uint64)

    def read(self, room: Bytes) -> Iterator[tuple[int, int, Bytes]]:
        """Block after block: (first row, row after the last, bytes), in `room` (1024, 4096) or elsewhere."""
        row = 0
        for block in range(self.first_block, self.first_block + self.nr_blocks):
            data = self.pack.read_block(block, room)
            yield row, row + len(data), data.reshape(-1)
            row += len(data)


def split(
    index: dict[int, ObjectIndex], packs: list[PackReader], *, nr_parts: int
) -> tuple[list[WholeBlocks], dict[int, ObjectIndex]]:
    """(what fills whole blocks, in the order of the disk; all the rest).

    Args:
        nr_parts: have at least so many of the former, where there are as many blocks.
    """
    found: list[tuple[int, int, int, int, int]] = []  # pack, first block, block after the last, object, page
    rest: dict[int, ObjectIndex] = {}
    for obj, part in index.items():
        first_rows, rows_left = _split_object(obj, part, packs)
        found += first_rows
        if len(rows_left.firsts):
            rest[obj] = rows_left
    found.sort()
    nr_blocks = sum(end - first for _, first, end, _, _ in found)
    most = max(1, min(_MOST_BLOCKS, nr_blocks // max(1, nr_parts)))
    whole = []
    for number, first, end, obj, page in found:
        pack = packs[number]
        for block in range(first, end, most):
            skipped = int(pack.block_firsts[block] - pack.block_firsts[first])
            whole.append(WholeBlocks(pack, block, min(most, end - block), obj, page + skipped))
    return whole, rest


def _split_object(
    obj: int, part: ObjectIndex, packs: list[PackReader]
) -> tuple[list[tuple[int, int, int, int, int]], ObjectIndex]:
    plain = (part.locations != np.uint64(ZERO_LOCATION)) & (part.bases == NO_BASE_U64)
    numbers = np.where(plain, part.locations >> _SHIFT, np.uint64(len(packs))).astype(np.int64)
    firsts = (part.locations & _ORDINAL).astype(np.int64)
    counts = part.counts.astype(np.int64)
    first_blocks, end_blocks, heads, insides = (np.zeros(len(firsts), dtype=np.int64) for _ in range(4))
    for number in np.unique(numbers[plain]).tolist():
        pack, at = packs[number], np.flatnonzero(numbers == number)
        ends = pack.block_firsts + pack.block_pages
        first = np.searchsorted(pack.block_firsts, firsts[at], side="left")
        end = np.searchsorted(ends, firsts[at] + counts[at], side="right")
        at, first, end = (column[end > first] for column in (at, first, end))
        first_blocks[at], end_blocks[at] = first, end
        heads[at] = pack.block_firsts[first] - firsts[at]
        insides[at] = ends[end - 1] - pack.block_firsts[first]
    is_whole = end_blocks > first_blocks
    if not is_whole.any():
        return [], part
    pages = part.firsts.astype(np.int64) + heads
    rows = (numbers, first_blocks, end_blocks, np.full(len(numbers), obj), pages)
    found = list(zip(*(column[is_whole].tolist() for column in rows), strict=True))
    tails = counts - heads - insides
    return found, _joined(
        [
            _cut(part, ~is_whole, np.zeros_like(counts), counts),
            _cut(part, is_whole & (heads > 0), np.zeros_like(counts), heads),
            _cut(part, is_whole & (tails > 0), heads + insides, tails),
        ]
    )


def _cut(part: ObjectIndex, rows: npt.NDArray[np.bool_], skipped: _Ints, counts: _Ints) -> ObjectIndex:
    """Of each of these extents `counts` pages after `skipped` ones; a plain one where any are skipped."""
    by: U64 = skipped[rows].astype(np.uint64)
    return ObjectIndex(
        part.firsts[rows] + by, counts[rows].astype(np.uint64), part.locations[rows] + by, part.bases[rows]
    )


def _joined(parts: list[ObjectIndex]) -> ObjectIndex:
    columns = [
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("firsts", "counts", "locations", "bases")
    ]
    order = np.argsort(columns[0], kind="stable")
    return ObjectIndex(*(column[order] for column in columns))
