# SPDX-License-Identifier: Apache-2.0
"""/proc/PID/clear_refs: begin a new epoch of soft-dirty tracking.

The kernel holds the mmap lock for writing meanwhile.  It "succeeds" on kernels without soft-dirty tracking, so that
success says nothing.  Raises OSError: ENOENT or ESRCH when the process is gone, EACCES, ENOMEM, EINTR.

Source: Documentation/admin-guide/mm/soft-dirty.rst, Linux fs/proc/task_mmu.c.
"""

from __future__ import annotations


def clear_soft_dirty(pid: int) -> None:
    """Clear the soft-dirty bit of every page and VM_SOFTDIRTY of every VMA."""
    with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
        file.write(b"4")
