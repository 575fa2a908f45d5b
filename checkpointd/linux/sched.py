# SPDX-License-Identifier: Apache-2.0
"""Scheduling of one thread, from outside: sched_setattr(2), sched_setaffinity(2), ioprio_set(2), PR_SCHED_CORE.

Raises OSError: ESRCH, EPERM (CAP_SYS_NICE), EINVAL, EBUSY (no bandwidth for SCHED_DEADLINE).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr

_LAYOUT = struct.Struct("=IIQiIQQQII")  # struct sched_attr, 56 bytes
_KEEP_ALL, _UTIL_CLAMP = 0x08 | 0x10, 0x20 | 0x40
_IOPRIO_WHO_PROCESS = 1
SCHED_DEADLINE = 6
_PR_SCHED_CORE, _PR_SCHED_CORE_GET = 62, 0


class SchedAttr(NamedTuple):
    """struct sched_attr without its size.

    The clamps of utilisation are 0 to 1024, and both 0 where the kernel has none (CONFIG_UCLAMP_TASK).
    """

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int
    util_min: int
    util_max: int


def get_attr(tid: int) -> SchedAttr:
    buffer = bytearray(_LAYOUT.size)
    syscall(Nr.SCHED_GETATTR, tid, buffer, len(buffer), 0, name="sched_getattr")
    return SchedAttr(*_LAYOUT.unpack(buffer)[1:])


def set_attr(tid: int, attr: SchedAttr) -> None:
    """All but the clamps of utilisation, which stay as they are."""
    syscall(Nr.SCHED_SETATTR, tid, _LAYOUT.pack(_LAYOUT.size, *attr), 0, name="sched_setattr")


def set_clamps(tid: int, util_min: int, util_max: int) -> None:
    """Nothing but the clamps.  EOPNOTSUPP without CONFIG_UCLAMP_TASK."""
    attr = SchedAttr(0, _KEEP_ALL | _UTIL_CLAMP, 0, 0, 0, 0, 0, util_min, util_max)
    syscall(Nr.SCHED_SETATTR, tid, _LAYOUT.pack(_LAYOUT.size, *attr), 0, name="sched_setattr")


def get_ioprio(tid: int) -> int:
    """The thread's I/O priority; 0 when it was never set."""
    return syscall(Nr.IOPRIO_GET, _IOPRIO_WHO_PROCESS, tid, name="ioprio_get")


def set_ioprio(tid: int, ioprio: int) -> None:
    syscall(Nr.IOPRIO_SET, _IOPRIO_WHO_PROCESS, tid, ioprio, name="ioprio_set")


def core_cookie(tid: int) -> int:
    """Which threads it shares a core with: those of the same cookie; 0 for all, or where the kernel cannot tell.

    Source: Documentation/admin-guide/hw-vuln/core-scheduling.rst.
    """
    cookie = bytearray(8)
    try:
        syscall(Nr.PRCTL, _PR_SCHED_CORE, _PR_SCHED_CORE_GET, tid, 0, cookie, name="prctl(PR_SCHED_CORE)")
    except OSError:  # no CONFIG_SCHED_CORE, no SMT, or not ours to ask
        return 0
    return int.from_bytes(cookie, "little")
