# SPDX-License-Identifier: Apache-2.0
"""The page worker's end: `python -m checkpointd.dump.page_server FD BUFFER_BYTES`, started by pages.py.

Memory: the buffer takes at most `MAX_BUFFER_BYTES`, and a quarter of what was free when the worker first needed
it; what a stopped target has beyond that is encoded as it is read, before the thaw.  Between dumps no more than
`KEPT_BYTES` of it are held.  Beside it: `NR_THREADS` blocks of 1 MiB, with deltas 8 MiB more for each, and the index
of the image being built.

The agent going away is end of file: an image not committed is aborted, what a killed agent's forked copy left with
the target is reaped, and the worker exits.

While it writes an image the worker also guards the agent: one that somebody stopped (SIGSTOP, a debugger) may hold a
frozen target, which nothing inside it can let go.  It is killed; the target then goes on by itself.

Errors become answers: ("error", CheckpointError.to_dict()).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from checkpointd import tracepoint
from checkpointd.dump.division import private_requests
from checkpointd.dump.page_buffer import NR_THREADS, PageBuffer
from checkpointd.dump.page_reading import Bytes, CopyRequest, cut, pieces, read, reading, rows_of
from checkpointd.dump.targets import KnownAlone
from checkpointd.errors import Cancelled, CheckpointError, TargetGone
from checkpointd.image.builder import ImageBuilder
from checkpointd.image.format import BLOCK_PAGES
from checkpointd.image.info import ImageInfo
from checkpointd.image.reader import Image
from checkpointd.image.store import Store
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import (
    NO_RUNS,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRIVATE_OBJECT,
    Runs,
    intersect_runs,
    nr_pages_in,
    pages_of,
    subtract_runs,
)
from checkpointd.procfs.process import read_stat
from checkpointd.target import fork
from checkpointd.tracking.base import Ranges, Taken
from checkpointd.tracking.walks import take_written

DEFAULT_COMPRESSION = "zstd:1"
KEPT_BYTES = 128 << 20
Step = Callable[[int], None]
_STOPPED_CHECK_S = 0.5
_OUTLIVE_S = 5.0

_PIECE_PAGES = 2048  # 8 MiB: what one thread reads at a time
# Up to so many pages are read at once, without other threads, progress or cancelling.
_ONE_THREAD_PAGES = 3072  # 12 MiB: some 5 ms, for which the agent is busy all the same
_AT_ONCE_PAGES = 64  # to hand them over would take longer
_ENCODE_PAGES = 1024
_READ_AND_ENCODE_PAGES = 4096
# How often it is told how far the work is while a target stands still, which may be limited.  Afterwards it is not so
# often: whoever hears of it, the agent, the service, the command, takes a CPU from the work.
_LOOK_INTERVAL_S = 0.02
_TELL_INTERVAL_S = 0.05


class _GivenUpError(Exception):
    """In a thread whose work nobody wants any more."""


class PageServer:
    """The worker's end."""

    def __init__(self, connection: Connection, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._connection = connection
        self._store: Store | None = None
        self._store_path = ""
        self._parent: Image | None = None
        self._builder: ImageBuilder | None = None
        self._committed = ""  # not yet loaded
        self._target = 0
        self._alone: KnownAlone | None = None
        self._written: list[CopyRequest] = []  # to be read next
        self.writing = threading.Event()
        self._buffer: PageBuffer | None = None
        self._copied: list[tuple[int, Runs, int]] = []  # (object, runs, offset in the buffer)
        self._used = 0
        self._pool = ThreadPoolExecutor(NR_THREADS)
        # all of them now: one begun while this thread is kept off a CPU would be so for good
        started = threading.Barrier(NR_THREADS)
        try:
            wait([self._pool.submit(started.wait) for _ in range(NR_THREADS)])
        except RuntimeError:  # no more threads: the one that waits for it would keep us from ending
            started.abort()
            raise

    def begin(
        self,
        pid: int,
        store: str,
        parent: str,
        compress: str,
        delta: bool,
        expected_pages: int,
        alone: KnownAlone | None,
    ) -> ImageInfo | None:
        self.abort()
        self._target, self._alone = pid, alone
        opened = self._open(store)
        if not parent:
            self._parent = None
        elif self._parent is None or self._parent.id != parent:
            self._parent = opened.load(parent)
        self._builder = opened.begin(
            parent=self._parent,
            threads=NR_THREADS,
            compress=compress or DEFAULT_COMPRESSION,
            delta=delta,
        )
        self.writing.set()
        self._room().touch(expected_pages * PAGE_SIZE, self._pool)
        return self._parent.info if self._parent else None

    def latest_of(self, store: str, pid: int, start_time: int, boot_id: str) -> str:
        return self._open(store).latest_of(pid, start_time, boot_id)

    def _open(self, store: str) -> Store:
        if self._store is None or self._store_path != store or not self._store.is_at_its_path():
            self._store, self._store_path, self._parent = Store.open(store), store, None
        return self._store

    def copy(self, requests: list[CopyRequest], beside: bool = False) -> None:
        """Read into the buffer.  `beside`: the agent has work to do meanwhile; little is then read by one thread."""
        buffer = self._room()
        requests = [request for request in requests if len(request.runs)]
        wanted = sum(nr_pages_in(request.runs) for request in requests)
        free = len(buffer.bytes) // PAGE_SIZE - self._used // PAGE_SIZE
        if wanted > free:
            requests, beyond = cut(requests, free)
            # the target stands still: no time to read the parent's pages
            self._read_and_encode(beyond, delta=False, still=True)
        buffer.touch(self._used + min(wanted, free) * PAGE_SIZE, self._pool)
        jobs: list[tuple[CopyRequest, Runs, int]] = []
        at_once = wanted <= (_ONE_THREAD_PAGES if beside else _AT_ONCE_PAGES)
        piece_pages = _PIECE_PAGES if at_once else min(_PIECE_PAGES, -(-wanted // (2 * NR_THREADS)))
        for request in requests:
            self._copied.append((request.obj, request.runs, self._used))
            for piece in pieces(request.runs, piece_pages):
                jobs.append((request, piece, self._used))
                self._used += nr_pages_in(piece) * PAGE_SIZE

        def work(job: tuple[CopyRequest, Runs, int], step: Step) -> None:
            read(job[0], job[1], buffer.bytes, job[2])
            step(nr_pages_in(job[1]))

        if at_once:
            for request, piece, at in jobs:
                read(request, piece, buffer.bytes, at)
        else:
            self._each(work, jobs, min(wanted, free), _LOOK_INTERVAL_S)

    def walk(
        self, ranges: Ranges, has_guard_category: bool, code: Runs, most: int
    ) -> tuple[Taken, bool | None]:
        """See `PageWorker.start_walk`; what is to be read waits for `copy_written`, which comes next.

        Returns:
            The walk, and whether pages known to be nobody else's still are; None when nothing will be read.
        """
        pid = self._target
        try:
            pagemap = ps.open_pagemap(pid)
            try:
                taken = take_written(pagemap, ranges, has_guard_category=has_guard_category)
            finally:
                os.close(pagemap)
            tracepoint.hit("worker.walked")
            walked = np.array([(start, end - start) for start, end in ranges], dtype=np.uint64)
            readable = subtract_runs(taken.runs, intersect_runs(walked >> np.uint64(PAGE_SHIFT), code))
            if nr_pages_in(readable) > most:
                return taken, None
            alone = self._alone.still(pid) if self._alone else NO_RUNS
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"process {pid} ended while it was being dumped", pid=pid) from error
        self._written = private_requests(pid, readable, alone, ())
        return replace(taken, read=readable), len(alone) > 0

    def copy_written(self) -> None:
        """Read what `walk` chose."""
        requests, self._written = self._written, []
        self.copy(requests, beside=True)

    def inherit(self, runs: Runs) -> None:
        self._need().inherit(PRIVATE_OBJECT, pages_of(runs))

    def encode(self) -> None:
        builder, buffer = self._need(), self._room()
        jobs: list[tuple[int, Runs, int]] = []
        for obj, runs, offset in self._copied:
            at = offset
            for piece in pieces(runs, _ENCODE_PAGES):
                jobs.append((obj, piece, at))
                at += nr_pages_in(piece) * PAGE_SIZE

        def add(job: tuple[int, Runs, int], step: Step) -> None:
            nr_pages = nr_pages_in(job[1])
            builder.add_pages(job[0], pages_of(job[1]), buffer.bytes[job[2] : job[2] + nr_pages * PAGE_SIZE])
            step(nr_pages)

        self._each(add, jobs, self._used // PAGE_SIZE, _TELL_INTERVAL_S)
        self._empty()

    def read_and_encode(self, requests: list[CopyRequest], still: bool) -> None:
        self._read_and_encode(requests, delta=True, still=still)

    def _read_and_encode(self, requests: list[CopyRequest], *, delta: bool, still: bool) -> None:
        builder = self._need()
        wanted = sum(nr_pages_in(request.runs) for request in requests)
        piece_pages = min(_READ_AND_ENCODE_PAGES, max(BLOCK_PAGES, -(-wanted // (2 * NR_THREADS))))
        jobs = [(request, piece) for request in requests for piece in pieces(request.runs, piece_pages)]

        def work(job: tuple[CopyRequest, Runs], step: Step) -> None:
            request, piece = job
            # one buffer a thread: a new one each time would be touched anew page by page
            if not hasattr(local, "buffer"):
                local.buffer = np.empty((BLOCK_PAGES, PAGE_SIZE), dtype=np.uint8)
            room: Bytes = local.buffer

            with reading(request) as read_some:

                def block(start: int, end: int) -> Bytes:
                    into = room[: end - start]
                    read_some(rows_of(piece, start, end), into.reshape(-1))
                    step(end - start)
                    return into

                builder.add_read(request.obj, pages_of(piece), block, delta=delta)

        local = threading.local()
        self._each(work, jobs, wanted, _LOOK_INTERVAL_S if still else _TELL_INTERVAL_S)

    def commit(self, meta: dict[str, Any], state: bytes) -> dict[str, Any]:
        builder = self._need()
        counts, nr_inherited = builder.counts, builder.nr_inherited
        info = builder.commit(meta=meta, state=state)
        self._builder = self._parent = None
        self._committed = info.id
        self.writing.clear()
        return {
            **info.to_dict(),
            "pages_zero": counts.zero,
            "pages_same": counts.same,
            "pages_written": counts.written,
            "nr_inherited": nr_inherited,
        }

    def look_ahead(self) -> None:
        """Load the image just committed, most likely the next parent.  The agent need not wait for it."""
        image_id, self._committed = self._committed, ""
        if image_id and self._store is not None:
            with contextlib.suppress(
                Exception
            ):  # it is durable, whatever becomes of this; `begin` loads it then
                self._parent = self._store.load(image_id)

    def abort(self) -> None:
        if self._builder is not None:
            self._builder.abort()
            self._builder = None
        self.writing.clear()
        self._written = []
        self._empty()

    def leave(self) -> None:
        """The agent ends in order, and has taken away its forked copies itself."""
        self._target = 0

    def outlive(self, agent_pid: int) -> None:
        """The agent is gone: if it did not end in order its forked copy is a zombie of the target, which is reaped.

        The target would keep it for as long as it runs: it has no exit signal, so that its own waits do not see it.
        """
        self.abort()
        self._buffer = None  # who traces must be quick to die
        if not self._target:
            return
        deadline = time.monotonic() + _OUTLIVE_S
        while os.getppid() == agent_pid and time.monotonic() < deadline:  # its socket closes before its end
            time.sleep(0.005)
        with contextlib.suppress(
            CheckpointError, OSError
        ):  # gone, or another agent has it: that one looks too
            fork.reap_after_death(self._target, _OUTLIVE_S)

    def _need(self) -> ImageBuilder:
        if self._builder is None:
            raise CheckpointError("no image is being written")
        return self._builder

    def _room(self) -> PageBuffer:
        if self._buffer is None:
            self._buffer = PageBuffer(self._buffer_bytes)
        return self._buffer

    def _empty(self) -> None:
        self._copied, self._used = [], 0
        if self._buffer is not None:
            self._buffer.shrink(KEPT_BYTES)

    def _each(
        self, work: Callable[[Any, Step], None], jobs: list[Any], total: int, tell_interval_s: float
    ) -> None:
        """Do the jobs, telling how far they are; none is under way any more when this returns or raises.

        Args:
            work: says, by what it is given, how many pages are done, and is left by an error of that when it need not
                go on.
            total: pages of all jobs.

        Raises:
            Cancelled: the agent said stop.
        """
        left, lock = iter(jobs), threading.Lock()
        done, told, given_up = 0, 0, False
        failed: list[BaseException] = []  # in the order of time

        def step(nr_pages: int) -> None:
            nonlocal done
            with lock:
                done += nr_pages
            tracepoint.hit("worker.piece_done")
            if given_up:
                raise _GivenUpError

        def take() -> None:
            # one after the other by itself: a third thread that hands them out would wake for each of them
            nonlocal given_up
            try:
                while not given_up:
                    with lock:
                        job = next(left, None)
                    if job is None:
                        return
                    work(job, step)
            except BaseException as error:
                with lock:
                    failed.append(error)
                given_up = True

        taking = [self._pool.submit(take) for _ in range(min(NR_THREADS, len(jobs)))]
        tell_at = time.monotonic() + tell_interval_s
        try:
            while wait(taking, _LOOK_INTERVAL_S).not_done:
                if done > told and time.monotonic() >= tell_at:
                    told, tell_at = done, time.monotonic() + tell_interval_s
                    self._connection.send(("progress", (told, total)))
                if self._connection.poll():
                    operation, _ = self._connection.recv()
                    if operation != "stop":
                        raise CheckpointError(
                            f"the agent asked for {operation} in the middle of another request"
                        )
                    raise Cancelled("the agent stopped it")
        finally:
            given_up = True
            wait(taking)  # what still runs writes into the buffer
        # one that met a builder another one had broken may come first: the cause is what the user needs
        causes = [error for error in failed if error.__cause__ not in failed]
        if causes:
            raise next((error for error in causes if isinstance(error, CheckpointError)), causes[0])


def _guard(agent_pidfd: int, agent_pid: int, writing: threading.Event) -> None:
    """Kill the agent when it is found stopped twice in a row while an image is being written."""
    suspect = False
    while True:
        if not writing.is_set():
            suspect = False
            writing.wait()
        time.sleep(_STOPPED_CHECK_S)
        try:
            stopped = read_stat(agent_pid).state in "tT"
            if stopped and suspect and writing.is_set():
                signal.pidfd_send_signal(agent_pidfd, signal.SIGKILL)
        except (OSError, ValueError):
            return  # it is gone
        suspect = stopped


def serve(fd: int, buffer_bytes: int) -> None:
    """Answer until the agent is gone."""
    connection = Connection(fd)
    server = PageServer(connection, buffer_bytes)
    agent_pid = os.getppid()
    with contextlib.suppress(OSError):  # gone already: the first recv says so
        args = (os.pidfd_open(agent_pid), agent_pid, server.writing)
        threading.Thread(target=_guard, args=args, name="guard", daemon=True).start()
    while True:
        try:
            operation, args = connection.recv()
        except (EOFError, OSError):
            break
        if operation == "stop":  # it crossed with the answer
            continue
        try:
            answer = ("ok", getattr(server, operation)(*args))
        except CheckpointError as error:
            answer = ("error", error.to_dict())
        except Exception as error:
            answer = ("error", CheckpointError(f"{operation}: {type(error).__name__}: {error}").to_dict())
        try:
            connection.send(answer)
        except OSError:
            break
        server.look_ahead()
    server.outlive(agent_pid)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
