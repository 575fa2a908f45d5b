# SPDX-License-Identifier: Apache-2.0
"""rseq(2): a thread stopped inside a critical section.

Source: rseq(2), Linux include/uapi/linux/rseq.h, kernel/rseq.c.
"""

from __future__ import annotations

import struct

from checkpointd.linux.process_vm import MemFile
from checkpointd.linux.ptrace import RseqConfig
from checkpointd.target.registers import UserRegs

_RSEQ_CS = struct.Struct("=IIQQQ")  # version, flags, start_ip, post_commit_offset, abort_ip


def abort_critical_section(mem: MemFile, rseq: RseqConfig, regs: UserRegs) -> bool:
    """Move a thread out of its rseq critical section, as the kernel does for a preempted one.

    Injection moves rip away, upon which the kernel forgets that a section was being run: it would go on
    afterwards as if it had never been disturbed, on another CPU perhaps.
    """
    try:
        section = int.from_bytes(mem.read(rseq.pointer + 8, 8), "little")
        if not section:
            return False
        _, _, start, length, abort = _RSEQ_CS.unpack(mem.read(section, _RSEQ_CS.size))
    except OSError:
        return False  # the program left a bad pointer: the kernel will judge it
    if not 0 <= regs.rip - start < length:
        return False
    regs.rip = abort
    regs.leave_syscall()
    return True
