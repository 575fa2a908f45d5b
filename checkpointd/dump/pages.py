# SPDX-License-Identifier: Apache-2.0
"""The page worker: a process beside the agent that holds page buffers and writes the image.

Why a process of its own: an agent that owned a gigabyte would take tens of milliseconds to die, and its target
would stay frozen for that long.  The agent freezes, decides what to read and sends runs; the worker reads the
frozen target's memory into a buffer prepared before the freeze, answers (the agent thaws), and only then hashes,
compresses and writes.

Memory: the buffer takes at most `MAX_BUFFER_BYTES`, and a quarter of what was free when the worker first needed
it; what a stopped target has beyond that is encoded as it is read, before the thaw.  Between dumps no more than
`KEPT_BYTES` of it are held.  Beside it: `_THREADS` pieces of 4 MiB, and the index of the image being built.

One request at a time over a `multiprocessing.connection.Connection`; both ends are ours, so messages are
pickles.  Requests are (operation, arguments); answers are ("ok", value) or ("error", CheckpointError.to_dict()),
and before them any number of ("progress", (pages done, pages in all)).  ("stop", ()) is the one request that may
come while another is worked on: it has no answer of its own, the other one ends as soon as it can.

The agent going away is end of file: an image not committed is aborted and the worker exits.

While it writes an image the worker also guards the agent: one that somebody stopped (SIGSTOP, a debugger) may hold a
frozen target, which nothing inside it can let go.  It is killed; the target then goes on by itself.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd import tracepoint
from checkpointd.dump.targets import mapped_by_nobody_else
from checkpointd.errors import Cancelled, CheckpointError, TargetGone
from checkpointd.image.builder import ImageBuilder
from checkpointd.image.reader import Image
from checkpointd.image.store import Store
from checkpointd.linux import process_vm
from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr
from checkpointd.memory import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PRIVATE_OBJECT,
    Runs,
    nr_pages_in,
    pages_of,
)
from checkpointd.procfs.process import read_stat

Bytes = npt.NDArray[np.uint8]

DEFAULT_COMPRESSION = "zstd:1"
MAX_BUFFER_BYTES = 1 << 30
KEPT_BYTES = 128 << 20

_THREADS = 2
_PIECE_PAGES = 2048  # 8 MiB: what one thread reads at a time
_ONE_THREAD_PAGES = 1536  # 6 MiB: some 2 ms
_ENCODE_PAGES = 1024
_HUGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MAP_NORESERVE = 0x4000
_BUFFER_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PROGRESS_INTERVAL_S = 0.02
_STOPPED_CHECK_S = 0.5

Heard = Callable[[int, int], None]
"""Gets (pages done, pages in all); what it raises stops the work."""


@dataclass(frozen=True)
class CopyRequest:
    """Pages to read from a process that stands still.

    Attributes:
        pid: the frozen target, or its forked copy.
        obj: the image's object they belong to.
        runs: page numbers there.
        through_mem: read everything by /proc/PID/mem.  Else only what others may map too (it does not un-share
            pages of forked relatives) and what process_vm_readv(2) cannot read (PROT_NONE).
        alone: known to be mapped by nobody else, so that nothing has to be looked at.
        source: file to read a shared object from; "" reads the address space.
    """

    pid: int
    obj: int
    runs: Runs
    through_mem: bool = True
    alone: bool = False
    source: str = ""


class PageWorker:
    """The agent's end.

    A worker that was killed (out of memory) is replaced at the next `begin`.  One that somebody stopped while a target
    may stand still for it is killed.

    Args:
        buffer_bytes: what pages of a stopped target may take in memory.
    """

    def __init__(self, *, buffer_bytes: int = MAX_BUFFER_BYTES) -> None:
        self._buffer_bytes = buffer_bytes
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "checkpointd.dump.pages",
                    str(theirs.fileno()),
                    str(self._buffer_bytes),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._copying = False
        self._broken = False

    def _revive(self) -> None:
        if self._broken:  # its socket closes before its end can be waited for
            self._process.wait()
        if self._process.poll() is not None:
            self._connection.close()
            self._start()

    def _gone(self) -> CheckpointError:
        """Nothing is waited for here: the target may still stand still."""
        self._broken = True
        self._process.kill()
        return CheckpointError(
            "the page worker ended unexpectedly; nothing was committed",
            hint="look for an out-of-memory kill in the kernel log, then dump again",
        )

    def begin(self, *, store: str, parent: str, compress: str, expected_pages: int) -> None:
        """Open the store, load the parent's index and touch the buffer.  Before the freeze."""
        self._revive()
        self._ask("begin", store, parent, compress, expected_pages)

    def latest_of(self, store: str, pid: int, start_time: int, boot_id: str) -> str:
        """See `Store.latest_of`."""
        self._revive()
        found: str = self._ask("latest_of", store, pid, start_time, boot_id)
        return found

    def copy(self, requests: list[CopyRequest], heard: Heard | None = None) -> None:
        """Read pages into the buffer; returns when all of them are out of the target.

        Raises:
            TargetGone: it died while being read.
        """
        self._ask("copy", requests, heard=heard)

    def start_copy(self, requests: list[CopyRequest]) -> None:
        """Like `copy`, but the answer is taken by `finish_copy`, which must be the next call (or `abort`)."""
        self._send("copy", requests)
        self._copying = True

    def finish_copy(self, heard: Heard | None = None) -> None:
        """Return when all that `start_copy` asked for, if anything, is out of the target.

        Raises:
            TargetGone: it died while being read.
        """
        if self._copying:
            self._copying = False
            self._receive(heard)

    def inherit(self, runs: Runs) -> None:
        """Take private pages from the parent."""
        self._ask("inherit", runs)

    def encode(self, heard: Heard | None = None) -> None:
        """Hash, compress and write what `copy` brought; the buffer is free again."""
        self._ask("encode", heard=heard)

    def read_and_encode(self, requests: list[CopyRequest], heard: Heard | None = None) -> None:
        """Read from something that stays still (a forked copy) piece by piece, in bounded memory."""
        self._ask("read_and_encode", requests, heard=heard)

    def commit(self, meta: dict[str, Any], state: bytes) -> dict[str, Any]:
        """Make the image durable; its ImageInfo with pages_zero, pages_same, pages_written, nr_inherited."""
        found: dict[str, Any] = self._ask("commit", meta, state)
        return found

    def abort(self) -> None:
        """Leave no half image; harmless at any time."""
        if self._copying:
            self._send("stop")
            with contextlib.suppress(CheckpointError):
                self.finish_copy()
        self._ask("abort")

    def close(self) -> None:
        """End the worker; an image not committed is aborted."""
        self._connection.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, operation: str, *args: Any, heard: Heard | None = None) -> Any:
        self._send(operation, *args)
        return self._receive(heard)

    def _send(self, operation: str, *args: Any) -> None:
        try:
            self._connection.send((operation, args))
        except OSError as error:
            raise self._gone() from error

    def _receive(self, heard: Heard | None) -> Any:
        stopped_by: BaseException | None = None
        try:
            while (answer := self._next_answer())[0] == "progress":
                if heard is None or stopped_by is not None:
                    continue
                try:
                    heard(*answer[1])
                except CheckpointError as error:
                    stopped_by = error
                    self._connection.send(("stop", ()))
        except (EOFError, OSError) as error:
            raise self._gone() from error
        except BaseException:
            self._process.kill()  # its answer would be taken for that to the next question
            raise
        if stopped_by is not None:
            raise stopped_by
        kind, value = answer
        if kind == "error":
            raise CheckpointError.from_dict(value)
        return value

    def _next_answer(self) -> Any:
        was_stopped = False
        while not self._connection.poll(_STOPPED_CHECK_S):
            is_stopped = self._is_stopped()
            if is_stopped and was_stopped:
                self._process.kill()
            was_stopped = is_stopped
        return self._connection.recv()

    def _is_stopped(self) -> bool:
        """SIGSTOP or a debugger holds it, and with it perhaps a frozen target."""
        try:
            return read_stat(self._process.pid).state in "tT"
        except (OSError, ValueError):
            return False


class _Buffer:
    """Memory for pages, in huge pages where there are any; touched before it is needed, given back afterwards.

    A first touch inside the freeze would halve the speed of reading.
    """

    def __init__(self, max_bytes: int) -> None:
        size = min(max_bytes, _memory_available() // 4) & -_HUGE_BYTES or _HUGE_BYTES
        while True:
            try:
                self._map = mmap.mmap(-1, size + _HUGE_BYTES, flags=_BUFFER_FLAGS)
                break
            except OSError:  # the system does not overcommit
                if size <= _HUGE_BYTES:
                    raise
                size = size // 2 & -_HUGE_BYTES
        whole = np.frombuffer(self._map, dtype=np.uint8)
        skip = -int(whole.ctypes.data) % _HUGE_BYTES
        self.bytes: Bytes = whole[skip : skip + size]
        self._base = int(self.bytes.ctypes.data)
        self._touched = 0
        self._advise(0, size, mmap.MADV_HUGEPAGE)

    def touch(self, nr_bytes: int, pool: ThreadPoolExecutor) -> None:
        """Have the first `nr_bytes` (or all there are) in memory."""
        wanted = -(-min(nr_bytes, len(self.bytes)) // _HUGE_BYTES) * _HUGE_BYTES
        if wanted <= self._touched:
            return
        step = max(_HUGE_BYTES, (wanted - self._touched) // _THREADS // _HUGE_BYTES * _HUGE_BYTES)
        starts = range(self._touched, wanted, step)
        list(pool.map(lambda at: self._touch(at, min(at + step, wanted)), starts))
        self._touched = wanted

    def shrink(self, nr_bytes: int) -> None:
        """Give back all but the first `nr_bytes`."""
        if self._touched > nr_bytes:
            self._advise(nr_bytes, self._touched, mmap.MADV_DONTNEED)
            self._touched = nr_bytes

    def _touch(self, start: int, end: int) -> None:
        if not self._advise(start, end, _MADV_POPULATE_WRITE):
            self.bytes[start:end:PAGE_SIZE].fill(0)

    def _advise(self, start: int, end: int, advice: int) -> bool:
        # mmap.madvise would hold the interpreter's lock
        try:
            syscall(Nr.MADVISE, self._base + start, end - start, advice, name="madvise")
        except OSError:
            return False
        return True


def _memory_available() -> int:
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) << 10
    return MAX_BUFFER_BYTES


class _Server:
    """The worker's end."""

    def __init__(self, connection: Connection, buffer_bytes: int) -> None:
        self._buffer_bytes = buffer_bytes
        self._connection = connection
        self._store: Store | None = None
        self._store_path = ""
        self._parent: Image | None = None
        self._builder: ImageBuilder | None = None
        self.writing = threading.Event()
        self._buffer: _Buffer | None = None
        self._copied: list[tuple[int, Runs, int]] = []  # (object, runs, offset in the buffer)
        self._used = 0
        self._pool = ThreadPoolExecutor(_THREADS)

    def begin(self, store: str, parent: str, compress: str, expected_pages: int) -> None:
        self.abort()
        opened = self._open(store)
        if not parent:
            self._parent = None
        elif self._parent is None or self._parent.id != parent:
            self._parent = opened.load(parent)
        self._builder = opened.begin(
            parent=self._parent, threads=_THREADS, compress=compress or DEFAULT_COMPRESSION
        )
        self.writing.set()
        self._room().touch(expected_pages * PAGE_SIZE, self._pool)

    def latest_of(self, store: str, pid: int, start_time: int, boot_id: str) -> str:
        return self._open(store).latest_of(pid, start_time, boot_id)

    def _open(self, store: str) -> Store:
        if self._store is None or self._store_path != store:
            self._store, self._store_path, self._parent = Store.open(store), store, None
        return self._store

    def copy(self, requests: list[CopyRequest]) -> None:
        buffer = self._room()
        wanted = sum(nr_pages_in(request.runs) for request in requests)
        free = len(buffer.bytes) // PAGE_SIZE - self._used // PAGE_SIZE
        if wanted > free:
            requests, beyond = _cut(requests, free)
            self.read_and_encode(beyond)
        buffer.touch(self._used + min(wanted, free) * PAGE_SIZE, self._pool)
        jobs: list[tuple[CopyRequest, Runs, int]] = []
        piece_pages = min(_PIECE_PAGES, -(-wanted // (2 * _THREADS)))
        if wanted <= _ONE_THREAD_PAGES:
            # the agent is busy with the target meanwhile: leave them a CPU
            piece_pages = _ONE_THREAD_PAGES
        for request in requests:
            self._copied.append((request.obj, request.runs, self._used))
            for piece in _pieces(request.runs, piece_pages):
                jobs.append((request, piece, self._used))
                self._used += nr_pages_in(piece) * PAGE_SIZE
        self._each(lambda job: _read(job[0], job[1], buffer.bytes, job[2]), jobs, _pages_of_job)

    def inherit(self, runs: Runs) -> None:
        self._need().inherit(PRIVATE_OBJECT, pages_of(runs))

    def encode(self) -> None:
        builder, buffer = self._need(), self._room()
        jobs: list[tuple[int, Runs, int]] = []
        for obj, runs, offset in self._copied:
            at = offset
            for piece in _pieces(runs, _ENCODE_PAGES):
                jobs.append((obj, piece, at))
                at += nr_pages_in(piece) * PAGE_SIZE

        def add(job: tuple[int, Runs, int]) -> None:
            size = nr_pages_in(job[1]) * PAGE_SIZE
            builder.add_pages(job[0], pages_of(job[1]), buffer.bytes[job[2] : job[2] + size])

        self._each(add, jobs, _pages_of_job)
        self._empty()

    def read_and_encode(self, requests: list[CopyRequest]) -> None:
        builder = self._need()
        jobs = [(request, piece) for request in requests for piece in _pieces(request.runs, _ENCODE_PAGES)]

        def work(job: tuple[CopyRequest, Runs]) -> None:
            request, piece = job
            # one buffer a thread: a new one each time would be touched anew page by page
            if not hasattr(local, "buffer"):
                local.buffer = np.empty(_ENCODE_PAGES * PAGE_SIZE, dtype=np.uint8)
            size = nr_pages_in(piece) * PAGE_SIZE
            _read(request, piece, local.buffer, 0)
            builder.add_pages(request.obj, pages_of(piece), local.buffer[:size])

        local = threading.local()
        self._each(work, jobs, _pages_of_job)

    def commit(self, meta: dict[str, Any], state: bytes) -> dict[str, Any]:
        builder = self._need()
        counts, nr_inherited = builder.counts, builder.nr_inherited
        info = builder.commit(meta=meta, state=state)
        self._builder = None
        self.writing.clear()
        if self._store is not None:
            self._parent = None
            with contextlib.suppress(
                CheckpointError, OSError
            ):  # the image is durable whatever becomes of this
                self._parent = self._store.load(
                    info.id
                )  # most likely the next parent: its index is warm then
        return {
            **info.to_dict(),
            "pages_zero": counts.zero,
            "pages_same": counts.same,
            "pages_written": counts.written,
            "nr_inherited": nr_inherited,
        }

    def abort(self) -> None:
        if self._builder is not None:
            self._builder.abort()
            self._builder = None
        self.writing.clear()
        self._empty()

    def _need(self) -> ImageBuilder:
        if self._builder is None:
            raise CheckpointError("no image is being written")
        return self._builder

    def _room(self) -> _Buffer:
        if self._buffer is None:
            self._buffer = _Buffer(self._buffer_bytes)
        return self._buffer

    def _empty(self) -> None:
        self._copied, self._used = [], 0
        if self._buffer is not None:
            self._buffer.shrink(KEPT_BYTES)

    def _each(self, work: Callable[[Any], None], jobs: list[Any], size: Callable[[Any], int]) -> None:
        """Do the jobs, telling how far they are; none is under way any more when this returns or raises.

        Raises:
            Cancelled: the agent said stop.
        """
        if len(jobs) == 1:
            work(jobs[0])
            return
        futures = {self._pool.submit(work, job): size(job) for job in jobs}
        done, total, told_at = 0, sum(futures.values()), time.monotonic()
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                tracepoint.hit("worker.piece_done")
                now = time.monotonic()
                if now - told_at >= _PROGRESS_INTERVAL_S:
                    told_at = now
                    self._connection.send(("progress", (done, total)))
                if self._connection.poll():  # nothing but "stop" comes now
                    self._connection.recv()
                    raise Cancelled("the agent stopped it")
        except Exception as first:
            for future in futures:
                future.cancel()
            wait(futures)  # what still runs writes into the buffer
            # one that met a builder another one had broken may come first: the cause is what the user needs
            found = [f.exception() for f in futures if not f.cancelled()]
            raise next((e for e in found if isinstance(e, CheckpointError)), first) from None


def _pages_of_job(job: tuple[Any, ...]) -> int:
    return nr_pages_in(job[1])


def _cut(requests: list[CopyRequest], nr_pages: int) -> tuple[list[CopyRequest], list[CopyRequest]]:
    """(requests of the first `nr_pages` pages, the rest)."""
    within: list[CopyRequest] = []
    beyond: list[CopyRequest] = []
    for request in requests:
        ends = np.cumsum(request.runs[:, 1].astype(np.int64))
        at = int(np.searchsorted(ends, nr_pages, side="right"))  # runs that fit as a whole
        if at == len(ends):
            within.append(request)
            nr_pages -= int(ends[-1]) if at else 0
            continue
        first, nr = request.runs[at].tolist()
        fit = nr_pages - (int(ends[at - 1]) if at else 0)
        head = np.array([[first, fit]] if fit else [], dtype=np.uint64).reshape(-1, 2)
        tail = np.array([[first + fit, nr - fit]], dtype=np.uint64)
        within.append(replace(request, runs=np.concatenate((request.runs[:at], head))))
        beyond.append(replace(request, runs=np.concatenate((tail, request.runs[at + 1 :]))))
        nr_pages = 0
    return within, beyond


def _pieces(runs: Runs, nr_pages: int) -> Iterator[Runs]:
    """Cut runs into lists of at most `nr_pages` pages, whole runs together where they fit."""
    if len(runs) == 0:
        return
    if (runs[:, 1] > nr_pages).any():
        # a long run becomes several short ones
        size = np.uint64(nr_pages)
        nr_parts = ((runs[:, 1] + size - np.uint64(1)) // size).astype(np.int64)
        offsets = np.arange(int(nr_parts.sum())) - np.repeat(np.cumsum(nr_parts) - nr_parts, nr_parts)
        skipped = offsets.astype(np.uint64) * size
        firsts, counts = np.repeat(runs[:, 0], nr_parts), np.repeat(runs[:, 1], nr_parts)
        runs = np.stack((firsts + skipped, np.minimum(counts - skipped, size)), axis=1)
    ends = np.cumsum(runs[:, 1].astype(np.int64))
    start = 0
    while start < len(runs):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + nr_pages, side="right"))
        yield runs[start:stop]
        start = stop


def _read(request: CopyRequest, runs: Runs, buffer: Bytes, offset: int) -> None:
    size = nr_pages_in(runs) * PAGE_SIZE
    into = buffer[offset : offset + size]
    try:
        if request.source:
            _read_file(request.source, runs, into)
        elif request.through_mem:
            _read_file(f"/proc/{request.pid}/mem", runs, into)
        elif not (request.alone and _read_quickly(request.pid, runs, into)):
            _read_target(request.pid, runs, into)
    except ProcessLookupError as error:
        raise TargetGone(f"process {request.pid} ended while its memory was read", pid=request.pid) from error


def _read_target(pid: int, runs: Runs, into: Bytes) -> None:
    alone = mapped_by_nobody_else(pid, runs)
    edges = [0, *(np.flatnonzero(np.diff(alone)) + 1).tolist(), len(runs)]
    at = 0
    for first, last in itertools.pairwise(edges):
        part = runs[first:last]
        size = nr_pages_in(part) * PAGE_SIZE
        room = into[at : at + size]
        if not (alone[first] and _read_quickly(pid, part, room)):
            _read_file(f"/proc/{pid}/mem", part, room)
        at += size


def _read_quickly(pid: int, runs: Runs, into: Bytes) -> bool:
    """By process_vm_readv(2); False where it may not: pages that only FOLL_FORCE reads (PROT_NONE)."""
    try:
        return process_vm.read_runs(pid, runs << np.uint64(PAGE_SHIFT), into) == len(into)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return False
        raise


def _read_file(path: str, runs: Runs, into: Bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view, at = memoryview(into.data), 0
        is_mem = path.endswith("/mem")
        for first, nr in runs.tolist():
            size = nr * PAGE_SIZE
            done = 0
            while done < size:
                where = (first << PAGE_SHIFT) + done
                try:
                    got = os.preadv(fd, [view[at + done : at + size]], where)
                except OSError as error:
                    raise CheckpointError(
                        f"{path} cannot be read at {where:#x} ({error.strerror}); nothing was saved",
                        hint="the target runs on; `checkpoint check -p PID` may know why",
                    ) from error
                if got == 0:
                    if is_mem:
                        raise ProcessLookupError(errno.ESRCH, path)
                    # the tail of a shared object's last page lies behind its end
                    into[at + done : at + size] = 0
                    break
                done += got
            at += size
    finally:
        os.close(fd)


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
    server = _Server(connection, buffer_bytes)
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
    server.abort()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
