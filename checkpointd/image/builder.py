# SPDX-License-Identifier: Apache-2.0
"""Building one image: pages in, one durable commit at the end, nothing left behind otherwise.

Page data goes to packs in the builder's own directory under `tmp/` as it comes; each of up to `threads` writers
has a pack of its own (writers.py).  The index grows in memory (columns.py).  `commit` closes the packs, makes all
durable, and the rename of the image file is the one commit point; before it no reader can see anything of the new
image.

Order of commit (each step durable before the next when `sync`):
packs written -> packs linked into packs/ -> image file written in tmp/ -> renamed into images/ -> tmp removed.
A builder that is killed leaves its directory in tmp/; the next `begin` or `prune` sees that its lock is free and
removes it with the packs nobody refers to.

Threads: `add_pages`, `add_read` and `inherit` may be called from several threads at once; `commit` and `abort` from
one, after the others returned.  The data given to `add_pages` must not change until it returns.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from checkpointd import tracepoint
from checkpointd.errors import CheckpointError
from checkpointd.image import files, imagefile
from checkpointd.image.columns import NOTHING, Columns, checked_pages, locations_of, merge, renumbered
from checkpointd.image.consolidate import ConsolidationPolicy, consolidate
from checkpointd.image.delta import DeltaChooser, bases_of, difference
from checkpointd.image.digest import Bytes, Digests, digest_pages, zero_digest, zero_pages
from checkpointd.image.format import (
    BLOCK_PAGES,
    DELTA_VERSION,
    FORMAT_VERSION,
    MISSING_LOCATION,
    Compression,
)
from checkpointd.image.index import NO_BASE_U64, U64, ObjectIndex, Places, no_bases, nowhere
from checkpointd.image.info import ImageInfo, PageCounts, info_from_meta, now_rfc3339
from checkpointd.image.pack import PackWriter
from checkpointd.image.reader import Image
from checkpointd.image.writers import Writers
from checkpointd.memory import PAGE_SIZE, PageNumbers

if TYPE_CHECKING:
    from checkpointd.image.store import Store

T = TypeVar("T")
_MISSING = np.uint64(MISSING_LOCATION)
_SEGMENT_PAGES = 4 * BLOCK_PAGES  # what one pool thread takes at a time
_SPLIT_PAGES = 2 * _SEGMENT_PAGES  # a call with fewer pages is done on the calling thread

ReadPages = Callable[[int, int], Bytes]
"""The contents, (n, 4096), of the pages from one row to another; they hold until it is called again."""


@dataclass(frozen=True, slots=True)
class _Deltas:
    """Rows that became delta pages, where these lie, and their bases."""

    rows: npt.NDArray[np.intp]
    locations: U64
    bases: U64


class ImageBuilder:
    """One image in the making.  Made by `Store.begin`; use as a context manager: leaving it without `commit` aborts."""

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        dir_fd: int,
        lock_fd: int,
        parent: Image | None,
        compression: Compression,
        sync: bool,
        threads: int,
        policy: ConsolidationPolicy,
        confirm_same: bool,
        delta: bool,
    ) -> None:
        self._store = store
        self._name = name
        self._dir_fd = dir_fd
        self._lock_fd = lock_fd
        self._parent = parent
        self._compression = compression
        self._delta = delta and parent is not None
        self._sync = sync
        self._nr_threads = max(1, threads)
        self._policy = policy
        self._confirm_same = confirm_same
        self._seed = store.digest_seed
        self._zero = zero_digest(self._seed)
        self._writers = Writers(
            dir_fd,
            compression,
            first_number=len(parent.packs) if parent else 0,
            limit=self._nr_threads,
            sync=sync,
        )
        self._mutex = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._parts: dict[int, list[Columns]] = {}
        self._counts = PageCounts()
        self._nr_inherited = 0
        self._failed: BaseException | None = None
        self._done = False

    def __enter__(self) -> ImageBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def counts(self) -> PageCounts:
        """Of all pages given so far."""
        return self._counts

    @property
    def nr_inherited(self) -> int:
        return self._nr_inherited

    def add_pages(self, obj: int, pages: PageNumbers, data: Bytes, *, delta: bool = True) -> PageCounts:
        """Put pages that were read into the image.

        Args:
            obj: `PRIVATE_OBJECT` or the id of a shared memory object.
            pages: page numbers, sorted, no two equal.
            data: their contents one after the other, len(pages) * 4096 bytes, contiguous.
            delta: where the image may have deltas: False stores these pages whole and reads nothing of the parent.

        Returns:
            How many were zero, the same as the parent's at the same place (by digest), or written.

        Raises:
            ImageDamaged: a page of the parent that a delta is to be made from cannot be read.
            NoSpace: the disk is full; nothing but `abort` helps then.
            ValueError: pages not sorted, or the wrong amount of data.
        """
        self._check_open()
        pages, flat = checked_pages(obj, pages), np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if flat.nbytes != len(pages) * PAGE_SIZE:
            raise ValueError(f"{flat.nbytes} bytes of data for {len(pages)} pages")
        contents = flat.reshape(-1, PAGE_SIZE)
        if len(pages) < _SPLIT_PAGES or self._nr_threads == 1:
            return self._counted(self._guarded(self._add, obj, pages, _rows_of(contents), delta))
        spans = [slice(at, at + _SEGMENT_PAGES) for at in range(0, len(pages), _SEGMENT_PAGES)]
        futures = [
            self._workers().submit(self._guarded, self._add, obj, pages[s], _rows_of(contents[s]), delta)
            for s in spans
        ]
        results = [future.exception() or future.result() for future in futures]  # let all of them end
        counts = PageCounts()
        for result in results:
            if isinstance(result, BaseException):
                raise result
            counts += result
        return self._counted(counts)

    def add_read(self, obj: int, pages: PageNumbers, read: ReadPages, *, delta: bool = True) -> PageCounts:
        """As `add_pages`, with contents that are read a block at a time, so that the cache still holds what is hashed.

        Args:
            read: called on this thread, for one block after the other.

        Raises:
            What `read` and `add_pages` raise.
        """
        self._check_open()
        failed: list[OSError] = []

        def read_some(start: int, end: int) -> Bytes:
            try:
                found = read(start, end)
            except OSError as error:
                failed.append(error)
                raise
            if len(found) != end - start:
                raise ValueError(f"{len(found)} pages were read for {end - start}")
            return found

        try:
            return self._counted(self._guarded(self._add, obj, checked_pages(obj, pages), read_some, delta))
        except CheckpointError:
            if failed:  # no error of the store's
                raise failed[0] from None
            raise

    def _counted(self, counts: PageCounts) -> PageCounts:
        with self._mutex:
            self._counts += counts
        return counts

    def add_zero_pages(self, obj: int, pages: PageNumbers) -> None:
        """Put pages that are known to hold only zeroes into the image; costs index only.

        Raises:
            ValueError: pages not sorted.
        """
        self._check_open()
        pages = checked_pages(obj, pages)
        with self._mutex:
            zeroes = np.full(len(pages), NOTHING, dtype=np.uint64)
            self._keep(obj, pages, Places(zeroes, no_bases(len(pages))))
            self._counts += PageCounts(zero=len(pages))

    def inherit(self, obj: int, pages: PageNumbers) -> None:
        """Take pages, unread, as the parent has them.

        Raises:
            KeyError: the parent lacks one of them, or there is no parent.
            ValueError: pages not sorted.
        """
        self._check_open()
        pages = checked_pages(obj, pages)
        places = self._parent_places(obj, pages) or nowhere(len(pages))
        missing = places.locations == _MISSING
        if missing.any():
            parent = f"parent {self._parent.id[:12]}" if self._parent else "no parent"
            raise KeyError(f"{parent} has page {int(pages[missing][0]):#x} of object {obj} to inherit")
        with self._mutex:
            self._keep(obj, pages, places)
            self._nr_inherited += len(pages)

    def commit(self, *, meta: dict[str, Any], state: bytes) -> ImageInfo:
        """Make the image durable and visible, all at once.

        Args:
            meta: free JSON; `ImageInfo` shows the keys it knows.  Counts and `created` are added when missing.
            state: the process's state, opaque.

        Raises:
            ValueError: a page was given twice (by add_pages or inherit): a bug of the caller.
            NoSpace, Busy: nothing was committed; `abort` (or leaving the context) cleans up.
        """
        self._check_open()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        info = self._guarded(self._commit, meta, state)
        self._close()
        return info

    def abort(self) -> None:
        """Forget it all.  Nothing stays on disk; does nothing after `commit`."""
        if self._done:
            return
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        tracepoint.hit("image.abort")
        with contextlib.suppress(OSError):
            files.remove_tree(self._name, self._store.tmp_fd)
        self._close()

    # -- pages ------------------------------------------------------------------------------------------------

    def _add(self, obj: int, pages: PageNumbers, read: ReadPages, delta: bool) -> PageCounts:
        nr_zero = nr_same = nr_written = nr_deltas = 0
        locations = np.full(len(pages), NOTHING, dtype=np.uint64)
        places = Places(locations, no_bases(len(pages)))
        parents = self._parent_places(obj, pages)
        chooser = DeltaChooser(self._compression) if self._delta and delta else None
        with self._writers.take() as (number, writer):
            # Block by block, so that a page is hashed, compressed and written while the cache holds it.
            for at in range(0, len(pages), BLOCK_PAGES):
                end = min(at + BLOCK_PAGES, len(pages))
                span = slice(at, end)
                chunk = read(at, end)
                digests = digest_pages(chunk, self._seed)
                gone = zero_pages(chunk, digests, self._zero)
                nr_gone = int(np.count_nonzero(gone))
                nr_zero += nr_gone
                if parents is not None:
                    same = self._same(parents[span], digests, chunk)
                    same &= ~gone
                    for column, theirs in (
                        (places.locations, parents.locations),
                        (places.bases, parents.bases),
                    ):
                        column[span][same] = theirs[span][same]
                    gone |= same
                    nr_same -= nr_gone
                    nr_gone = int(np.count_nonzero(gone))
                    nr_same += nr_gone
                nr_written += len(chunk) - nr_gone
                if parents is not None and chooser is not None and nr_gone < len(chunk):
                    left = np.flatnonzero(~gone)
                    made = self._add_deltas(number, writer, chooser, chunk, digests, left, parents[span])
                    nr_deltas += len(made.rows)
                    nr_gone += len(made.rows)
                    locations[span][made.rows], places.bases[span][made.rows] = made.locations, made.bases
                    gone[made.rows] = True
                if nr_gone == len(chunk):
                    continue
                if nr_gone == 0:
                    first = writer.append(chunk, digests)
                    locations[span] = locations_of(number, first, len(chunk))
                else:
                    keep = np.flatnonzero(~gone)
                    first = writer.append(chunk, digests[keep], keep)
                    locations[span][keep] = locations_of(number, first, len(keep))
        with self._mutex:
            self._keep(obj, pages, places)
        return PageCounts(nr_zero, nr_same, nr_written, nr_deltas)

    def _add_deltas(
        self,
        number: int,
        writer: PackWriter,
        chooser: DeltaChooser,
        chunk: Bytes,
        digests: Digests,
        left: npt.NDArray[np.intp],
        parents: Places,
    ) -> _Deltas:
        """Write those pages of `chunk` at the rows `left` that are smaller as deltas; say which, and where."""
        bases = bases_of(parents[left])
        based = bases != NO_BASE_U64
        left, bases = left[based], bases[based]
        if len(left) == 0 or self._parent is None:
            return _Deltas(left, bases, bases)
        theirs = np.empty((len(left), PAGE_SIZE), dtype=np.uint8)
        self._parent.read_stored(bases, theirs)
        ours = chunk[left]
        differences = difference(ours, theirs)
        chosen = np.flatnonzero(chooser.choose(ours, differences))
        rows = left[chosen]
        if len(chosen) == 0:
            return _Deltas(rows, bases[chosen], bases[chosen])
        first = writer.append(differences, digests[rows], chosen, np.ones(len(chosen), dtype=bool))
        return _Deltas(rows, locations_of(number, first, len(chosen)), bases[chosen])

    def _keep(self, obj: int, pages: PageNumbers, places: Places) -> None:
        """The mutex must be held."""
        self._parts.setdefault(obj, []).append(Columns(pages, places))

    def _same(self, parents: Places, digests: Digests, contents: Bytes) -> npt.NDArray[np.bool_]:
        """Which pages have the digest of the parent's page at the same place."""
        same: npt.NDArray[np.bool_] = (parents.locations != _MISSING) & (parents.locations != NOTHING)
        if same.any() and self._parent is not None:
            at = np.flatnonzero(same)
            theirs = self._parent.digests_at(parents.locations[at])
            same[at] = (theirs == digests[at]).all(axis=1)
            if self._confirm_same and same.any():
                at = np.flatnonzero(same)
                pages = np.empty((len(at), PAGE_SIZE), dtype=np.uint8)
                self._parent.read_places(parents[at], pages)
                same[at] = (pages == contents[at]).all(axis=1)
        return same

    def _parent_places(self, obj: int, pages: PageNumbers) -> Places | None:
        """Where the parent has these pages; None when it has none of this object, or there is no parent."""
        if self._parent is None or obj not in self._parent.index:
            return None
        return self._parent.index[obj].locate(pages)

    def _workers(self) -> ThreadPoolExecutor:
        with self._mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._nr_threads, thread_name_prefix="image-write")
            return self._pool

    # -- commit -----------------------------------------------------------------------------------------------

    def _commit(self, meta: dict[str, Any], state: bytes) -> ImageInfo:
        tracepoint.hit("image.commit")
        merged = {obj: merge(obj, parts) for obj, parts in self._parts.items()}
        old_packs = self._parent.packs if self._parent else []
        nr_copied = consolidate(merged, old_packs, self._writers, self._policy)
        finished = self._writers.finish()
        pack_ids = [pack.id for pack in old_packs] + [pack_id for pack_id, _ in finished]
        written = [(pack_id, writer) for pack_id, writer in finished if pack_id]
        used, objects = renumbered(merged, len(pack_ids))
        facts = {
            "created": now_rfc3339(),
            "nr_pages": sum(index.nr_pages for index in objects.values()),
            "pages_zero": self._counts.zero,
            "pages_same": self._counts.same,
            "pages_written": self._counts.written,
            "pages_delta": self._counts.delta,  # of those written
            "pages_skipped_parent": self._nr_inherited,
            "pages_consolidated": nr_copied,  # of old packs, written again
            "bytes_raw": self._counts.written * PAGE_SIZE,
            "bytes_packs": sum(writer.bytes_written for _, writer in written),
        }
        return self._publish({**facts, **meta}, state, [pack_ids[at] for at in used], written, objects)

    def _publish(
        self,
        meta: dict[str, Any],
        state: bytes,
        pack_ids: list[str],
        written: list[tuple[str, PackWriter]],
        objects: dict[int, ObjectIndex],
    ) -> ImageInfo:
        store = self._store
        parent_id = self._parent.id if self._parent else ""
        with store.locked(exclusive=True), contextlib.ExitStack() as undo:
            for pack_id, writer in written:
                os.link(writer.name, f"{pack_id}.pack", src_dir_fd=self._dir_fd, dst_dir_fd=store.packs_fd)
                undo.callback(_unlink, f"{pack_id}.pack", store.packs_fd)
                tracepoint.hit("image.pack_linked")
            if self._sync and written:
                os.fsync(store.packs_fd)
            sequence = store.next_sequence()
            image_id, data = imagefile.build(
                sequence=sequence,
                parent_id=parent_id,
                meta=meta,
                state=state,
                pack_ids=pack_ids,
                objects=objects,
            )
            fd = files.create_file("image", self._dir_fd)
            try:
                files.write_at(fd, data, 0)
                if self._sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            tracepoint.hit("image.before_rename")
            os.rename("image", f"{image_id}.img", src_dir_fd=self._dir_fd, dst_dir_fd=store.images_fd)
            undo.callback(_unlink, f"{image_id}.img", store.images_fd)
            tracepoint.hit("image.renamed")
            if self._sync:
                os.fsync(store.images_fd)
            undo.pop_all()  # from here on the image stays
        tracepoint.hit("image.committed")
        has_deltas = any((index.bases != NO_BASE_U64).any() for index in objects.values())
        with contextlib.suppress(OSError):  # the image is there; what is left is swept by the next `begin`
            files.remove_tree(self._name, store.tmp_fd)
        return info_from_meta(
            image_id,
            meta,
            parent_id=parent_id,
            sequence=sequence,
            bytes_stored=len(data) + int(meta["bytes_packs"]),
            format_version=DELTA_VERSION if has_deltas else FORMAT_VERSION,
        )

    # -- state ------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[..., T], *args: Any) -> T:
        """Run a step; any failure makes the builder unusable, since the index may lack what it should have."""
        try:
            with files.translated(self._store.path):
                return work(*args)
        except BaseException as error:
            self._failed = error
            raise

    def _check_open(self) -> None:
        if self._done:
            raise ValueError("the image was committed or aborted already")
        if self._failed is not None:
            raise ValueError("the image cannot be finished: an earlier step failed") from self._failed

    def _close(self) -> None:
        self._done = True
        self._writers.close()
        os.close(self._dir_fd)
        os.close(self._lock_fd)


def _rows_of(contents: Bytes) -> ReadPages:
    return lambda start, end: contents[start:end]


def _unlink(name: str, dir_fd: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=dir_fd)
