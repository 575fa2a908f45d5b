# SPDX-License-Identifier: Apache-2.0
"""Delta pages: a page stored as its difference (XOR) from a plain page that the parent can read at the same place.

A base is always a plain page, never a delta page itself: where the parent's page is a delta page, its base is taken
again.  So a page costs at most one other page to read, however long the chain is (docs/decisions/0005-delta-pages.md).
Bytes that did not change become zeroes, and the compression of the block does the rest.

`DeltaChooser` decides page by page, when an image is written; `DeltaReader` puts pages together again.

Memory: 8 MiB for each thread that writes (256 pages, their bases and differences, a block of bases); a reader up to
`CACHE_BYTES` of blocks, and what its threads work on.

Errors: `ImageDamaged` from reading a block.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from checkpointd.image.digest import Bytes, Digests
from checkpointd.image.format import CODEC_ZSTD, LOCATION_SHIFT, MISSING_LOCATION, ZERO_LOCATION, Compression
from checkpointd.image.index import NO_BASE_U64, U64, Places
from checkpointd.image.pack import Marks, PackReader
from checkpointd.memory import PAGE_SIZE

CACHE_BYTES = 64 << 20
LINE_BYTES = 64

_SHIFT = np.uint64(LOCATION_SHIFT)
_ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)
_LINES = PAGE_SIZE // LINE_BYTES
# Pages are judged in groups by how many of their lines changed, each group by a sample of it.
_GROUP_ENDS = np.array([4, 16, 40, _LINES], dtype=np.int64)
_SAMPLE_PAGES = 8
_PAYS_BELOW = 0.9  # of the plain size: a delta page costs index, and a second read at restore


def difference(pages: Bytes, bases: Bytes) -> Bytes:
    """XOR of whole pages; it is its own inverse.

    Raises:
        ValueError: not equally many bytes, or not whole pages.
    """
    if pages.nbytes != bases.nbytes or pages.nbytes % PAGE_SIZE:
        raise ValueError(f"{pages.nbytes} and {bases.nbytes} bytes are not equally many whole pages")
    return np.bitwise_xor(pages.reshape(-1, PAGE_SIZE), bases.reshape(-1, PAGE_SIZE))


def lines_changed(differences: Bytes) -> npt.NDArray[np.int64]:
    """In how many of its 64 lines of 64 bytes each page, (n, 4096), differs."""
    words = np.ascontiguousarray(differences).view(np.uint64).reshape(-1, _LINES, LINE_BYTES // 8)
    found: npt.NDArray[np.int64] = np.bitwise_or.reduce(words, axis=2).astype(bool).sum(axis=1)
    return found


def bases_of(places: Places) -> U64:
    """The plain page that a page at the same place may be stored against; `NO_BASE` for none.

    Pages of zeroes are none: a difference from zeroes is the page itself.
    """
    bases = np.where(places.bases == NO_BASE_U64, places.locations, places.bases)
    bases[
        (places.locations == np.uint64(MISSING_LOCATION)) | (places.locations == np.uint64(ZERO_LOCATION))
    ] = NO_BASE_U64
    return bases


class DeltaChooser:
    """Which pages are smaller as deltas.  One for a thread at a time."""

    def __init__(self, compression: Compression) -> None:
        """Raises:
        ValueError: without compression a delta is as large as the page.
        """
        if compression.codec != CODEC_ZSTD:
            raise ValueError("deltas need compression")
        self._compressor = zstandard.ZstdCompressor(level=compression.level, write_checksum=False)

    def choose(self, pages: Bytes, differences: Bytes) -> Marks:
        """For each page, (n, 4096), and its difference from its base: is it to be stored as a delta?

        Pages with about as many changed lines are compared as a group: some of them are compressed both ways.
        """
        chosen = np.zeros(len(pages), dtype=bool)
        groups = np.searchsorted(_GROUP_ENDS, lines_changed(differences))
        for group in np.flatnonzero(np.bincount(groups)):
            members = np.flatnonzero(groups == group)
            step = -(-len(members) // _SAMPLE_PAGES)
            sample = members[::step]
            plain, delta = self._size(pages[sample]), self._size(differences[sample])
            chosen[members] = delta < _PAYS_BELOW * plain
        return chosen

    def _size(self, pages: Bytes) -> int:
        return len(self._compressor.compress(pages.reshape(-1).data))


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows that need pages of one block."""

    number: int
    block: int
    rows: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]


class DeltaReader:
    """Adds what delta pages hold to their bases.  Safe for many threads.

    Blocks of delta pages are kept a while: those of one generation lie spread over the whole memory, so that block
    after block of bases needs the same few of them.
    """

    def __init__(self, packs: list[PackReader]) -> None:
        self._packs = packs
        self._mutex = threading.Lock()
        self._blocks: OrderedDict[tuple[int, int], Bytes] = OrderedDict()
        self._nr_bytes = 0

    def apply(self, pages: Bytes, rows: npt.NDArray[np.int64], locations: U64) -> None:
        """Make of the bases in these rows of `pages`, (n, 4096), the pages whose deltas lie at `locations`."""
        for run in self._runs(rows, locations):
            pages[run.rows] ^= self._block(run.number, run.block)[run.slots]

    def digests(self, locations: U64) -> Digests:
        """The digests, (n, 2), of the whole pages whose deltas lie at `locations`."""
        out = np.empty((len(locations), 2), dtype=np.uint64)
        numbers = locations >> _SHIFT
        for number in np.unique(numbers):
            at = numbers == number
            out[at] = self._packs[int(number)].digests[(locations[at] & _ORDINAL).astype(np.int64)]
        return out

    def _runs(self, rows: npt.NDArray[np.int64], locations: U64) -> list[_Run]:
        order = np.argsort(locations, kind="stable")
        rows, locations = rows[order], locations[order]
        numbers = (locations >> _SHIFT).astype(np.int64)
        ordinals = (locations & _ORDINAL).astype(np.int64)
        runs = []
        for number in np.unique(numbers).tolist():
            pack = self._packs[number]
            mine = np.flatnonzero(numbers == number)
            blocks = pack.block_of(ordinals[mine].astype(np.uint64))
            for part in np.split(np.arange(len(mine)), np.flatnonzero(np.diff(blocks)) + 1):
                block = int(blocks[part[0]])
                slots = ordinals[mine[part]] - int(pack.block_firsts[block])
                runs.append(_Run(number, block, rows[mine[part]], slots))
        return runs

    def _block(self, number: int, block: int) -> Bytes:
        key = (number, block)
        with self._mutex:
            if (known := self._blocks.get(key)) is not None:
                self._blocks.move_to_end(key)
                return known
        data = self._packs[number].read_block(block)
        with self._mutex:
            if key not in self._blocks:
                self._blocks[key] = data
                self._nr_bytes += data.nbytes
                while self._nr_bytes > CACHE_BYTES and len(self._blocks) > 1:
                    self._nr_bytes -= self._blocks.popitem(last=False)[1].nbytes
        return data
