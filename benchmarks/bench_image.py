# SPDX-License-Identifier: Apache-2.0
"""What the image room costs: hashing by the library against the package, writing against a raw write of two threads,
reading against the depth of a chain.

    python benchmarks/bench_image.py [hash write depth] [--size-mib 1024] [--repeats 7] [--dir /dev/shm] [--json FILE]

The limit of hashing is the xxhash package, which keeps Python's lock; both hash blocks of 1 MiB that lie in the cache.
The limit of a write is two threads that only write (with zstd: only compress and write) the same memory.  The
limit of a read is the same generation as one flat image.  Every figure is the median of `--repeats` rounds (best
and worst beside it), with the limit measured in the same rounds, alternating, after one warm-up.  Memory is
written before it is timed, so no first touch is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from checkpointd.image import xxh3
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE

MIB = 1 << 20
FIRST_PAGE = 0x7F00_0000_0


def make_memory(nr_pages: int, kind: str) -> np.ndarray:
    """Pages of one kind: `random` (incompressible), `heap` (small records, compresses), `zero`."""
    rng = np.random.default_rng(7)
    if kind == "zero":
        data = np.empty((nr_pages, PAGE_SIZE), dtype=np.uint8)
        data[:] = 0
        return data
    if kind == "random":
        return rng.integers(0, 1 << 63, (nr_pages, PAGE_SIZE // 8), dtype=np.int64).view(np.uint8)
    words = np.zeros((nr_pages, PAGE_SIZE // 8), dtype=np.int64)
    words[:, ::3] = 0x7F12_0000_0000 + rng.integers(0, 1 << 22, words[:, ::3].shape) * 16  # pointers
    words[:, 1::3] = rng.integers(0, 1000, words[:, 1::3].shape)
    return words.view(np.uint8)


def raw_write(directory: str, data: np.ndarray, compress: str, threads: int = 2) -> None:
    """The limit: `threads` threads write the memory into a new file each, 1 MiB at a time, compressed or not."""
    view = data.reshape(-1).data
    share = len(view) // threads

    def work(number: int) -> None:
        path = f"{directory}/raw{number}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        compressor = zstandard.ZstdCompressor(level=1) if compress == "zstd:1" else None
        at = offset = 0
        while at < share:
            start = number * share + at
            block = view[start : start + min(MIB, share - at)]
            at += len(block)
            offset += os.pwrite(fd, compressor.compress(block) if compressor else block, offset)
        os.close(fd)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def timed(work: Callable[[], Any], after: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    after()
    return took


def taking_turns(
    repeats: int, limit: Callable[[], float], ours: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Times of both, round by round, after a round to warm up."""
    rounds = [(limit(), ours()) for _ in range(repeats + 1)][1:]
    return [one for one, _ in rounds], [one for _, one in rounds]


def summary(times: list[float], size_bytes: int) -> dict[str, float]:
    median = statistics.median(times)
    return {
        "median_ms": round(median * 1e3, 1),
        "best_ms": round(min(times) * 1e3, 1),
        "worst_ms": round(max(times) * 1e3, 1),
        "gb_per_s": round(size_bytes / median / 1e9, 2),
    }


def bench_hash(size_mib: int, repeats: int) -> list[dict[str, Any]]:
    """The digests of all pages: by `xxh3.best_hasher` against the package."""
    blocks = [make_memory(MIB // PAGE_SIZE, "random").reshape(-1) for _ in range(2)]
    package, best = xxh3.PackageHasher(), xxh3.best_hasher()
    rows = []
    for threads in (1, 2):

        def run(hasher: xxh3.Hasher, threads: int = threads) -> None:
            def work(block: np.ndarray) -> None:
                for _ in range(size_mib // threads):
                    hasher.pages(block, 7)

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, blocks[:threads]))

        limits, ours = taking_turns(
            repeats,
            lambda run=run: timed(lambda: run(package), lambda: None),
            lambda run=run: timed(lambda: run(best), lambda: None),
        )
        rows.append(
            {
                "what": f"hash pages, threads={threads}, {type(best).__name__}",
                **summary(ours, size_mib * MIB),
                "limit_ms": summary(limits, size_mib * MIB)["median_ms"],
                "limit_share": round(statistics.median(limits) / statistics.median(ours), 2),
            }
        )
        print_row(rows[-1])
    return rows


def bench_write(directory: str, size_mib: int, repeats: int) -> list[dict[str, Any]]:
    """Writing one full image, whole commit included, against the raw write."""
    nr_pages = size_mib * MIB // PAGE_SIZE
    pages = np.arange(FIRST_PAGE, FIRST_PAGE + nr_pages, dtype=np.uint64)
    rows = []
    for kind in ("random", "heap", "zero"):
        data = make_memory(nr_pages, kind)
        for compress in ("none", "zstd:1"):
            store_path = f"{directory}/store"
            stored = 0

            def write(compress: str = compress, data: np.ndarray = data) -> None:
                nonlocal stored
                store = Store.open(f"{directory}/store", create=True)
                with store.begin(parent=None, compress=compress, sync=False) as builder:
                    builder.add_pages(0, pages, data)
                    stored = builder.commit(meta={}, state=b"").bytes_stored

            def drop_raw() -> None:
                for number in range(2):
                    os.unlink(f"{directory}/raw{number}")

            limits, ours = taking_turns(
                repeats,
                lambda data=data, compress=compress, drop=drop_raw: timed(
                    lambda: raw_write(directory, data, compress), drop
                ),
                lambda write=write, path=store_path: timed(write, lambda: shutil.rmtree(path)),
            )
            rows.append(
                {
                    "what": f"write {kind}, {compress}",
                    **summary(ours, data.nbytes),
                    "limit_ms": summary(limits, data.nbytes)["median_ms"],
                    "limit_share": round(statistics.median(limits) / statistics.median(ours), 2),
                    "stored_mib": round(stored / MIB, 1),
                }
            )
            print_row(rows[-1])
        del data
    return rows


def bench_depth(directory: str, size_mib: int, repeats: int) -> list[dict[str, Any]]:
    """Reading generation 1, 10, 100 of a chain (2 % of the pages change at random each time) against a flat image."""
    nr_pages = size_mib * MIB // PAGE_SIZE
    pages = np.arange(FIRST_PAGE, FIRST_PAGE + nr_pages, dtype=np.uint64)
    rng = np.random.default_rng(11)
    data = make_memory(nr_pages, "random")
    store = Store.open(f"{directory}/store", create=True)
    target = np.zeros_like(data)
    rows = []
    chain = None
    read_all = threading.Event()

    def restore(image: Any) -> None:
        for _obj, at, content in image.stream(threads=2):
            first = int(at[0]) - FIRST_PAGE
            if int(at[-1]) - int(at[0]) == len(at) - 1:
                target[first : first + len(at)] = content.reshape(-1, PAGE_SIZE)
            else:
                target[(at - np.uint64(FIRST_PAGE)).astype(np.int64)] = content.reshape(-1, PAGE_SIZE)
        read_all.set()

    commit_ms = []
    for generation in range(1, 101):
        dirty = np.sort(rng.choice(nr_pages, max(1, nr_pages // 50), replace=False))
        if chain is None:
            dirty = np.arange(nr_pages)
        else:
            data[dirty, :64] = rng.integers(0, 256, (len(dirty), 64), dtype=np.uint8)
        start = time.perf_counter()
        with store.begin(parent=chain, compress="none", sync=False) as builder:
            builder.add_pages(0, pages[dirty], data[dirty])
            builder.inherit(0, np.delete(pages, dirty))
            info = builder.commit(meta={}, state=b"")
        commit_ms.append((time.perf_counter() - start) * 1e3)
        chain = store.load(info.id)
        if generation not in (1, 10, 100):
            continue
        with store.begin(parent=None, compress="none", sync=False) as builder:
            builder.add_pages(0, pages, data)
            flat = store.load(builder.commit(meta={}, state=b"").id)
        deep_times, flat_times = [], []
        for round_number in range(repeats + 1):
            deep = timed(lambda image=chain: restore(image), lambda: None)
            assert np.array_equal(target[:: max(1, nr_pages // 999)], data[:: max(1, nr_pages // 999)])
            flat_time = timed(lambda image=flat: restore(image), lambda: None)
            if round_number:
                deep_times.append(deep)
                flat_times.append(flat_time)
        rows.append(
            {
                "what": f"read generation {generation}",
                **summary(deep_times, data.nbytes),
                "limit_ms": summary(flat_times, data.nbytes)["median_ms"],
                "limit_share": round(statistics.median(flat_times) / statistics.median(deep_times), 2),
                "packs": len(chain.packs),
            }
        )
        print_row(rows[-1])
        store.remove(flat.id)
        del flat
    rows.append(
        {
            "what": "commit of 2 % dirty, 100 generations",
            "median_ms": round(statistics.median(commit_ms[1:]), 1),
            "best_ms": round(min(commit_ms[1:]), 1),
            "worst_ms": round(max(commit_ms[1:]), 1),
        }
    )
    print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    print(
        "  ".join(f"{key}={value}" if key != "what" else f"{value:38}" for key, value in row.items()),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="of hash, write, depth; all when none is named"
    )
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--depth-size-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", default="/dev/shm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = options.cases or ["hash", "write", "depth"]
    if unknown := set(cases) - {"hash", "write", "depth"}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    directory = tempfile.mkdtemp(prefix="bench-image-", dir=options.dir)
    rows: list[dict[str, Any]] = []
    try:
        if "hash" in cases:
            rows += bench_hash(options.size_mib, options.repeats)
        if "write" in cases:
            rows += bench_write(directory, options.size_mib, options.repeats)
        if "depth" in cases:
            rows += bench_depth(directory, options.depth_size_mib, options.repeats)
    finally:
        shutil.rmtree(directory)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
