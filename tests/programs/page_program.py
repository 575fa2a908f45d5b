# SPDX-License-Identifier: Apache-2.0
"""A Python program that writes pages when told, and what a dump of it is compared with."""

import os
import subprocess
import sys
import time
from pathlib import Path

from checkpointd.dump.dump import DumpOptions
from checkpointd.memory import PAGE_SIZE, PRIVATE_OBJECT

SOURCE = """
import mmap, os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the kernel writes the CPU's number to rseq memory
area = mmap.mmap(-1, 256 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)  # other flags than its neighbours': a mapping of its own
for page in range(256):
    area[page * 4096] = 1
print("ready", flush=True)
for line in sys.stdin:
    for word in line.split():
        page, value = word.split("=")
        if page == "dontfork":
            area.madvise(mmap.MADV_DONTFORK)
            continue
        area[int(page) * 4096 + 7] = int(value)
    print("done", flush=True)
"""


class Target:
    def __init__(self, source=SOURCE, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # the kernel writes the number of the processor into the area of rseq when a thread is let go
            env={**os.environ, "GLIBC_TUNABLES": "glibc.pthread.rseq=0"},
        )
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid
        self.settle()

    def settle(self):
        """Wait until it is blocked in read(0): from then on its memory stands still."""
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 "):
            time.sleep(0.001)

    def write(self, **pages):
        self.process.stdin.write(" ".join(f"{page[1:]}={value}" for page, value in pages.items()) + "\n")
        assert self.process.stdout.readline() == "done\n"
        self.settle()

    def advise_dontfork(self):
        self.process.stdin.write("dontfork=1\n")
        assert self.process.stdout.readline() == "done\n"
        self.settle()

    def memory_differs_from(self, image):
        """Page numbers whose content in the process is not that of the image.  The target waits in read(2)."""
        pages = image.pages(PRIVATE_OBJECT)
        held = image.read(PRIVATE_OBJECT, pages).reshape(-1, PAGE_SIZE)
        wrong = []
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for page, content in zip(pages.tolist(), held, strict=True):
                live = os.pread(memory.fileno(), PAGE_SIZE, page * PAGE_SIZE)
                if live != content.tobytes():
                    wrong.append(page)
        return wrong


def options(tmp_path, **more):
    return DumpOptions(store=str(tmp_path / "store"), **more)
