# SPDX-License-Identifier: Apache-2.0
"""A CPython program with numpy arrays, threads and an SQLite database in memory, behind a small HTTP server.

``/step?n=K`` makes K updates of a table that follow from a generator of pseudo-random numbers; ``/state`` is "count x
sum bad": whoever knows the rule can tell every right answer.  Two threads work on arrays of their own all the time and
check what they compute; ``bad`` counts what went wrong there.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

NR_ENTRIES = 1 << 18
MASK = (1 << 64) - 1
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407


class State:
    def __init__(self) -> None:
        self.table = np.zeros(NR_ENTRIES, dtype=np.uint64)
        self.weights = np.arange(1, NR_ENTRIES + 1, dtype=np.uint64)
        self.count, self.x, self.bad, self.rounds = 0, 1, 0, 0
        self.lock = threading.Lock()
        self.db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.db.execute("CREATE TABLE steps (number INTEGER PRIMARY KEY, x TEXT)")

    def step(self, n: int) -> None:
        with self.lock:
            self.db.execute("BEGIN")
            for _ in range(n):
                self.x = (self.x * MULTIPLIER + INCREMENT) & MASK
                at = (self.x >> 33) % NR_ENTRIES
                self.table[at] = np.uint64((int(self.table[at]) + self.x) & MASK)
                self.count += 1
                self.db.execute("INSERT INTO steps VALUES (?, ?)", (self.count, str(self.x)))
            self.db.execute("COMMIT")

    def show(self) -> str:
        with self.lock:
            rows, last = self.db.execute("SELECT COUNT(*), MAX(number) FROM steps").fetchone()
            newest = self.db.execute("SELECT x FROM steps WHERE number = ?", (self.count,)).fetchone()
            whole = self.db.execute("PRAGMA integrity_check").fetchone()[0]
            if (
                rows != self.count
                or (self.count and (last != rows or newest[0] != str(self.x)))
                or whole != "ok"
            ):
                self.bad += 1
            total = int((self.table * self.weights).sum(dtype=np.uint64))
            return f"{self.count} {self.x} {total} {self.bad}"


def worker(state: State, seed: int) -> None:
    """Arithmetic with a known end: an array and its inverse permutation."""
    dice = np.random.default_rng(seed)
    array = dice.random(50_000)
    total = float(array.sum())
    while True:
        order = dice.permutation(len(array))
        array = array[order]
        if abs(float(array.sum()) - total) > 1e-6 or len(np.unique(order)) != len(order):
            state.bad += 1
        state.rounds += 1
        time.sleep(0.005)


def main() -> None:
    state = State()
    for seed in (1, 2):
        threading.Thread(target=worker, args=(state, seed), daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/step?n="):
                state.step(int(self.path.partition("=")[2]))
            body = state.show().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


main()
