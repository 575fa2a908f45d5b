# SPDX-License-Identifier: Apache-2.0
"""Facts about a target that decide how its memory is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np

from checkpointd.memory import NO_RUNS, Runs, Vma, VmaKind, merge_runs
from checkpointd.procfs import process


def has_fork_relatives(pid: int) -> bool:
    """May the target share copy-on-write pages with a parent or child?

    process_vm_readv(2) would un-share them (it pins); /proc/PID/mem does not.  Relatives are a live child, or a
    parent that runs the same program.  A sibling whose parent is gone is not seen: that costs memory only.
    """
    with contextlib.suppress(OSError):
        for tid in process.thread_ids(pid):
            with open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
                if file.read(1):
                    return True
        parent = process.read_stat(pid).ppid
        return os.readlink(f"/proc/{pid}/exe") == os.readlink(f"/proc/{parent}/exe")
    return False


def pinned_runs(pid: int, vmas: Sequence[Vma]) -> Runs:
    """Pages that devices may write behind the page tables' back.

    The kernel tells how much is pinned (VmPin), not what: with any pin, all anonymous memory is suspect.
    """
    if process.read_status(pid).get("VmPin", "0 kB").split()[0] == "0":
        return NO_RUNS
    rows = [(vma.first_page, vma.nr_pages) for vma in vmas if vma.kind is VmaKind.ANON]
    return merge_runs(np.array(rows, dtype=np.uint64).reshape(-1, 2))
