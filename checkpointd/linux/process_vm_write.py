# SPDX-License-Identifier: Apache-2.0
"""process_vm_writev(2) for runs: the fastest way to fill another process's memory.

Ranges must be writable; other places want /proc/PID/mem (`process_vm.MemFile`).

Raises OSError only: ESRCH (gone), EPERM (ptrace access), EFAULT (not all of it is mapped and writable).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr
from checkpointd.linux.process_vm import IOV_MAX, Iovecs

_EFAULT = 14


def write_runs(pid: int, remote_iov: Iovecs, data: npt.NDArray[Any]) -> None:
    """Write `data`, contiguous, over the remote ranges one after the other.

    Raises:
        OSError: not everything could be written.
    """
    remote = np.ascontiguousarray(remote_iov, dtype=np.uint64)
    base, done = int(data.ctypes.data), 0
    local = np.empty((1, 2), dtype=np.uint64)
    for first in range(0, len(remote), IOV_MAX):
        part = remote[first : first + IOV_MAX]
        wanted = int(part[:, 1].sum())
        if done + wanted > data.nbytes:
            raise ValueError("the ranges are longer than the data")
        local[0] = base + done, wanted
        nr = syscall(Nr.PROCESS_VM_WRITEV, pid, local, 1, part, len(part), 0, name="process_vm_writev")
        if nr != wanted:
            raise OSError(_EFAULT, f"process_vm_writev: {nr} of {wanted} bytes at {int(part[0, 0]):#x}")
        done += wanted
