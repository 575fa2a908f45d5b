# SPDX-License-Identifier: Apache-2.0
"""Capability sets as 64-bit masks: capset(2)'s layout and what we have ourselves.

Source: capabilities(7), Linux include/uapi/linux/capability.h.
"""

from __future__ import annotations

import struct
from pathlib import Path

CAP_CHOWN = 0
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_IPC_LOCK = 14
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_SYS_NICE = 23
CAP_SYS_RESOURCE = 24
CAP_CHECKPOINT_RESTORE = 40
CAP_LAST = 40

_VERSION_3 = 0x2008_0522


def pack_header() -> bytes:
    """struct __user_cap_header_struct for the calling thread."""
    return struct.pack("=Ii", _VERSION_3, 0)


def pack_data(effective: int, permitted: int, inheritable: int) -> bytes:
    """struct __user_cap_data_struct[2]."""
    low, high = 0xFFFF_FFFF, 32
    return struct.pack(
        "=6I",
        effective & low, permitted & low, inheritable & low,
        effective >> high, permitted >> high, inheritable >> high,
    )  # fmt: skip


def effective() -> int:
    """The effective set of our own thread."""
    for line in Path("/proc/thread-self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def has(mask: int, capability: int) -> bool:
    return bool(mask >> capability & 1)
