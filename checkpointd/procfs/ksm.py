# SPDX-License-Identifier: Apache-2.0
"""Has kernel samepage merging been at work?  /sys/kernel/mm/ksm.

KSM replaces a page by one without the soft-dirty bit.  Memory that is mergeable now shows it (`mg` in smaps); memory
that was mergeable and no longer is shows nothing, and on kernels that part merged pages by un-sharing (6.12, not 6.1)
its rewritten pages read clean.  So what counts is whether the kernel's thread has looked at anything at all.

Source: Documentation/admin-guide/mm/ksm.rst, Linux mm/ksm.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KSM = Path("/sys/kernel/mm/ksm")


@dataclass(frozen=True, slots=True)
class KsmActivity:
    """The thread's counters at one moment.

    Attributes:
        running: `run` is 1.
        work: counters that grow with its work; empty on a kernel without KSM.
        merged: pages it keeps track of now.
    """

    running: bool
    work: tuple[int, ...]
    merged: int


def read_activity(directory: Path = KSM) -> KsmActivity:
    """The counters now; all zero without KSM."""

    def number(name: str) -> int:
        try:
            return int((directory / name).read_text())
        except (OSError, ValueError):
            return -1

    work = tuple(number(name) for name in ("full_scans", "pages_scanned"))
    merged = sum(max(0, number(f"pages_{name}")) for name in ("shared", "sharing", "unshared", "volatile"))
    return KsmActivity(number("run") == 1, work, merged)


def was_idle(before: KsmActivity, now: KsmActivity) -> bool:
    """Did it merge nothing between the two?  When that cannot be told, no.

    `pages_scanned` (Linux 6.6) tells exactly.  Before, `full_scans` stands still during a scan: then only a thread
    that is off, or has nothing in its hands, is idle.
    """
    if before.work != now.work:
        return False
    if now.work[1] >= 0:
        return True
    return not (now.running or before.running) or not (now.merged or before.merged)
