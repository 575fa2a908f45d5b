# SPDX-License-Identifier: Apache-2.0
"""The switch of the patched kernel, ``prctl(PR_SET_PRECISE_SOFTDIRTY)``, and our raw system calls.

The setting belongs to an address space: a child inherits it, a new program keeps it. ``prctl`` acts on its
caller, so there are three doors:

* oneself: ``turn_on``, ``turn_off``, ``query``;
* a program to be started: ``exec_precise``;
* a running process: ``set_call`` and ``query_call`` describe the system call, somebody else executes it there
  and hands the result to ``check_result``.

Besides there is the default for programs started from now on, a sysctl: ``read_default``, ``write_default``.

Errors are ``OSError``. ``EINVAL`` means that this kernel has no precise tracking.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

SYS_PRCTL = 157
PR_SET_PRECISE_SOFTDIRTY = 0x50534454
PR_GET_PRECISE_SOFTDIRTY = 0x50534455
SYSCTL = Path("/proc/sys/vm/precise_softdirty_tracking")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class SystemCall(NamedTuple):
    """One system call to be executed by another process: x86-64 number and up to six arguments."""

    nr: int
    args: tuple[int, ...]


def raw_syscall(nr: int, *args: int) -> int:
    """Execute a system call of this process.

    Args:
        nr: number on x86-64.
        args: unsigned long each.

    Raises:
        OSError: with the kernel's errno.

    Source: syscall(2).
    """
    result: int = _libc.syscall(ctypes.c_long(nr), *(ctypes.c_ulong(arg) for arg in args))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"system call {nr}")
    return result


def poke(vaddr: int, value: int) -> None:
    """Store one byte into our own memory, as a plain store instruction (the page fault is what matters)."""
    ctypes.c_ubyte.from_address(vaddr).value = value


def set_call(on: bool) -> SystemCall:
    """The system call which turns precise tracking on or off for the process that executes it."""
    return SystemCall(SYS_PRCTL, (PR_SET_PRECISE_SOFTDIRTY, int(on), 0, 0, 0))


def query_call() -> SystemCall:
    """The system call which tells whether precise tracking is on for the process that executes it."""
    return SystemCall(SYS_PRCTL, (PR_GET_PRECISE_SOFTDIRTY, 0, 0, 0, 0))


def check_result(result: int) -> int:
    """Judge what one of these calls left in ``rax``: the value, or the error it stands for.

    Raises:
        OSError: ``result`` is a negative errno.
    """
    if result < 0:
        raise OSError(-result, os.strerror(-result), "prctl(PRECISE_SOFTDIRTY)")
    return result


def turn_on() -> None:
    """Keep soft-dirty and clean mappings of this process apart from now on.

    Raises:
        OSError: EINVAL if the kernel cannot.
    """
    call = set_call(True)
    raw_syscall(call.nr, *call.args)


def turn_off() -> None:
    """Let mappings of this process be merged as ever. Mappings that are apart stay so until they are touched.

    Raises:
        OSError: EINVAL if the kernel cannot keep them apart anyway.
    """
    call = set_call(False)
    raw_syscall(call.nr, *call.args)


def query() -> bool | None:
    """Whether precise tracking is on for this process; None if this kernel does not know it.

    Raises:
        OSError: anything but EINVAL.
    """
    call = query_call()
    try:
        return bool(raw_syscall(call.nr, *call.args))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def exec_precise(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> NoReturn:
    """Become the program ``argv``, with precise tracking on for it and for all its children.

    Meant for a process made for the purpose, between fork and exec: the setting belongs to the address
    space, and a process made by vfork shares its parent's.

    Raises:
        OSError: EINVAL if the kernel cannot (nothing was executed); or whatever kept the program from
            starting, precise tracking then being on for this process.
    """
    turn_on()
    os.execvpe(argv[0], list(argv), dict(os.environ if environment is None else environment))  # noqa: S606


def read_default() -> bool | None:
    """The system's default for new programs; None if this kernel has none.

    Raises:
        OSError: the sysctl is there and cannot be read.
    """
    try:
        return SYSCTL.read_text().strip() == "1"
    except FileNotFoundError:
        return None


def write_default(on: bool) -> None:
    """Set the system's default. It reaches programs started afterwards, and no process that chose for itself.

    Raises:
        OSError: ENOENT without the patch, EACCES or EPERM without the right.
    """
    SYSCTL.write_text(f"{int(on)}\n")
