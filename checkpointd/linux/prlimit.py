# SPDX-License-Identifier: Apache-2.0
"""Resource limits of another process: prlimit(2).

Raises OSError: ESRCH, EPERM (no access, or a hard limit would be raised without CAP_SYS_RESOURCE).
"""

from __future__ import annotations

import struct

from checkpointd.linux._libc import syscall
from checkpointd.linux.arch import Nr

NR_LIMITS = 16
RLIMIT_STACK = 3
RLIM_INFINITY = (1 << 64) - 1
NAMES = (
    "cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile",
    "memlock", "as", "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime",
)  # fmt: skip


def get_limit(pid: int, resource: int) -> tuple[int, int]:
    """(soft, hard); RLIM_INFINITY for none."""
    old = bytearray(16)
    syscall(Nr.PRLIMIT64, pid, resource, 0, old, name="prlimit")
    soft, hard = struct.unpack("=QQ", old)
    return soft, hard


def set_limit(pid: int, resource: int, soft: int, hard: int) -> None:
    syscall(
        Nr.PRLIMIT64, pid, resource, struct.pack("=QQ", soft, hard), 0, name=f"prlimit({NAMES[resource]})"
    )
