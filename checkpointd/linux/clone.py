# SPDX-License-Identifier: Apache-2.0
"""clone3(2) for making a process or thread with a wanted id, and machine code of ours that makes the call.

Raises OSError only: EEXIST (an id is in use, a zombie's too), EPERM (ids need CAP_CHECKPOINT_RESTORE or
CAP_SYS_ADMIN), EAGAIN (RLIMIT_NPROC, pids.max).

Source: clone(2), Linux kernel/fork.c.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Sequence

from checkpointd.native import NativeFunction

CLONE_VM = 0x100
CLONE_FS = 0x200
CLONE_FILES = 0x400
CLONE_SIGHAND = 0x800
CLONE_PTRACE = 0x2000
CLONE_VFORK = 0x4000
CLONE_THREAD = 0x10000
CLONE_SYSVSEM = 0x40000
CLONE_CLEAR_SIGHAND = 0x1_0000_0000

CLONE_ARGS_BYTES = 88
ENTRY_BYTES = 64
ENTRY_RESULT_AT = 56
FIRST_ARG_IS_ADDRESS = 1 << 30
"""In an entry's number: the first argument is the address of an earlier result."""

_ENTRY = struct.Struct("=II6Qq")
_MASK = (1 << 64) - 1
_MFD_CLOEXEC, _MFD_EXEC = 1, 0x10


def pack_clone_args(
    flags: int,
    *,
    exit_signal: int = 0,
    stack: int = 0,
    stack_bytes: int = 0,
    set_tid_at: int = 0,
) -> bytes:
    """struct clone_args.

    Args:
        set_tid_at: address of the wanted id (pid_t) in our own pid namespace; 0 for any.
    """
    return struct.pack(
        "=11Q", flags, 0, 0, 0, exit_signal, stack, stack_bytes, 0, set_tid_at, 1 if set_tid_at else 0, 0
    )


def pack_entry(nr: int, args: Sequence[int], *, may_fail: bool = False, result: int = 0) -> bytes:
    """One entry of a table of system calls (restore/blobs/*.S)."""
    words = [arg & _MASK for arg in args] + [0] * (6 - len(args))
    return _ENTRY.pack(nr, int(may_fail), *words, result)


def entry_result(table: bytes | bytearray, index: int) -> int:
    at = index * ENTRY_BYTES + ENTRY_RESULT_AT
    return int.from_bytes(table[at : at + 8], "little", signed=True)


class NativeCode(NativeFunction):
    """A native function that may make a child which shares our memory."""

    def __call__(self, *args: int) -> int:
        """Run it with all signals of this thread blocked: no handler may run in such a child."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            return super().__call__(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def executable_memfd(name: str, content: bytes) -> int:
    """A close-on-exec memfd that may be executed.

    Raises:
        OSError: EACCES where vm.memfd_noexec forbids it.
    """
    try:
        fd = os.memfd_create(name, _MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # MFD_EXEC came with Linux 6.3
        fd = os.memfd_create(name, _MFD_CLOEXEC)
    os.write(fd, content)
    return fd
