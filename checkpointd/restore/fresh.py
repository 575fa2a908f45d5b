# SPDX-License-Identifier: Apache-2.0
"""Filling private anonymous memory that holds nothing yet: by UFFDIO_COPY, which takes two thirds of the time.

A write to a page that is not there makes the kernel clear it first, and then be overwritten.  UFFDIO_COPY allocates a
page, fills it and maps it.  The VMA has to be registered with a userfaultfd; write-protect mode is taken, with nothing
protected, so that any other way to write works there as well, and `close` gives all VMAs back as they were.

Left out is what must be of huge pages (UFFDIO_COPY makes small ones), and short runs of pages, which cost less together
in one process_vm_writev(2).  Where there is no userfaultfd nothing is fresh, and no error.

Raises OSError: the process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import os

import numpy as np
import numpy.typing as npt

from checkpointd.linux import pidfd
from checkpointd.linux import userfaultfd as uffd
from checkpointd.linux.arch import Nr
from checkpointd.memory import PAGE_SHIFT, VmaKind
from checkpointd.restore.plan import is_filled_writable
from checkpointd.restore.stub import Stub
from checkpointd.state.memory import AddressSpace, VmaState
from checkpointd.target.remote import Call

MIN_RUN_PAGES = 16
"""Shorter runs are for process_vm_writev(2): a call for each would cost more than clearing the pages."""
_MIN_VMA_PAGES = 64


class FreshMemory:
    """Which mappings of the new process are filled this way, and doing it; safe for many threads."""

    def __init__(self, stub: Stub, space: AddressSpace) -> None:
        self._vmas: list[VmaState] = []
        self._fd = -1
        wanted = [vma for vma in space.vmas if is_fresh(vma)]
        if wanted:
            self._open(stub, wanted)

    def _open(self, stub: Stub, wanted: list[VmaState]) -> None:
        number = stub.batch(
            [Call(uffd.NR_USERFAULTFD, (os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY,))]
        )[0]
        if number < 0:
            return
        process_fd = pidfd.pidfd_open(stub.pid)
        try:
            self._fd = pidfd.pidfd_getfd(process_fd, number)
        finally:
            os.close(process_fd)
            stub.call(int(Nr.CLOSE), number)
        try:
            uffd.handshake(self._fd, uffd.FEATURE_PAGEFAULT_FLAG_WP)
            for vma in wanted:
                uffd.register_wp(self._fd, vma.start, vma.end)
                self._vmas.append(vma)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM, errno.EBUSY):
                raise  # else: a kernel or a kind of memory without write-protect mode

    @property
    def starts(self) -> set[int]:
        """First addresses of the VMAs."""
        return {vma.start for vma in self._vmas}

    def write(self, first_page: int, data: npt.NDArray[np.uint8]) -> int:
        """Fill adjacent pages of one of these VMAs; bytes done: less than asked if a page was there already."""
        at, to, done = int(data.ctypes.data), first_page << PAGE_SHIFT, 0
        while done < data.nbytes:
            try:
                done += uffd.copy(self._fd, to + done, at + done, data.nbytes - done)
            except OSError as error:
                if error.errno in (errno.ESRCH, errno.ENOMEM):
                    raise
                if error.errno != errno.EAGAIN:
                    break  # whatever it is, process_vm_writev(2) can or says so
        return done

    def close(self) -> None:
        """Unregister all; what is written stays.

        Leaving write-protect mode walks all page tables to lift protection, a tenth of the time of the whole fill.
        There is none, so another mode is entered first.
        """
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):  # else it takes longer
            for vma in self._vmas:
                uffd.register_missing(self._fd, vma.start, vma.end)
        os.close(self._fd)
        self._fd, self._vmas = -1, []


def is_fresh(vma: VmaState) -> bool:
    """May the VMA be filled by UFFDIO_COPY?"""
    return (
        vma.kind is VmaKind.ANON
        and vma.end - vma.start >= _MIN_VMA_PAGES << PAGE_SHIFT
        and is_filled_writable(vma)
        and not vma.huge
        and not vma.flags & {"hg", "dp"}
    )
