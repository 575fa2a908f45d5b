# SPDX-License-Identifier: Apache-2.0
"""Building one image: pages in, one durable commit at the end, nothing left behind otherwise.

Page data goes to packs in the builder's own directory under `tmp/` as it comes; each of up to `threads` writers
has a pack of its own (two threads writing one tmpfs or ext4 file would wait for each other).  The index grows in
memory.  `commit` closes the packs, makes all durable, and the rename of the image file is the one commit point;
before it no reader can see anything of the new image.

Order of commit (each step durable before the next when `sync`):
packs written -> packs linked into packs/ -> image file written in tmp/ -> renamed into images/ -> tmp removed.
A builder that is killed leaves its directory in tmp/; the next `begin` or `prune` sees that its lock is free and
removes it with the packs nobody refers to.

Threads: `add_pages` and `inherit` may be called from several threads at once; `commit` and `abort` from one,
after the others returned.  The data given to `add_pages` must not change until it returns.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from checkpointd import tracepoint
from checkpointd.image import files, imagefile
from checkpointd.image.consolidate import ConsolidationPolicy, blocks_to_copy
from checkpointd.image.digest import Bytes, Digests, digest_pages, zero_digest, zero_pages
from checkpointd.image.format import (
    BLOCK_PAGES,
    FORMAT_VERSION,
    LOCATION_SHIFT,
    MISSING_LOCATION,
    ZERO_LOCATION,
    Compression,
)
from checkpointd.image.index import U64, ObjectIndex, index_of
from checkpointd.image.info import ImageInfo, PageCounts, info_from_meta, now_rfc3339
from checkpointd.image.pack import PackWriter
from checkpointd.image.reader import Image
from checkpointd.memory import PAGE_SIZE, PageNumbers

if TYPE_CHECKING:
    from checkpointd.image.store import Store

T = TypeVar("T")
_SHIFT = np.uint64(LOCATION_SHIFT)
_ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)
_ZERO = np.uint64(ZERO_LOCATION)
_MISSING = np.uint64(MISSING_LOCATION)
_SEGMENT_PAGES = 4 * BLOCK_PAGES  # what one pool thread takes at a time
_SPLIT_PAGES = 2 * _SEGMENT_PAGES  # a call with fewer pages is done on the calling thread


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
    ) -> None:
        self._store = store
        self._name = name
        self._dir_fd = dir_fd
        self._lock_fd = lock_fd
        self._parent = parent
        self._compression = compression
        self._sync = sync
        self._nr_threads = max(1, threads)
        self._policy = policy
        self._confirm_same = confirm_same
        self._seed = store.digest_seed
        self._zero = zero_digest(self._seed)
        self._nr_old_packs = len(parent.packs) if parent else 0
        self._writers: list[PackWriter] = []
        self._free: queue.LifoQueue[PackWriter] = queue.LifoQueue()
        self._mutex = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="image-flush") if sync else None
        self._parts: dict[int, list[tuple[PageNumbers, U64]]] = {}
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
        """Sum over all `add_pages` so far."""
        return self._counts

    @property
    def nr_inherited(self) -> int:
        return self._nr_inherited

    def add_pages(self, obj: int, pages: PageNumbers, data: Bytes) -> PageCounts:
        """Put pages that were read into the image.

        Args:
            obj: `PRIVATE_OBJECT` or the id of a shared memory object.
            pages: page numbers, sorted, no two equal.
            data: their contents one after the other, len(pages) * 4096 bytes, contiguous.

        Returns:
            How many were zero, the same as the parent's at the same place (by digest), or written.

        Raises:
            NoSpace: the disk is full; nothing but `abort` helps then.
            ValueError: pages not sorted, or the wrong amount of data.
        """
        self._check_open()
        pages, flat = _checked_pages(obj, pages), np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if flat.nbytes != len(pages) * PAGE_SIZE:
            raise ValueError(f"{flat.nbytes} bytes of data for {len(pages)} pages")
        contents = flat.reshape(-1, PAGE_SIZE)
        if len(pages) < _SPLIT_PAGES or self._nr_threads == 1:
            counts = self._guarded(self._add, obj, pages, contents)
        else:
            spans = [slice(at, at + _SEGMENT_PAGES) for at in range(0, len(pages), _SEGMENT_PAGES)]
            futures = [
                self._workers().submit(self._guarded, self._add, obj, pages[span], contents[span])
                for span in spans
            ]
            results = [future.exception() or future.result() for future in futures]  # let all of them end
            counts = PageCounts()
            for result in results:
                if isinstance(result, BaseException):
                    raise result
                counts += result
        with self._mutex:
            self._counts += counts
        return counts

    def add_zero_pages(self, obj: int, pages: PageNumbers) -> None:
        """Put pages that are known to hold only zeroes into the image; costs index only.

        Raises:
            ValueError: pages not sorted.
        """
        self._check_open()
        pages = _checked_pages(obj, pages)
        with self._mutex:
            self._parts.setdefault(obj, []).append((pages, np.full(len(pages), _ZERO, dtype=np.uint64)))
            self._counts += PageCounts(zero=len(pages))

    def inherit(self, obj: int, pages: PageNumbers) -> None:
        """Take pages, unread, as the parent has them.

        Raises:
            KeyError: the parent lacks one of them, or there is no parent.
            ValueError: pages not sorted.
        """
        self._check_open()
        pages = _checked_pages(obj, pages)
        locations = self._parent_locations(obj, pages)
        missing = locations == _MISSING
        if missing.any():
            parent = f"parent {self._parent.id[:12]}" if self._parent else "no parent"
            raise KeyError(f"{parent} has page {int(pages[missing][0]):#x} of object {obj} to inherit")
        with self._mutex:
            self._parts.setdefault(obj, []).append((pages, locations))
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

    def _add(self, obj: int, pages: PageNumbers, contents: Bytes) -> PageCounts:
        counts = PageCounts()
        locations = np.full(len(pages), _ZERO, dtype=np.uint64)
        parent_locations = self._parent_locations(obj, pages)
        with self._writer() as (number, writer):
            # Block by block, so that a page is hashed, compressed and written while the cache holds it.
            for at in range(0, len(pages), BLOCK_PAGES):
                span = slice(at, at + BLOCK_PAGES)
                chunk = contents[span]
                digests = digest_pages(chunk, self._seed)
                zero = zero_pages(chunk, digests, self._zero)
                same = self._same(parent_locations[span], digests, chunk)
                same &= ~zero
                locations[span][same] = parent_locations[span][same]
                gone = zero | same
                nr_written = len(chunk) - int(np.count_nonzero(gone))
                counts += PageCounts(int(np.count_nonzero(zero)), int(np.count_nonzero(same)), nr_written)
                if nr_written == 0:
                    continue
                if nr_written == len(chunk):
                    first = writer.append(chunk, digests)
                    locations[span] = _location(number, first, nr_written)
                else:
                    keep = np.flatnonzero(~gone)
                    first = writer.append(chunk, digests[keep], keep)
                    locations[span][keep] = _location(number, first, nr_written)
        with self._mutex:
            self._parts.setdefault(obj, []).append((pages, locations))
        return counts

    def _same(self, parent_locations: U64, digests: Digests, contents: Bytes) -> npt.NDArray[np.bool_]:
        """Which pages have the digest of the parent's page at the same place."""
        same: npt.NDArray[np.bool_] = (parent_locations != _MISSING) & (parent_locations != _ZERO)
        if same.any() and self._parent is not None:
            at = np.flatnonzero(same)
            theirs = self._parent.digests_at(parent_locations[at])
            same[at] = (theirs == digests[at]).all(axis=1)
            if self._confirm_same and same.any():
                at = np.flatnonzero(same)
                parents = np.empty((len(at), PAGE_SIZE), dtype=np.uint8)
                self._parent.read_locations(parent_locations[at], parents)
                same[at] = (parents == contents[at]).all(axis=1)
        return same

    def _parent_locations(self, obj: int, pages: PageNumbers) -> U64:
        if self._parent is None or obj not in self._parent.index:
            return np.full(len(pages), _MISSING, dtype=np.uint64)
        return self._parent.index[obj].locate(pages)

    @contextlib.contextmanager
    def _writer(self) -> Iterator[tuple[int, PackWriter]]:
        """A pack writer for this thread alone, and its number among all packs."""
        try:
            writer = self._free.get_nowait()
        except queue.Empty:
            writer = self._new_writer() or self._free.get()
        try:
            yield self._nr_old_packs + self._writers.index(writer), writer
        finally:
            self._free.put(writer)

    def _new_writer(self) -> PackWriter | None:
        with self._mutex:
            if len(self._writers) >= self._nr_threads:
                return None
            writer = PackWriter(f"{len(self._writers)}.pack", self._dir_fd, self._compression, self._flusher)
            self._writers.append(writer)
            return writer

    def _workers(self) -> ThreadPoolExecutor:
        with self._mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._nr_threads, thread_name_prefix="image-write")
            return self._pool

    # -- commit -----------------------------------------------------------------------------------------------

    def _commit(self, meta: dict[str, Any], state: bytes) -> ImageInfo:
        tracepoint.hit("image.commit")
        merged = {obj: _merge(obj, parts) for obj, parts in self._parts.items()}
        nr_copied = self._consolidate(merged)
        pack_ids = [pack.id for pack in self._parent.packs] if self._parent else []
        written: list[tuple[str, PackWriter]] = []
        for writer in self._writers:
            pack_id = writer.finish() if writer.nr_pages else ""
            pack_ids.append(pack_id)
            if pack_id:
                written.append((pack_id, writer))
            tracepoint.hit("image.pack_written")
        used, objects = _renumbered(merged, len(pack_ids))
        facts = {
            "created": now_rfc3339(),
            "nr_pages": sum(index.nr_pages for index in objects.values()),
            "pages_zero": self._counts.zero,
            "pages_same": self._counts.same,
            "pages_written": self._counts.written,
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
        with contextlib.suppress(OSError):  # the image is there; what is left is swept by the next `begin`
            files.remove_tree(self._name, store.tmp_fd)
        return info_from_meta(
            image_id,
            meta,
            parent_id=parent_id,
            sequence=sequence,
            bytes_stored=len(data) + int(meta["bytes_packs"]),
            format_version=FORMAT_VERSION,
        )

    def _consolidate(self, merged: dict[int, tuple[PageNumbers, U64]]) -> int:
        """Copy live pages out of old blocks that hold too many dead ones; changes `merged` in place.

        Returns:
            How many pages were copied.
        """
        if self._parent is None:
            return 0
        packs = self._parent.packs
        limit = np.uint64(len(packs)) << _SHIFT
        objs = list(merged)
        everything = np.concatenate([merged[obj][1] for obj in objs] or [np.zeros(0, dtype=np.uint64)])
        old = np.flatnonzero(everything < limit)
        nr_new = sum(writer.nr_pages for writer in self._writers)
        nr_packs = sum(1 for writer in self._writers if writer.nr_pages)
        copy = old[blocks_to_copy(everything[old], packs, nr_new, max(1, nr_packs), self._policy)]
        if len(copy) == 0:
            return 0
        copy = copy[np.argsort(everything[copy], kind="stable")]
        sources = everything[copy]
        with self._writer() as (number, writer):
            for pack_number in np.unique(sources >> _SHIFT):
                pack = packs[int(pack_number)]
                at = np.flatnonzero(sources >> _SHIFT == pack_number)
                ordinals = (sources[at] & _ORDINAL).astype(np.int64)
                blocks = pack.block_of(ordinals.astype(np.uint64))
                cuts = np.flatnonzero(np.diff(blocks)) + 1
                for part in np.split(np.arange(len(at)), cuts):
                    block = int(blocks[part[0]])
                    contents = pack.read_block(block)
                    slots = ordinals[part] - int(pack.block_firsts[block])
                    first = writer.append(contents, pack.digests[ordinals[part]], slots)
                    everything[copy[at[part]]] = _location(number, first, len(part))
                tracepoint.hit("image.consolidated")
        start = 0
        for obj in objs:
            pages = merged[obj][0]
            merged[obj] = (pages, everything[start : start + len(pages)])
            start += len(pages)
        return len(copy)

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
        if self._flusher is not None:
            self._flusher.shutdown(wait=True, cancel_futures=True)
        for writer in self._writers:
            writer.close()
        os.close(self._dir_fd)
        os.close(self._lock_fd)


def _unlink(name: str, dir_fd: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=dir_fd)


def _location(number: int, first: int, nr_pages: int) -> U64:
    return np.arange(nr_pages, dtype=np.uint64) + np.uint64((number << LOCATION_SHIFT) + first)


def _checked_pages(obj: int, pages: PageNumbers) -> PageNumbers:
    if obj < 0:
        raise ValueError(f"object {obj} is negative")
    pages = np.asarray(pages, dtype=np.uint64)
    if len(pages) > 1 and not bool((pages[1:] > pages[:-1]).all()):
        raise ValueError("page numbers must be sorted and distinct")
    return pages


def _merge(obj: int, parts: list[tuple[PageNumbers, U64]]) -> tuple[PageNumbers, U64]:
    """All parts of an object as one sorted column of pages and one of locations."""
    pages = np.concatenate([part[0] for part in parts])
    locations = np.concatenate([part[1] for part in parts])
    if len(pages) > 1 and not bool((pages[1:] > pages[:-1]).all()):
        order = np.argsort(pages, kind="stable")
        pages, locations = pages[order], locations[order]
        twice = np.flatnonzero(pages[1:] == pages[:-1])
        if len(twice):
            raise ValueError(f"page {int(pages[twice[0]]):#x} of object {obj} was given twice")
    return pages, locations


def _renumbered(
    merged: dict[int, tuple[PageNumbers, U64]], nr_packs: int
) -> tuple[list[int], dict[int, ObjectIndex]]:
    """Drop packs without a live page; returns those used, and the index in their new numbers."""
    seen = np.zeros(nr_packs, dtype=bool)
    for _, locations in merged.values():
        numbers = (locations[locations != _ZERO] >> _SHIFT).astype(np.int64)
        seen |= np.bincount(numbers, minlength=nr_packs) > 0  # faster than np.unique
    used = np.flatnonzero(seen)
    renamed = np.zeros(nr_packs, dtype=np.uint64)
    renamed[used] = np.arange(len(used), dtype=np.uint64)
    objects = {}
    for obj, (pages, locations) in merged.items():
        if len(pages) == 0:
            continue
        new = locations.copy()
        real = locations != _ZERO
        numbers = renamed[(locations[real] >> _SHIFT).astype(np.int64)]
        new[real] = (numbers << _SHIFT) | (locations[real] & _ORDINAL)
        objects[obj] = index_of(pages, new)
    return used.tolist(), objects
