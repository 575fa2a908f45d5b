# SPDX-License-Identifier: Apache-2.0
"""`make demo`: dump a redis under load six times, kill it, bring back the last generation and an earlier one.

Exit status 0 when every proof holds, 1 when one does not, 2 when the demo itself could not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.clients import Client, Life, total_acknowledged
from demo.command import Checkpoint, CommandFailed
from demo.proof import Proof, prove
from demo.server import Server, fill, have_redis

NR_INCREMENTAL = 5
EARLIER = 2
SETTLE_SECONDS = 60


class Demo:
    """One run.  `failures` is empty when everything held."""

    def __init__(self, args: argparse.Namespace, directory: Path, console: Console) -> None:
        self.args, self.console = args, console
        self.checkpoint = Checkpoint(directory)
        self.server = Server(args.program, directory)
        self.gate, self.stop = threading.Event(), threading.Event()
        self.clients = [Client(n, self.server.port, self.gate, self.stop) for n in range(args.clients)]
        self.generations: list[dict[str, Any]] = []
        self.spans: list[tuple[int, int]] = []  # (called, returned) of each dump, monotonic ns
        self.proofs: list[Proof] = []
        self.failures: list[str] = []
        self.nr_ballast = 0

    def run(self) -> None:
        size_bytes = self.args.megabytes << 20
        self.say(f"{self.server.kind} with pid {self.server.pid}: filling {self.args.megabytes} MiB")
        self.nr_ballast = fill(self.server.port, size_bytes)
        for client in self.clients:
            client.start()
        self.gate.set()
        self.wait_for_writes(200)
        self.dump("full")
        for _ in range(NR_INCREMENTAL):
            time.sleep(self.args.interval)
            self.dump("incremental", "--incremental")
        self.wait_for_writes(200)
        logs = [client.lives[-1] for client in self.clients]
        self.kill_and_restore(len(self.generations) - 1, logs)
        self.write_on()
        self.dump("after restore", "--incremental")
        self.check_incremental(self.generations[-1])
        self.kill_and_restore(EARLIER, logs)
        self.write_on()
        self.stop.set()
        for client in self.clients:
            client.join(SETTLE_SECONDS)
            if client.problem:
                self.failures.append(client.problem)

    def dump(self, kind: str, *words: str) -> None:
        called = time.monotonic_ns()
        stats = self.checkpoint.dump(self.server.pid, "--tcp", "close", *words)
        self.spans.append((called, time.monotonic_ns()))
        stats["kind"] = kind
        self.generations.append(stats)
        self.say(
            f"generation {len(self.generations) - 1} ({kind}): {stats['pages_written']} pages written, "
            f"frozen {stats['frozen_time'] / 1000:.1f} ms"
        )
        if "--incremental" in words:
            self.check_incremental(stats)

    def check_incremental(self, stats: dict[str, Any]) -> None:
        generation = self.generations.index(stats)
        if not stats["parent_id"] or stats["pages_skipped_parent"] + stats["pages_same"] == 0:
            self.failures.append(f"generation {generation} is not incremental: {stats['warnings']}")
        if stats["kind"] == "after restore" and stats["backend"] != self.generations[1]["backend"]:
            self.failures.append(
                f"after the restore changes were found by {stats['backend']}: {stats['backend_reason']}"
            )

    def kill_and_restore(self, generation: int, logs: list[Life]) -> None:
        self.server.kill()
        self.gate.clear()
        for client in self.clients:
            if not client.idle.wait(SETTLE_SECONDS):
                raise RuntimeError(f"{client.name} does not notice that the server is dead")
        image = self.generations[generation]["image_id"]
        self.say(f"killed; restoring generation {generation}")
        done = self.checkpoint.restore(image, "--tcp", "close")
        if done["pid"] != self.server.pid:
            self.failures.append(f"restored with pid {done['pid']}, it was {self.server.pid}")
            self.server.pid = done["pid"]
        proof = prove(
            generation, self.server.port, self.clients, logs, *self.spans[generation], self.nr_ballast
        )
        self.proofs.append(proof)
        self.failures += [f"generation {generation}: {failure}" for failure in proof.failures]
        self.say(
            f"  {proof.nr_present} writes of the clients' log are there ({proof.nr_must} acknowledged before the "
            f"dump was called for), {proof.nr_absent} are not ({proof.nr_must_not} sent after it was done); "
            f"the log fixes the freeze to {proof.window_us} us; {proof.nr_values} values compared"
        )

    def write_on(self) -> None:
        """The clients come back and write."""
        self.gate.set()
        before = total_acknowledged(self.clients)
        self.wait_for_writes(200)
        self.say(f"  clients are back: {total_acknowledged(self.clients) - before} writes acknowledged since")

    def wait_for_writes(self, count: int) -> None:
        """Until each client... together they have `count` more writes acknowledged."""
        goal = total_acknowledged(self.clients) + count
        deadline = time.monotonic() + SETTLE_SECONDS
        while total_acknowledged(self.clients) < goal:
            problems = [client.problem for client in self.clients if client.problem]
            if problems or time.monotonic() > deadline:
                raise RuntimeError(f"the clients cannot write: {problems or 'no acknowledgement'}")
            time.sleep(0.01)

    def say(self, text: str) -> None:
        if not self.args.json:
            self.console.print(text, highlight=False)

    def close(self) -> None:
        self.stop.set()
        self.server.kill()
        self.checkpoint.close()

    def table(self) -> Table:
        table = Table(title=f"{self.server.kind}, {len(self.clients)} clients writing", title_justify="left")
        for name in ("gen", "what", "backend"):
            table.add_column(name)
        for name in (
            *("scanned", "dirty", "zero", "same", "written", "raw", "stored"),
            *("freezing", "frozen", "total", "saving"),
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for number, stats in enumerate(self.generations):
            table.add_row(
                str(number),
                stats["kind"],
                stats["backend"],
                *(str(stats[name]) for name in ("pages_scanned", "pages_dirty", "pages_zero")),
                str(stats["pages_skipped_parent"] + stats["pages_same"]),
                str(stats["pages_written"]),
                _size(stats["bytes_raw"]),
                _size(stats["bytes_stored"]),
                *(f"{stats[name] / 1000:.1f} ms" for name in ("freezing_time", "frozen_time", "total_time")),
                f"{self.saving(stats):.1f} %" if number else "-",
            )
        return table

    def saving(self, stats: dict[str, Any]) -> float:
        """Per cent of what a full dump stores."""
        return 100 - 100 * float(stats["bytes_stored"]) / max(1, int(self.generations[0]["bytes_stored"]))

    def result(self) -> dict[str, Any]:
        return {
            "program": self.server.kind,
            "clients": len(self.clients),
            "writes_acknowledged": total_acknowledged(self.clients),
            "generations": [{**g, "saving_percent": round(self.saving(g), 2)} for g in self.generations],
            "proofs": [vars(proof) for proof in self.proofs],
            "failures": self.failures,
        }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--megabytes", type=int, default=220, help="how much the server holds")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two dumps")
    parser.add_argument("--program", choices=("redis", "sqlite"), default="")
    args = parser.parse_args()
    console = Console(width=max(150, Console().width) if not sys.stdout.isatty() else None)
    if not args.program:
        args.program = "redis" if have_redis() else "sqlite"
        if args.program == "sqlite" and not args.json:
            console.print(
                "redis-server is not installed and could not be: a CPython and SQLite server stands in"
            )
    directory = Path(tempfile.mkdtemp(prefix="checkpointd-demo-"))
    demo: Demo | None = None
    try:
        demo = Demo(args, directory, console)
        demo.run()
    except (CommandFailed, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(f"demo: {error}", file=sys.stderr)
        if demo is not None and demo.generations and not args.json:
            console.print(demo.table())
        return 2
    finally:
        if demo is not None:
            demo.close()
        shutil.rmtree(directory, ignore_errors=True)
    if args.json:
        print(json.dumps(demo.result(), indent=1))
    else:
        console.print(demo.table())
        for failure in demo.failures:
            console.print(f"FAILED: {failure}", highlight=False)
        if not demo.failures:
            console.print("every proof holds", highlight=False)
    return bool(demo.failures)


if __name__ == "__main__":
    sys.exit(main())
