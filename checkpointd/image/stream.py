# SPDX-License-Identifier: Apache-2.0
"""All pages of an image in the order they lie on disk, at the speed of memory: what restore reads.

Threads read runs of adjacent blocks ahead into a ring of buffers; the consumer gets views of these.  Everything
that is computed for a page is computed for a window of up to `_WINDOW_PAGES` at once: a step of Python for each
block, or giving the GIL away for each, would cost more than reading it.

Memory: (2 x threads + 1) x 8 MiB, and 48 bytes for each page of a window.

A delta page is read where its base lies, so that each base is read once, together with the plain pages around it, and
restore time does not grow with the number of generations whose pages are deltas; what is added to the bases comes
from `DeltaReader`.

`visit_pages` does without a ring: each thread hands what it has just read to the visitor itself, while it is still
in the cache.  What fills whole blocks, nearly all of an image that was dumped in full, is found from the index
(whole.py) and read a block at a time; only the rest goes through windows.  Memory: threads x 8 MiB, and the window.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpointd.errors import ImageDamaged
from checkpointd.image.delta import DeltaReader
from checkpointd.image.digest import Bytes, digest_pages
from checkpointd.image.format import LOCATION_SHIFT, MAX_BLOCK_PAGES, ZERO_LOCATION
from checkpointd.image.index import NO_BASE_U64, U64, ObjectIndex, expand, expand_locations
from checkpointd.image.pack import PackReader
from checkpointd.image.whole import WholeBlocks, split
from checkpointd.memory import NO_PAGES, PAGE_SIZE, PageNumbers

Chunk = tuple[int, PageNumbers, Bytes]
Parts = Iterable[tuple[int, int, Bytes]]
"""(first row, row after the last, bytes of these pages), in order; the bytes hold until the next is taken."""
Visitor = Callable[[int, PageNumbers, Parts], None]

_BATCH_PAGES = MAX_BLOCK_PAGES  # 4 MiB: what one thread reads at a time
_WINDOW_PAGES = 1 << 18
_SHIFT = np.uint64(LOCATION_SHIFT)
_ORDINAL = np.uint64((1 << LOCATION_SHIFT) - 1)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Adjacent blocks of one pack and what is live in them: columns of equal length, in the order of the disk.

    `deltas` is where the difference lies of a page whose base is there, `NO_BASE` for a plain page.
    """

    pack: PackReader
    first_block: int
    nr_blocks: int
    objs: U64
    pages: PageNumbers
    ordinals: npt.NDArray[np.int64]
    deltas: U64


class _Buffers:
    """Memory of one batch: as read, and as handed out when pages had to be gathered."""

    def __init__(self) -> None:
        self.read: Bytes = np.empty((_BATCH_PAGES, PAGE_SIZE), dtype=np.uint8)
        self.gathered: Bytes = np.empty((_BATCH_PAGES, PAGE_SIZE), dtype=np.uint8)


def stream_pages(
    index: dict[int, ObjectIndex],
    packs: list[PackReader],
    *,
    threads: int,
    chunk_pages: int,
    digest_seed: int | None,
) -> Iterator[Chunk]:
    """See `Image.stream`; pages are compared with their digests when `digest_seed` is given."""
    reader = DeltaReader(packs)
    depth = 2 * max(1, threads)
    ring: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
    for _ in range(depth + 1):
        ring.put(_Buffers())

    def fetch(batch: _Batch) -> tuple[_Buffers, list[Chunk]]:
        buffers = ring.get()
        return buffers, _fetch(batch, buffers, reader, digest_seed)

    batches = _batches(index, packs)
    pending: collections.deque[Future[tuple[_Buffers, list[Chunk]]]] = collections.deque()
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="image-read")
    try:
        for batch in itertools.islice(batches, depth):
            pending.append(pool.submit(fetch, batch))
        while pending:
            buffers, chunks = pending.popleft().result()
            for obj, pages, data in chunks:
                for at in range(0, len(pages), chunk_pages):
                    end = at + chunk_pages
                    yield obj, pages[at:end], data[at * PAGE_SIZE : end * PAGE_SIZE]
            ring.put(buffers)
            for batch in itertools.islice(batches, 1):
                pending.append(pool.submit(fetch, batch))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def visit_pages(
    index: dict[int, ObjectIndex],
    packs: list[PackReader],
    visitor: Visitor,
    *,
    threads: int,
) -> None:
    """See `Image.visit`."""
    reader = DeltaReader(packs)
    whole, rest = split(index, packs, nr_parts=4 * max(1, threads))
    batches: Iterator[WholeBlocks | _Batch] = itertools.chain(whole, _batches(rest, packs))
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        buffers = _Buffers()
        try:
            while not failed.is_set():
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, WholeBlocks):
                    visitor(batch.obj, batch.pages(), batch.read(buffers.read))
                    continue
                for obj, pages, data in _fetch(batch, buffers, reader, None):
                    visitor(obj, pages, [(0, len(pages), data)])
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="image-visit") as pool:
        for worker in [pool.submit(work) for _ in range(max(1, threads))]:
            worker.result()


def _fetch(batch: _Batch, buffers: _Buffers, reader: DeltaReader, digest_seed: int | None) -> list[Chunk]:
    """Read a batch and cut it by object."""
    pack = batch.pack
    pack.read_blocks(batch.first_block, batch.nr_blocks, buffers.read)
    slots = batch.ordinals - int(pack.block_firsts[batch.first_block])
    based = np.flatnonzero(batch.deltas != NO_BASE_U64)
    if len(based):
        reader.apply(buffers.read, slots[based], batch.deltas[based])
    if digest_seed is not None:
        _check_digests(batch, buffers.read[slots], based, reader, digest_seed)
    first = batch.objs[
        0
    ]  # nearly always the only one, and sorting them costs more than this whole function does
    objs = [int(first)] if bool((batch.objs == first).all()) else np.unique(batch.objs).tolist()
    chunks: list[Chunk] = []
    nr_gathered = 0
    for obj in objs:
        pages = batch.pages
        mine = slots
        if len(objs) > 1:
            at = np.flatnonzero(batch.objs == obj)
            pages, mine = pages[at], slots[at]
        if not bool((pages[1:] > pages[:-1]).all()):
            order = np.argsort(pages, kind="stable")
            pages, mine = pages[order], mine[order]
        if bool((np.diff(mine) == 1).all()):
            data = buffers.read[int(mine[0]) : int(mine[-1]) + 1]
        else:
            data = buffers.gathered[nr_gathered : nr_gathered + len(mine)]
            np.take(buffers.read, mine, axis=0, out=data, mode="clip")  # in range; "clip" needs no extra copy
            nr_gathered += len(mine)
        chunks.append((obj, pages, data.reshape(-1)))
    return chunks


def _check_digests(
    batch: _Batch, contents: Bytes, based: npt.NDArray[np.intp], reader: DeltaReader, seed: int
) -> None:
    """Compare pages with their digests; `based` are the rows of the delta pages."""
    expected = batch.pack.digests[batch.ordinals]
    expected[based] = reader.digests(batch.deltas[based])
    wrong = (digest_pages(contents, seed) != expected).any(axis=1)
    if not wrong.any():
        return
    path = batch.pack.path
    if wrong[based].any():
        raise ImageDamaged(
            f"{path}: a page that is stored against one here does not have its digest", path=path
        )
    raise ImageDamaged(f"{path}: a page does not have its digest", path=path)


def _batches(index: dict[int, ObjectIndex], packs: list[PackReader]) -> Iterator[_Batch]:
    """All live pages, sorted by where they or their bases lie, in batches of adjacent blocks."""
    for objs, pages, locations, deltas in _windows(index):
        numbers = locations >> _SHIFT
        for lo, hi in _equal_runs(numbers):
            pack = packs[int(numbers[lo])]
            ordinals = (locations[lo:hi] & _ORDINAL).astype(np.int64)
            blocks = pack.block_of(ordinals.astype(np.uint64))
            runs = _equal_runs(blocks)
            at = 0
            while at < len(runs):
                first_block = int(blocks[runs[at][0]])
                nr_pages = int(pack.block_pages[first_block])
                end = at + 1
                while end < len(runs):
                    block = int(blocks[runs[end][0]])
                    nr_pages += int(pack.block_pages[block])
                    if block != first_block + end - at or nr_pages > _BATCH_PAGES:
                        break
                    end += 1
                part = slice(runs[at][0], runs[end - 1][1])
                yield _Batch(
                    pack,
                    first_block,
                    end - at,
                    objs[lo:hi][part],
                    pages[lo:hi][part],
                    ordinals[part],
                    deltas[lo:hi][part],
                )
                at = end


def _windows(index: dict[int, ObjectIndex]) -> Iterator[tuple[U64, PageNumbers, U64, U64]]:
    """(objs, pages, locations, deltas) of all pages that are not zero, some at a time, sorted by location.

    The location of a delta page is here that of its base, and its own is in `deltas`.
    """
    objs = np.concatenate(
        [np.full(len(i.firsts), o, dtype=np.uint64) for o, i in index.items()] or [NO_PAGES]
    )
    firsts = np.concatenate([i.firsts for i in index.values()] or [NO_PAGES])
    counts = np.concatenate([i.counts for i in index.values()] or [NO_PAGES])
    locations = np.concatenate([i.locations for i in index.values()] or [NO_PAGES])
    bases = np.concatenate([i.bases for i in index.values()] or [NO_PAGES])
    plain = bases == NO_BASE_U64
    deltas = np.where(plain, NO_BASE_U64, locations)
    locations = np.where(plain, locations, bases)
    order = np.argsort(locations, kind="stable")
    order = order[locations[order] != np.uint64(ZERO_LOCATION)]
    # An extent longer than a window is cut into pieces that fit one.
    nr_cuts = (counts[order] + np.uint64(_WINDOW_PAGES - 1)) // np.uint64(_WINDOW_PAGES)
    order = np.repeat(order, nr_cuts.astype(np.int64))
    cut = expand(np.zeros(len(nr_cuts), dtype=np.uint64), nr_cuts) * np.uint64(_WINDOW_PAGES)
    objs, firsts, locations = objs[order], firsts[order] + cut, locations[order] + cut
    plain = deltas[order] == NO_BASE_U64
    deltas = np.where(plain, NO_BASE_U64, deltas[order] + cut)
    counts = np.minimum(counts[order] - cut, np.uint64(_WINDOW_PAGES))
    before = np.cumsum(counts) - counts
    at = 0
    while at < len(counts):
        end = int(np.searchsorted(before + counts, before[at] + np.uint64(_WINDOW_PAGES), side="right"))
        part = slice(at, end)
        yield (
            np.repeat(objs[part], counts[part].astype(np.int64)),
            expand(firsts[part], counts[part]),
            expand(locations[part], counts[part]),
            expand_locations(deltas[part], counts[part]),
        )
        at = end


def _equal_runs(values: npt.NDArray[np.uint64] | npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """[lo, hi) of each run of equal values."""
    changes = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *changes.tolist()], [*changes.tolist(), len(values)], strict=True))
