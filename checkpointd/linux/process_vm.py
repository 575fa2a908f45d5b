# SPDX-License-Identifier: Apache-2.0
"""Memory of another process: process_vm_readv(2) for runs, /proc/PID/mem for single places.

process_vm_readv pins what it reads: it is the faster way, but it un-shares copy-on-write pages of a process with
forked relatives, maps zero pages into holes, and fails on PROT_NONE.  /proc/PID/mem does neither and writes
through read-only protection (a private copy of the page is made): `MemFile`.

Raises OSError only: ESRCH (gone), EPERM (ptrace access), EFAULT (nothing read at the first iovec), EIO from
/proc/PID/mem where nothing is mapped.

Source: process_vm_readv(2), proc_pid_mem(5), Linux mm/process_vm_access.c.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd.linux._libc import syscall

NR_PROCESS_VM_READV = 310
IOV_MAX = 1024

Iovecs = npt.NDArray[np.uint64]
"""(n, 2): address, length in bytes; the C layout of struct iovec."""


def read_runs(pid: int, remote_iov: Iovecs, into: npt.NDArray[Any]) -> int:
    """Read the remote ranges one after the other into `into`.

    Args:
        remote_iov: ranges in the process.
        into: a writable contiguous array; no more than its size is read.

    Returns:
        Bytes read; less than asked where a range is unreadable or `into` is full.

    Raises:
        OSError: nothing at all could be read.
    """
    if not (into.flags.c_contiguous and into.flags.writeable):
        raise ValueError("read_runs needs a writable contiguous array")
    remote = np.ascontiguousarray(remote_iov, dtype=np.uint64)
    ends = np.cumsum(remote[:, 1])
    base, room = int(into.ctypes.data), int(into.nbytes)
    local = np.empty((1, 2), dtype=np.uint64)
    done = 0
    for first in range(0, len(remote), IOV_MAX):
        part = remote[first : first + IOV_MAX]
        wanted = min(int(ends[first + len(part) - 1]), room) - done
        if wanted <= 0:
            break
        local[0] = base + done, wanted
        try:
            nr = syscall(NR_PROCESS_VM_READV, pid, local, 1, part, len(part), 0, name="process_vm_readv")
        except OSError:
            if done:
                break
            raise
        done += nr
        if nr < wanted:
            break
    return done


class MemFile:
    """/proc/PID/mem, kept open: bound to the address space of the moment it was opened.

    After an exec of the process reads and writes meet the old address space, which is then empty: EIO or 0 bytes.
    """

    def __init__(self, pid: int, *, writable: bool = False) -> None:
        mode = os.O_RDWR if writable else os.O_RDONLY
        self.fd = os.open(f"/proc/{pid}/mem", mode | os.O_CLOEXEC)

    def read(self, address: int, size_bytes: int) -> bytes:
        """Exactly `size_bytes` from `address`.

        Raises:
            OSError: not all of it is mapped and readable (EIO).
        """
        parts, done = [], 0
        while done < size_bytes:
            part = os.pread(self.fd, size_bytes - done, address + done)
            if not part:
                raise OSError(5, f"/proc/PID/mem: end of memory at {address + done:#x}")
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """All of `data` at `address`, whatever the protection of a private mapping there."""
        view = memoryview(data)
        while view:
            nr = os.pwrite(self.fd, view, address)
            if nr <= 0:
                raise OSError(5, f"/proc/PID/mem: nothing written at {address:#x}")
            view, address = view[nr:], address + nr

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> MemFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_mem(pid: int, address: int, size_bytes: int) -> bytes:
    """One read through /proc/PID/mem; keep a `MemFile` for many."""
    with MemFile(pid) as mem:
        return mem.read(address, size_bytes)


def write_mem(pid: int, address: int, data: bytes) -> None:
    """One write through /proc/PID/mem."""
    with MemFile(pid, writable=True) as mem:
        mem.write(address, data)
