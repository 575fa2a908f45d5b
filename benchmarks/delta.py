# SPDX-License-Identifier: Apache-2.0
"""What `dump --delta` saves and costs, beside the same dumps without it in the same run.

Two equal targets write the same; one's chain has deltas, the other's has not, and they take turns.  Dumps are
compressed, as they are when nobody asks: without compression there are no deltas.  A real redis is stopped by no load
when it is dumped twice, once each way, so that both dumps are of the same writes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import Row, Series
from demo.server import Server, have_redis

if TYPE_CHECKING:
    from benchmarks.bench import Bench, Target

MEGABYTES = 256
_MIB = 1 << 20
_KEYS = 50_000
_VALUE_BYTES = 200
_REQUESTS = 20_000  # of each kind, between two pairs of dumps

Dumps = list[dict[str, Any]]


def measure(bench: Bench) -> None:
    """All rows of the case."""
    for permille, nr_bytes in ((10, 8), (100, 8), (100, 512), (100, 4096)):
        _measure_writes(bench, permille, nr_bytes)
    if have_redis():
        _measure_redis(bench)
    else:
        bench.report.facts["redis"] = "not installed"


def _measure_writes(bench: Bench, permille: int, nr_bytes: int) -> None:
    megabytes = min(MEGABYTES, bench.megabytes)
    what = f"delta, {permille // 10} % of {megabytes} MiB, {nr_bytes} bytes a page"
    with bench.target(megabytes) as plain, bench.target(megabytes) as delta:
        targets = (plain, delta)
        chains: tuple[Dumps, Dumps] = ([], [])
        for n in range(bench.rounds + 2):  # the first in full, the second to warm up
            for target, chain, word in zip(targets, chains, ("", "--delta"), strict=True):
                target.tell(f"dirty {permille} {n} {nr_bytes}")
                words = ["--incremental", word] if n else []
                bench.warm(target)
                chain.append(bench.checkpoint.dump(target.pid, *filter(None, words)))
        _add_dumps(bench, what, chains[0][2:], chains[1][2:])
        restored: tuple[list[float], list[float]] = ([], [])
        for _ in range(bench.rounds + 1):
            for target, chain, times in zip(targets, chains, restored, strict=True):
                times.append(_restore(bench, target, chain[-1]["image_id"]))
        bench.add(
            Row(
                f"{what}: restore of generation {bench.rounds + 2}",
                Series(restored[1][1:]),
                Series(restored[0][1:]),
                note="in the new process",
            )
        )


def _restore(bench: Bench, target: Target, image: str) -> float:
    """How long, in ms; the target is compared with what it was."""
    want = target.tell("sum")
    target.kill()
    bench.warm(target)
    took = bench.checkpoint.restore(image)["restore_time"] / 1000
    if target.tell("sum") != want:
        raise RuntimeError("the restored target has other memory")
    return float(took)


def _measure_redis(bench: Bench) -> None:
    directory = Path(tempfile.mkdtemp(prefix="bench-redis-"))
    server = None
    try:
        server = Server("redis", directory)
        _load(server, "set", 4 * _KEYS)
        chains: tuple[Dumps, Dumps] = ([], [])
        parents = [bench.checkpoint.dump(server.pid)["image_id"]] * 2
        for _ in range(bench.rounds + 1):
            _load(server, "set,incr,hset", _REQUESTS)
            # The parent named is never the last image, so that both compare content.
            for n, words in ((0, []), (1, ["--delta"])):
                made = bench.checkpoint.dump(server.pid, "--incremental", "--parent", parents[n], *words)
                chains[n].append(made)
                parents[n] = made["image_id"]
        what = f"delta, redis-server, {_REQUESTS:,} each of SET, INCR, HSET"
        _add_dumps(bench, what, chains[0][1:], chains[1][1:])
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(directory, ignore_errors=True)
        bench.forget()


def _load(server: Server, tests: str, requests: int) -> None:
    words = ["-p", server.port, "-t", tests, "-n", requests, "-r", _KEYS, "-d", _VALUE_BYTES, "-q"]
    subprocess.run(["redis-benchmark", *map(str, words)], check=True, capture_output=True)


def _add_dumps(bench: Bench, what: str, plain: Dumps, delta: Dumps) -> None:
    """Rows for what dumps with deltas stored and took; the limit is the same without."""
    written = sum(made["pages_written"] for made in delta)
    share = sum(made["pages_delta"] for made in delta) / max(1, written)
    for name, unit, of in (
        ("stored", "MiB", _stored_mib),
        ("total", "ms", _total_ms),
        ("stop", "ms", _stop_ms),
    ):
        note = f"{share:.0%} of {written} written pages are deltas" if name == "stored" else ""
        bench.add(
            Row(
                f"{what}: {name}", Series([*map(of, delta)], unit), Series([*map(of, plain)], unit), note=note
            )
        )


def _stored_mib(made: dict[str, Any]) -> float:
    return float(made["bytes_stored"] / _MIB)


def _total_ms(made: dict[str, Any]) -> float:
    return float(made["total_time"] / 1000)


def _stop_ms(made: dict[str, Any]) -> float:
    return float((made["freezing_time"] + made["frozen_time"]) / 1000)
