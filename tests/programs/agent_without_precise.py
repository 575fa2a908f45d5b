# SPDX-License-Identifier: Apache-2.0
"""An agent that finds neither userfaultfd nor the switch of precise tracking: a seccomp filter stands before them."""

import ctypes
import os
import struct
import sys

from kernel_shim import switch

from checkpointd.linux import seccomp

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
NR_USERFAULTFD = 323
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD+W+ABS, BPF_JMP+JEQ+K, BPF_RET+K
AT_NR, AT_ARGUMENT = 0, 16  # struct seccomp_data
EINVAL, EPERM = 22, 1

FILTER = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in [
        (LOAD, 0, 0, AT_NR),
        (EQUAL, 4, 0, NR_USERFAULTFD),  # to EPERM
        (EQUAL, 0, 4, switch.SYS_PRCTL),  # else allowed
        (LOAD, 0, 0, AT_ARGUMENT),
        (EQUAL, 3, 0, switch.PR_SET_PRECISE_SOFTDIRTY),  # to EINVAL
        (EQUAL, 2, 1, switch.PR_GET_PRECISE_SOFTDIRTY),
        (RETURN, 0, 0, seccomp.RET_ERRNO | EPERM),
        (RETURN, 0, 0, seccomp.RET_ALLOW),
        (RETURN, 0, 0, seccomp.RET_ERRNO | EINVAL),
    ]
)


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


program = Program(len(FILTER) // 8, FILTER)
switch.raw_syscall(switch.SYS_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
switch.raw_syscall(switch.SYS_PRCTL, PR_SET_SECCOMP, seccomp.MODE_FILTER, ctypes.addressof(program), 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "checkpointd.agent", *sys.argv[1:]])
