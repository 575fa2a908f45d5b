# SPDX-License-Identifier: Apache-2.0
"""One open image: its meta, state, index and pages.

An `Image` holds its packs open: it stays readable while other images, or it itself, are removed from the store.
Any number of threads may read at once.  What is read has been compared with the checksum of its block.

Errors: `ImageDamaged` naming the file; `KeyError` for a page the image does not hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd.errors import ImageDamaged
from checkpointd.image.digest import Bytes, Digests, zero_digest
from checkpointd.image.format import (
    BLOCK_PAGES,
    LOCATION_SHIFT,
    MAX_BLOCK_PAGES,
    MISSING_LOCATION,
    ZERO_LOCATION,
)
from checkpointd.image.imagefile import Head, read_state
from checkpointd.image.index import NO_BASE_U64, NO_INDEX, U64, ObjectIndex, Places, expand
from checkpointd.image.info import ImageInfo
from checkpointd.image.pack import PackReader
from checkpointd.image.stream import Chunk, Visitor, stream_pages, visit_pages
from checkpointd.memory import NO_PAGES, PAGE_SIZE, PageNumbers

_SHIFT = np.uint64(LOCATION_SHIFT)
_ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)


class Image:
    """An image as it was committed.  Made by `Store.load`."""

    def __init__(
        self,
        *,
        info: ImageInfo,
        head: Head,
        data: bytes,
        index: dict[int, ObjectIndex],
        packs: list[PackReader],
        seed: int,
        store_id: str,
    ) -> None:
        self.info = info
        self.meta: dict[str, Any] = head.meta
        self.store_id = store_id
        self.packs = packs
        self.index = index
        self._path = f"images/{info.id}.img"
        self._head = head
        self._state_bytes = read_state(data, head, self._path)
        self._seed = seed
        self._zero = zero_digest(seed)
        self._check_locations()

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def state(self) -> bytes:
        """The state of the process as the dump gave it; opaque here."""
        return self._state_bytes

    def objects(self) -> list[int]:
        """Ids of the objects that have pages, sorted."""
        return sorted(self.index)

    def pages(self, obj: int) -> PageNumbers:
        """All pages of an object, zero pages included; none for an unknown object."""
        return self._of(obj).pages()

    def zero_pages(self, obj: int) -> PageNumbers:
        """The pages of an object that hold only zeroes (`stream` leaves them out)."""
        index = self._of(obj)
        zero = index.locations == np.uint64(ZERO_LOCATION)
        return expand(index.firsts[zero], index.counts[zero]) if zero.any() else NO_PAGES

    def has(self, obj: int, pages: PageNumbers) -> npt.NDArray[np.bool_]:
        """For each of `pages`: is it in the image?"""
        present: npt.NDArray[np.bool_] = self._of(obj).locate(pages).locations != np.uint64(MISSING_LOCATION)
        return present

    def digests(self, obj: int, pages: PageNumbers | None = None) -> Digests:
        """The digests, (n, 2), of an object's pages: all of them, or those asked for.

        Raises:
            KeyError: a page is not in the image.
        """
        index = self._of(obj)
        places = index.page_places() if pages is None else self._locate(obj, pages)
        return self.digests_at(places.locations)

    def digests_at(self, locations: U64) -> Digests:
        """The digests, (n, 2), of what lies at `locations` (none of them missing)."""
        out = np.empty((len(locations), 2), dtype=np.uint64)
        zero = locations == np.uint64(ZERO_LOCATION)
        out[zero] = self._zero
        if not zero.all():
            packs = locations >> _SHIFT
            for number in np.unique(packs[~zero]):
                at = packs == number
                at &= ~zero
                out[at] = self.packs[int(number)].digests[(locations[at] & _ORDINAL).astype(np.int64)]
        return out

    def read(self, obj: int, pages: PageNumbers, into: Bytes | None = None) -> Bytes:
        """The contents of `pages` (in any order), one after the other.

        Args:
            into: len(pages) * 4096 bytes, contiguous, to be filled; made when missing.

        Raises:
            KeyError: a page is not in the image.
            ImageDamaged: a block does not have its checksum.
        """
        places = self._locate(obj, pages)
        if into is None:
            into = np.empty(len(pages) * PAGE_SIZE, dtype=np.uint8)
        if into.nbytes != len(pages) * PAGE_SIZE or not into.flags.c_contiguous:
            raise ValueError("`into` must be contiguous and hold exactly the pages asked for")
        out = into.reshape(-1, PAGE_SIZE)
        self.read_places(places, out)
        return into

    def read_places(self, places: Places, out: Bytes) -> None:
        """Fill the rows of `out`, (n, 4096), with the pages at `places` (none of them missing)."""
        self.read_stored(places.locations, out)
        based = np.flatnonzero(places.bases != NO_BASE_U64)
        for at in range(0, len(based), MAX_BLOCK_PAGES):
            rows = based[at : at + MAX_BLOCK_PAGES]
            bases = np.empty((len(rows), PAGE_SIZE), dtype=np.uint8)
            self.read_stored(places.bases[rows], bases)
            out[rows] ^= bases

    def read_stored(self, locations: U64, out: Bytes) -> None:
        """Fill the rows of `out`, (n, 4096), with what is stored at `locations` (none of them missing)."""
        zero = locations == np.uint64(ZERO_LOCATION)
        if zero.any():
            out[zero] = 0
        wanted = np.flatnonzero(~zero)
        wanted = wanted[np.argsort(locations[wanted], kind="stable")]
        packs = (locations[wanted] >> _SHIFT).astype(np.int64)
        ordinals = locations[wanted] & _ORDINAL
        for number in np.unique(packs):
            pack = self.packs[int(number)]
            of_pack = packs == number
            self._read_from(pack, ordinals[of_pack], wanted[of_pack], out)

    def stream(
        self, *, threads: int = 2, chunk_pages: int = 4 * BLOCK_PAGES, verify_digests: bool = False
    ) -> Iterator[Chunk]:
        """Every page that is not zero, once, in the order of the disk: (obj, sorted pages, their bytes).

        The bytes are valid until the next item is asked for.  A chunk has at most `chunk_pages` pages, all of
        one object.  `threads` read and decompress ahead.

        Raises:
            ImageDamaged: a block does not have its checksum, or with `verify_digests` a page its digest.
        """
        seed = self._seed if verify_digests else None
        return stream_pages(
            self.index, self.packs, threads=threads, chunk_pages=chunk_pages, digest_seed=seed
        )

    def stream_deltas(self) -> Iterator[Chunk]:
        """As `stream`, the pages that are stored as deltas alone, each compared with its digest."""
        index = {obj: part for obj in self.index if (part := self.index[obj].delta_extents()).nr_pages}
        return stream_pages(index, self.packs, threads=2, chunk_pages=4 * BLOCK_PAGES, digest_seed=self._seed)

    def visit(self, visitor: Visitor, *, threads: int = 2) -> None:
        """Call `visitor` with every page that is not zero, once: (obj, sorted pages, their bytes in parts).

        It is called on `threads` threads at the same time, each for other pages.  A part, (first row, row after the
        last, bytes), is read and checked when it is taken from the iterable, and holds until the next one is taken.

        Raises:
            ImageDamaged: a block does not have its checksum; what the visitor raises.
        """
        visit_pages(self.index, self.packs, visitor, threads=threads)

    def _read_from(
        self, pack: PackReader, ordinals: U64, destinations: npt.NDArray[np.intp], out: Bytes
    ) -> None:
        """Copy the pages with these sorted ordinals of one pack to rows of `out`."""
        blocks = pack.block_of(ordinals)
        changes = np.flatnonzero(np.diff(blocks)) + 1
        scratch: Bytes | None = None
        for lo, hi in zip(
            np.append(0, changes).tolist(), np.append(changes, len(blocks)).tolist(), strict=True
        ):
            block = int(blocks[lo])
            slots = ordinals[lo:hi].astype(np.int64) - int(pack.block_firsts[block])
            rows = destinations[lo:hi]
            nr_pages = int(pack.block_pages[block])
            if (
                hi - lo == nr_pages
                and int(rows[-1]) - int(rows[0]) == nr_pages - 1
                and bool((np.diff(rows) == 1).all())
                and bool((np.diff(slots) == 1).all())
            ):
                room = out[int(rows[0]) : int(rows[0]) + nr_pages]
                data = pack.read_block(block, room)
                if not np.shares_memory(data, room):
                    room[:] = data
                continue
            if scratch is None:
                scratch = np.empty((MAX_BLOCK_PAGES, PAGE_SIZE), dtype=np.uint8)
            out[rows] = pack.read_block(block, scratch)[slots]

    def _locate(self, obj: int, pages: PageNumbers) -> Places:
        places = self._of(obj).locate(pages)
        missing = places.locations == np.uint64(MISSING_LOCATION)
        if missing.any():
            raise KeyError(
                f"image {self.info.id[:12]} has no page {int(pages[missing][0]):#x} of object {obj}"
            )
        return places

    def _of(self, obj: int) -> ObjectIndex:
        return self.index.get(obj, NO_INDEX)

    def _check_locations(self) -> None:
        """Every extent must lie within one of the packs, and be plain or not as its index says; so must all bases."""
        for index in self.index.values():
            real = index.locations != np.uint64(ZERO_LOCATION)
            based = index.bases != NO_BASE_U64
            self._check_extents(index.locations[real & ~based], index.counts[real & ~based], deltas=False)
            self._check_extents(index.locations[based], index.counts[based], deltas=True)
            self._check_extents(index.bases[based], index.counts[based], deltas=False)

    def _check_extents(self, locations: U64, counts: U64, *, deltas: bool) -> None:
        numbers = (locations >> _SHIFT).astype(np.int64)
        firsts = (locations & _ORDINAL).astype(np.int64)
        lengths = counts.astype(np.int64)
        for number in np.unique(numbers).tolist():
            at = numbers == number
            if number >= len(self.packs) or bool(
                (firsts[at] + lengths[at] > self.packs[number].nr_pages).any()
            ):
                raise ImageDamaged(f"{self._path}: the index points outside of its packs", path=self._path)
            marks = self.packs[number].deltas
            if marks is None and not deltas:
                continue
            before = np.zeros(self.packs[number].nr_pages + 1, dtype=np.int64)
            if marks is not None:
                np.cumsum(marks, out=before[1:])
            marked = before[firsts[at] + lengths[at]] - before[firsts[at]]
            if bool((marked != (lengths[at] if deltas else 0)).any()):
                raise ImageDamaged(
                    f"{self._path}: the index and its packs differ about delta pages", path=self._path
                )


def pread_all(fd: int, limit_bytes: int, path: str) -> bytes:
    """A whole file, when it is not longer than `limit_bytes`.

    Raises:
        ImageDamaged: it is longer.
    """
    size_bytes = os.fstat(fd).st_size
    if size_bytes > limit_bytes:
        raise ImageDamaged(f"{path}: {size_bytes} bytes is more than an image can have", path=path)
    parts = []
    at = 0
    while chunk := os.pread(fd, 8 << 20, at):
        parts.append(chunk)
        at += len(chunk)
        if at > size_bytes:
            break
    return b"".join(parts)
