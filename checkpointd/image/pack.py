# SPDX-License-Identifier: Apache-2.0
"""Packs: files of page data in blocks, with the block table and the page digests at the end.

A pack is written once by one `PackWriter` (one thread at a time) and then never changes; its id is a digest of
all it holds but the page data, and the block table holds a checksum of that.  `PackReader` keeps the file open,
so a pack removed meanwhile stays readable.  Pages of a pack are numbered in the order of writing: their
*ordinal*; the digest table is in the same order.

A pack may hold *delta pages*, the differences of pages from others (delta.py); it is then of version 2 and says which
they are.  Their digests are those of the whole pages, not of what is stored.

Errors: `ImageDamaged`, `UnknownFormat` when reading; OSError passes through when writing (the builder
translates it).
"""

from __future__ import annotations

import hashlib
import os
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import zstandard

from checkpointd.errors import ImageDamaged
from checkpointd.image import files
from checkpointd.image.digest import Bytes, Digests
from checkpointd.image.format import (
    BLOCK,
    BLOCK_PAGES,
    CODEC_NONE,
    CODEC_ZSTD,
    DELTA_VERSION,
    FORMAT_VERSION,
    MAX_BLOCK_PAGES,
    MIN_DIRECT_PAGES,
    PACK_END_MAGIC,
    PACK_HEADER,
    PACK_MAGIC,
    PACK_TRAILER,
    Compression,
    check_version,
    checksum,
    decompress,
)
from checkpointd.image.xxh3 import DIGEST_BYTES
from checkpointd.memory import PAGE_SIZE

Marks = npt.NDArray[np.bool_]

BLOCK_DTYPE = np.dtype(
    [("stored", "<u4"), ("nr_pages", "<u4"), ("codec", "<u4"), ("reserved", "<u4"), ("checksum", "V16")]
)
_KEEP_COMPRESSED_BELOW = 0.95  # a block that saves less is stored as it is: it then reads at memory speed
_SAMPLE_FROM_PAGES = 64
_FLUSH_BYTES = 32 << 20  # the disk works while we do: measured to save a third of a synced dump


class PackWriter:
    """Fills blocks and writes them; `append` returns the ordinal of the first page it was given."""

    def __init__(
        self, name: str, dir_fd: int, compression: Compression, flusher: ThreadPoolExecutor | None = None
    ) -> None:
        """With a `flusher` the data goes to the disk in the background as it comes, and `finish` syncs the rest."""
        self.name = name
        self._flusher = flusher
        self._flushing: Future[None] | None = None
        self._flushed = 0  # offset up to which a background flush was asked for
        self.nr_pages = 0  # staged ones included
        self.bytes_written = 0
        self._fd = files.create_file(name, dir_fd)
        self._compressor = (
            zstandard.ZstdCompressor(level=compression.level, write_checksum=False)
            if compression.codec == CODEC_ZSTD
            else None
        )
        self._nonce = os.urandom(16)
        self._offset = files.write_at(self._fd, self._header(FORMAT_VERSION), 0)
        self._blocks: list[bytes] = []
        self._digests: list[Digests] = []
        self._deltas: list[tuple[int, Marks | None]] = []  # of so many pages; none where there are no marks
        self._nr_deltas = 0
        self._staged_deltas = False
        self._staging = np.empty((BLOCK_PAGES, PAGE_SIZE), dtype=np.uint8)
        self._nr_staged = 0

    def append(
        self,
        pages: Bytes,
        digests: Digests,
        keep: npt.NDArray[np.intp] | None = None,
        deltas: Marks | None = None,
    ) -> int:
        """Add the pages, (n, 4096), or those at the sorted positions `keep`.

        A whole block goes to the file straight from the caller's memory; the rest is gathered first.

        Args:
            digests: of what is added; of a delta page that of the whole page.
            deltas: which of what is added are delta pages; none when missing.
        """
        first = self.nr_pages
        nr = len(pages) if keep is None else len(keep)
        self._digests.append(digests)
        self._deltas.append((nr, deltas))
        nr_deltas = 0 if deltas is None else int(np.count_nonzero(deltas))
        self._nr_deltas += nr_deltas
        self._staged_deltas |= nr_deltas > 0
        self.nr_pages += nr
        done = 0
        while done < nr:
            if keep is None and nr - done >= BLOCK_PAGES:
                if self._nr_staged >= MIN_DIRECT_PAGES:
                    self._flush()
                if self._nr_staged == 0:
                    self._write_block(pages[done : done + BLOCK_PAGES])
                    done += BLOCK_PAGES
                    continue
            nr_now = min(nr - done, BLOCK_PAGES - self._nr_staged)
            room = self._staging[self._nr_staged : self._nr_staged + nr_now]
            if keep is None:
                room[:] = pages[done : done + nr_now]
            else:  # mode="clip" lets numpy write into `room` without a copy; positions are in range
                np.take(pages, keep[done : done + nr_now], axis=0, out=room, mode="clip")
            self._nr_staged += nr_now
            done += nr_now
            if self._nr_staged == BLOCK_PAGES:
                self._flush()
        return first

    def finish(self) -> str:
        """Write the tables; returns the pack's id.  The file is complete, and durable when there is a flusher."""
        self._flush()
        table_offset = self._offset
        digests = [digests.astype("<u8", copy=False).tobytes() for digests in self._digests]
        version, marks = FORMAT_VERSION, b""
        if self._nr_deltas:
            version = DELTA_VERSION
            columns = [np.zeros(nr, dtype=bool) if some is None else some for nr, some in self._deltas]
            marks = np.packbits(np.concatenate(columns), bitorder="little").tobytes()
            files.write_at(self._fd, self._header(version), 0)
        trailer = PACK_TRAILER.pack(PACK_END_MAGIC, version, len(self._blocks), self.nr_pages, table_offset)
        tail = b"".join((*self._blocks, *digests, marks, trailer))
        self.bytes_written = files.write_at(self._fd, tail, table_offset)
        if self._flusher is not None:
            # The kernel tells a failed write-back once: what the background flush heard must not be lost.
            if self._flushing is not None:
                self._flushing.result()
            os.fsync(self._fd)
        return hashlib.sha256(self._header(version) + tail).hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _header(self, version: int) -> bytes:
        return PACK_HEADER.pack(PACK_MAGIC, version, self._nonce)

    def _flush(self) -> None:
        if self._nr_staged:
            self._write_block(self._staging[: self._nr_staged], sparse=self._staged_deltas)
            self._nr_staged = 0
        self._staged_deltas = False

    def _write_block(self, pages: Bytes, *, sparse: bool = False) -> None:
        """`sparse`: some of the pages are deltas, which compress whatever a sample of the others says."""
        stored: bytes | memoryview = pages.reshape(-1).data
        codec = CODEC_NONE
        if self._compressor is not None and (sparse or self._looks_compressible(pages)):
            packed = self._compressor.compress(stored)
            if len(packed) < _KEEP_COMPRESSED_BELOW * len(stored):
                stored, codec = packed, CODEC_ZSTD
        self._offset = files.write_at(self._fd, stored, self._offset)
        self._blocks.append(BLOCK.pack(len(stored), len(pages), codec, checksum(stored)))
        if self._flusher is not None and self._offset - self._flushed >= _FLUSH_BYTES:
            if self._flushing is not None:
                if not self._flushing.done():
                    return
                self._flushing.result()
            self._flushed = self._offset
            self._flushing = self._flusher.submit(os.fdatasync, self._fd)

    def _looks_compressible(self, pages: Bytes) -> bool:
        """Try 1 KiB of every eighth page first: encrypted or random memory then costs little."""
        if self._compressor is None or len(pages) < _SAMPLE_FROM_PAGES:
            return True
        sample = np.ascontiguousarray(pages[::8, 1024:2048])
        return len(self._compressor.compress(sample.data)) < _KEEP_COMPRESSED_BELOW * sample.nbytes


class PackReader:
    """An open pack: its tables checked and in memory, its blocks read on demand.  Safe for many threads."""

    def __init__(self, pack_id: str, fd: int) -> None:
        """Takes over `fd`.

        Raises:
            ImageDamaged, UnknownFormat: the tables do not fit the id.
        """
        self.id = pack_id
        self.path = f"packs/{pack_id}.pack"
        self._fd = fd
        # Not __del__: that runs while weak references still work, and another thread could get hold of a reader
        # whose file is being closed.
        weakref.finalize(self, os.close, fd)
        self._open()

    def _open(self) -> None:
        self.size_bytes = os.fstat(self._fd).st_size
        smallest = PACK_HEADER.size + PACK_TRAILER.size
        if self.size_bytes < smallest:
            raise self._damaged("the file is truncated")
        header = files.read_at(self._fd, PACK_HEADER.size, 0, self.path)
        magic, version, _ = PACK_HEADER.unpack(header)
        if magic != PACK_MAGIC:
            raise self._damaged("this is not a pack")
        check_version(version, self.path, newest=DELTA_VERSION)
        trailer = files.read_at(self._fd, PACK_TRAILER.size, self.size_bytes - PACK_TRAILER.size, self.path)
        magic, end_version, nr_blocks, nr_pages, table_offset = PACK_TRAILER.unpack(trailer)
        if magic != PACK_END_MAGIC:
            raise self._damaged("the end is missing: the file is truncated or overwritten")
        check_version(end_version, self.path, newest=DELTA_VERSION)
        if end_version != version:
            raise self._damaged("its two ends are of different versions")
        marks_at = nr_blocks * BLOCK.size + nr_pages * DIGEST_BYTES
        nr_marks = -(-nr_pages // 8) if version == DELTA_VERSION else 0
        tail_bytes = marks_at + nr_marks + PACK_TRAILER.size
        if table_offset + tail_bytes != self.size_bytes or table_offset < PACK_HEADER.size:
            raise self._damaged("its tables do not fit the file")
        tail = files.read_at(self._fd, tail_bytes, table_offset, self.path)
        digest = hashlib.sha256(header)
        digest.update(tail)
        if digest.hexdigest() != self.id:
            raise self._damaged("its tables do not have the digest they are named by")
        blocks = np.frombuffer(tail, dtype=BLOCK_DTYPE, count=nr_blocks)
        stored = blocks["stored"].astype(np.uint64)
        counts = blocks["nr_pages"].astype(np.uint64)
        raw = counts * np.uint64(PAGE_SIZE)
        codecs = blocks["codec"]
        if not (
            bool(((counts >= 1) & (counts <= MAX_BLOCK_PAGES)).all())
            and bool(np.where(codecs == CODEC_NONE, stored == raw, stored <= raw).all())
            and bool((codecs <= CODEC_ZSTD).all())
            and int(counts.sum()) == nr_pages
            and int(stored.sum()) + PACK_HEADER.size == table_offset
        ):
            raise self._damaged("its block table makes no sense")
        self.nr_pages = nr_pages
        self.nr_blocks = nr_blocks
        self.block_pages = counts.astype(np.int64)
        self.block_firsts = (
            np.cumsum(self.block_pages) - self.block_pages
        )  # ordinal of each block's first page
        self.block_stored = stored.astype(np.int64)
        self._block_offsets = np.cumsum(self.block_stored) - self.block_stored + PACK_HEADER.size
        self._block_codecs = codecs
        self._block_checksums = blocks["checksum"]
        self.digests: Digests = np.frombuffer(
            tail, dtype="<u8", count=2 * nr_pages, offset=nr_blocks * BLOCK.size
        ).reshape(-1, 2)
        # Which pages are deltas, by ordinal; None: no page is.
        self.deltas: Marks | None = None
        if version == DELTA_VERSION:
            marks = np.frombuffer(tail, dtype=np.uint8, count=nr_marks, offset=marks_at)
            self.deltas = np.unpackbits(marks, count=nr_pages, bitorder="little").astype(bool)

    def are_deltas(self, ordinals: npt.NDArray[np.int64]) -> Marks:
        """Which of the pages with these ordinals are delta pages."""
        return np.zeros(len(ordinals), dtype=bool) if self.deltas is None else self.deltas[ordinals]

    def block_of(self, ordinals: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The block each page ordinal lies in."""
        at: npt.NDArray[np.int64] = (
            np.searchsorted(self.block_firsts, ordinals.astype(np.int64), side="right") - 1
        )
        return at

    def read_block(self, block: int, into: Bytes | None = None) -> Bytes:
        """The pages, (n, 4096), of one block, its checksum verified.

        Args:
            into: memory for at least that many pages, (m, 4096), used when the block is not compressed; the
                result is then a view of it.

        Raises:
            ImageDamaged: the stored bytes do not have the checksum of the block table.
        """
        nr_pages = int(self.block_pages[block])
        if int(self._block_codecs[block]) == CODEC_NONE:
            pages = np.empty((nr_pages, PAGE_SIZE), dtype=np.uint8) if into is None else into[:nr_pages]
            view = pages.reshape(-1).data
            files.read_into(self._fd, view, int(self._block_offsets[block]), self.path)
            self._check(block, view)
            return pages
        stored = self.read_stored(block)
        raw = decompress(stored, nr_pages * PAGE_SIZE, self.path)
        return np.frombuffer(raw, dtype=np.uint8).reshape(nr_pages, PAGE_SIZE)

    def read_blocks(self, first_block: int, nr_blocks: int, into: Bytes) -> None:
        """The pages of adjacent blocks, one after the other, into the first rows of `into`, (m, 4096).

        Raises:
            ImageDamaged: a block does not have its checksum.
        """
        blocks = range(first_block, first_block + nr_blocks)
        if not self._block_codecs[first_block : blocks.stop].any():  # all CODEC_NONE: one read for all
            stored_bytes = int(self.block_stored[first_block : blocks.stop].sum())
            view = into.reshape(-1).data[:stored_bytes]
            files.read_into(self._fd, view, int(self._block_offsets[first_block]), self.path)
            at = 0
            for block in blocks:
                end = at + int(self.block_stored[block])
                self._check(block, view[at:end])
                at = end
            return
        row = 0
        for block in blocks:
            room = into[row : row + int(self.block_pages[block])]
            data = self.read_block(block, room)
            if self._block_codecs[block] != CODEC_NONE:
                room[:] = data
            row += len(room)

    def read_stored(self, block: int) -> bytes:
        """One block as it is stored, its checksum verified."""
        stored = files.read_at(
            self._fd, int(self.block_stored[block]), int(self._block_offsets[block]), self.path
        )
        self._check(block, stored)
        return stored

    def codec(self, block: int) -> int:
        return int(self._block_codecs[block])

    def _check(self, block: int, stored: bytes | memoryview) -> None:
        if checksum(stored) != self._block_checksums[block].tobytes():
            raise self._damaged(f"block {block} does not have its checksum")

    def _damaged(self, what: str) -> ImageDamaged:
        return ImageDamaged(f"{self.path}: {what}", path=self.path)
