# SPDX-License-Identifier: Apache-2.0
"""prctl(2): numbers and the layout of its one struct, for calls made in another process.

Source: prctl(2), Linux include/uapi/linux/prctl.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr

PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_GET_TSC = 25
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_TIMERSLACK = 29
PR_MCE_KILL = 33
PR_SET_MM = 35
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38
PR_GET_TID_ADDRESS = 40
PR_SET_THP_DISABLE = 41
PR_GET_THP_DISABLE = 42
PR_CAP_AMBIENT = 47
PR_GET_SPECULATION_CTRL = 52
PR_SET_SPECULATION_CTRL = 53
PR_SET_IO_FLUSHER = 57
PR_GET_MDWE = 66
PR_SET_MEMORY_MERGE = 67
PR_GET_MEMORY_MERGE = 68
PR_TIMER_CREATE_RESTORE_IDS = 77
PR_SET_VMA = 0x53564D41
PR_SET_VMA_ANON_NAME = 0
PR_SET_MM_MAP = 14
PR_CAP_AMBIENT_RAISE = 2
PR_MCE_KILL_SET = 1
PR_SPEC_PRCTL, PR_SPEC_ENABLE, PR_SPEC_FORCE_DISABLE = 1, 2, 8
SPECULATION = ("store bypass", "indirect branches", "L1D flush")  # PR_SPEC_STORE_BYPASS and the following
PR_MCE_KILL_DEFAULT = 2

SECBIT_KEEP_CAPS = 1 << 4
SECBIT_NO_SETUID_FIXUP = 1 << 2

MM_MAP_SIZE = 104
_NO_EXE = 0xFFFF_FFFF


def pack_mm_map(values: Sequence[int], auxv_address: int, auxv_size: int, exe_fd: int | None) -> bytes:
    """struct prctl_mm_map.

    Args:
        values: start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
            env_start, env_end.
        exe_fd: a descriptor of the process, or None to leave /proc/PID/exe alone.
    """
    if len(values) != 11:
        raise ValueError("struct prctl_mm_map has 11 addresses")
    fd = _NO_EXE if exe_fd is None else exe_fd
    return struct.pack("=11QQII", *values, auxv_address, auxv_size, fd)


def prctl(option: int, *args: int) -> int:
    """prctl(2) in our own thread."""
    return syscall(Nr.PRCTL, option, *args, *(0,) * (4 - len(args)), name="prctl")


def own_speculation() -> tuple[int, ...]:
    """PR_GET_SPECULATION_CTRL of our thread, in the order of `SPECULATION`; 0 where the kernel has no such control."""
    found = []
    for which in range(len(SPECULATION)):
        try:
            found.append(prctl(PR_GET_SPECULATION_CTRL, which, 0, 0, 0))
        except OSError:
            found.append(0)
    return tuple(found)
