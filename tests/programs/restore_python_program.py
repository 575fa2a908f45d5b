# SPDX-License-Identifier: Apache-2.0
"""A CPython program with threads that checks itself and writes its progress; for the tests of restore.

    restore_python_program.py PROGRESS

PROGRESS is rewritten in place: "PID ROUND COUNTS THREADS" in a fixed width.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time

counts = [0] * 4
table = {n: str(n) * 10 for n in range(20000)}
lock = threading.RLock()
event = threading.Event()


def work(index: int) -> None:
    local = threading.local()
    local.index = index
    while True:
        with lock:
            counts[index] += 1
        assert local.index == index
        time.sleep(0.001)


def check(number: int) -> None:
    assert table[number % len(table)] == str(number % len(table)) * 10
    if number % 10 == 0:
        other = threading.Thread(target=lambda: None)
        other.start()
        other.join()
        child = os.fork()
        if child == 0:
            os._exit(5)
        try:
            assert os.waitpid(child, 0)[1] == 5 << 8
        except ChildProcessError:
            pass  # we were saved with the child alive or unreaped, and children are not saved
    if number % 7 == 0:
        # allocate and free: the heap and mmap must go on where they were
        _ = [bytearray(200_000) for _ in range(20)]
    assert ctypes.CDLL(None).getpid() == os.getpid()


def main() -> None:
    progress = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    for index in range(len(counts)):
        threading.Thread(target=work, args=(index,), daemon=True).start()
    number = 0
    while True:
        number += 1
        check(number)
        line = f"{os.getpid()} {number} {min(counts)} {threading.active_count()}"
        os.pwrite(progress, line.ljust(80).encode(), 0)
        event.wait(0.005)


main()
