# SPDX-License-Identifier: Apache-2.0
"""Pages of the hugetlb pool for a test, given back afterwards; and a program that holds some, told what to do by files.

A program told by files has nothing open, so it goes on obeying after a restore.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from checkpointd.linux.hugetlb import Pool, read_pools
from checkpointd.memory import PAGE_SIZE
from tests import abilities
from tests.programs.restore_harness import kill_and_reap

HUGE = 2 << 20

PROGRAM = """
import ctypes, hashlib, mmap, os, signal, sys, time
HUGE = 2 << 20
PRIVATE, SHARED, NORESERVE = 0x40022, 0x40021, 0x4000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
areas = {}

def good(result):
    if result in (-1, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def hold(name, pages, flags, fd=-1, size=HUGE, offset=0):
    areas[name] = good(libc.mmap(None, pages * size, 3, flags, fd, offset))

def at(name, page=0):
    return areas[name] + page * HUGE

def put(name, page, value, length=HUGE):
    ctypes.memset(at(name, page), value, length)

def get(name, page, length=HUGE):
    return hashlib.sha256(ctypes.string_at(at(name, page), length)).hexdigest()

def memfd(pages):
    fd = libc.memfd_create(b"huge", 4 | 2)  # MFD_HUGETLB, MFD_ALLOW_SEALING
    os.ftruncate(good(fd), pages * HUGE)
    return fd

def segment(name, size_bytes):
    shmid = good(libc.shmget(0, size_bytes, 0o5600))  # IPC_CREAT, SHM_HUGETLB
    areas[name] = good(libc.shmat(shmid, None, 0))
    return shmid

def blocks(name, pages):
    path = f"/proc/self/map_files/{at(name):x}-{at(name, pages):x}"
    fd = os.open(path, os.O_RDONLY)
    found = os.fstat(fd).st_blocks * 512 // HUGE
    os.close(fd)
    return found

def family():
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    return child

number = 0
while True:
    asked = f"{sys.argv[1]}/ask-{number}"
    if not os.path.exists(asked):
        time.sleep(0.002)
        continue
    try:
        answer = ["ok", eval(open(asked).read())]
    except BaseException as error:
        answer = ["error", repr(error)]
    with open(asked + ".tmp", "w") as file:
        __import__("json").dump(answer, file)
    os.rename(asked + ".tmp", f"{sys.argv[1]}/answer-{number}")
    number += 1
"""


class HugeTarget:
    """Evaluates expressions of PROGRAM."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, directory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self.child.pid
        self.number = 0

    def __call__(self, expression: str) -> Any:
        asked, answer = self.directory / f"ask-{self.number}", self.directory / f"answer-{self.number}"
        draft = self.directory / "draft"
        draft.write_text(expression)
        draft.rename(asked)
        deadline = time.monotonic() + 60
        while not answer.exists():
            assert os.path.exists(f"/proc/{self.pid}"), f"the target died of {expression}"
            assert time.monotonic() < deadline, f"no answer to {expression}"
            time.sleep(0.002)
        self.number += 1
        kind, value = json.loads(answer.read_text())
        assert kind == "ok", f"{expression}: {value}"
        return value

    def goes_back(self, number: int) -> None:
        """It is dead, and will be restored from a dump taken when it had been asked `number` times."""
        for n in range(number, self.number + 1):
            for name in ("ask", "answer"):
                (self.directory / f"{name}-{n}").unlink(missing_ok=True)
        self.number = number

    def frames(self, name: str, nr_pages: int, size: int = HUGE) -> list[int]:
        """Page frame of each huge page of an area, 0 for one that is not there."""
        first = self(f"at({name!r})") // PAGE_SIZE
        with open(f"/proc/{self.pid}/pagemap", "rb") as pagemap:
            pagemap.seek(first * 8)
            words = np.frombuffer(pagemap.read(nr_pages * size // PAGE_SIZE * 8), dtype=np.uint64)
        words = words[:: size // PAGE_SIZE]
        present = (words & np.uint64(1 << 63)) != 0
        frames: list[int] = (words & np.uint64((1 << 55) - 1)).tolist()
        return [frame if here else 0 for frame, here in zip(frames, present.tolist(), strict=True)]

    def present(self, name: str, nr_pages: int, size: int = HUGE) -> set[int]:
        return {n for n, frame in enumerate(self.frames(name, nr_pages, size)) if frame}

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)


def pool(size: int = HUGE) -> Pool:
    return read_pools()[size]


class NoPagesError(Exception):
    """The pool cannot be had, or not enough of it."""


@contextlib.contextmanager
def pages_for_tests(nr: int, size: int = HUGE) -> Iterator[Pool]:
    """The pool to oneself among tests, with so many pages to give; skips where that cannot be had."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(pool_pages(nr, size))
        except NoPagesError as error:
            abilities.lacking("hugetlb", why=str(error))
        yield found


@contextlib.contextmanager
def pool_pages(nr: int, size: int = HUGE, *, wait_s: float = 300) -> Iterator[Pool]:
    """The pool to oneself among tests, with so many pages to give; they are given back.

    Args:
        wait_s: how long to wait for other tests.

    Raises:
        NoPagesError: that cannot be had.
    """
    pools = read_pools()
    if size not in pools:
        raise NoPagesError(f"no pool of pages of {size} bytes")
    control = pools[size].control
    with control.open("rb") as lock:
        _take(lock, wait_s)
        before = pool(size)
        grown = max(0, nr - (before.free - before.reserved))
        try:
            if grown:
                try:
                    control.write_text(str(before.size + grown))
                except OSError as error:
                    raise NoPagesError(f"the pool cannot be made larger: {error}") from error
            now = pool(size)
            if now.free - now.reserved < nr:
                raise NoPagesError(f"the kernel has no {nr} pages of {size} bytes")
            yield now
        finally:
            if grown:
                control.write_text(str(before.size))


def _take(lock: BinaryIO, wait_s: float) -> None:
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise NoPagesError("another test has the pool") from None
            time.sleep(0.05)
        else:
            return
