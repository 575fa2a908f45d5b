# SPDX-License-Identifier: Apache-2.0
"""ptrace(2) and the waits that go with it, for tracees attached by PTRACE_SEIZE.

Everything here acts for the calling *thread*: a tracee belongs to the thread that seized it.  Register images are
`struct user_regs_struct` (216 bytes), signal masks 64-bit words.

Raises OSError only: ESRCH (no such thread, or it is not stopped, or it is not ours), EPERM (access, already
traced, exiting), EIO (a request or a register value the kernel refuses).

Source: ptrace(2), waitid(2), Linux kernel/ptrace.c, kernel/exit.c.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from typing import NamedTuple

from checkpointd.linux._libc import address_of, syscall

NR_PTRACE = 101

POKETEXT = 4
CONT = 7
GETREGS = 12
SETREGS = 13
DETACH = 17
SYSCALL = 24
SETOPTIONS = 0x4200
GETSIGINFO = 0x4202
GETREGSET = 0x4204
SETREGSET = 0x4205
SEIZE = 0x4206
INTERRUPT = 0x4207
PEEKSIGINFO = 0x4209
GETSIGMASK = 0x420A
SETSIGMASK = 0x420B
SECCOMP_GET_FILTER = 0x420C
GET_RSEQ_CONFIGURATION = 0x420F
GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

O_TRACESYSGOOD = 0x1
O_TRACEEXEC = 0x10
O_EXITKILL = 0x10_0000

EVENT_EXEC = 4
EVENT_STOP = 128
SYSCALL_STOP = 0x85
"""The stop "signal" of a system call stop under PTRACE_O_TRACESYSGOOD."""

NT_X86_XSTATE = 0x202

REGS_SIZE = 216
_WALL = 0x4000_0000
_SIGINFO_SIZE = 128


class WaitStatus(NamedTuple):
    """What a wait saw.

    Attributes:
        exited: the thread is dead; `code` is then its exit code or signal.
        code: of a stop: signal | event << 8.
    """

    exited: bool
    code: int

    @property
    def signal(self) -> int:
        return self.code & 0xFF

    @property
    def event(self) -> int:
        return self.code >> 8


class RseqConfig(NamedTuple):
    """struct ptrace_rseq_configuration: a thread's registration of rseq(2)."""

    pointer: int
    size: int
    signature: int
    flags: int


class _PinnedBuffer:
    """One locked page for SETREGS: the kernel copies registers field by field from our memory, and a page fault
    half way would let a SIGKILL tear the copy.  Not locked where RLIMIT_MEMLOCK forbids it; it has then just
    been written, which leaves a swap-out within microseconds as the only way to fail.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.page[0] = 0
        try:
            syscall(149, self.page, mmap.PAGESIZE, name="mlock")
        except OSError:
            pass


_pinned = _PinnedBuffer()


def _ptrace(request: int, tid: int, addr: object, data: object, name: str) -> int:
    return syscall(NR_PTRACE, request, tid, addr, data, name=f"ptrace({name})")


def seize(tid: int, options: int) -> None:
    """Attach to a thread without stopping it."""
    _ptrace(SEIZE, tid, 0, options, "SEIZE")


def interrupt(tid: int) -> None:
    """Ask a seized thread to stop; it reports an EVENT_STOP."""
    _ptrace(INTERRUPT, tid, 0, 0, "INTERRUPT")


def cont(tid: int, signum: int = 0) -> None:
    """Let a stopped thread run; in a signal-delivery-stop, deliver `signum`."""
    _ptrace(CONT, tid, 0, signum, "CONT")


def cont_to_syscall(tid: int, signum: int = 0) -> None:
    """Like `cont`, up to the next entry to or exit from a system call."""
    _ptrace(SYSCALL, tid, 0, signum, "SYSCALL")


def detach(tid: int, signum: int = 0) -> None:
    """Let a stopped thread go for good."""
    _ptrace(DETACH, tid, 0, signum, "DETACH")


def set_options(tid: int, options: int) -> None:
    _ptrace(SETOPTIONS, tid, 0, options, "SETOPTIONS")


def get_regs(tid: int) -> bytes:
    """General registers of a stopped thread."""
    buffer = bytearray(REGS_SIZE)
    _ptrace(GETREGS, tid, 0, buffer, "GETREGS")
    return bytes(buffer)


def set_regs(tid: int, regs: bytes) -> None:
    """Set all general registers at once; a death of ours leaves either the old or the new ones."""
    if len(regs) != REGS_SIZE:
        raise ValueError(f"registers take {REGS_SIZE} bytes, not {len(regs)}")
    with _pinned.lock:
        _pinned.page[:REGS_SIZE] = regs
        _ptrace(SETREGS, tid, 0, _pinned.page, "SETREGS")


def get_sigmask(tid: int) -> int:
    """The blocked signals; inside ppoll and sigsuspend those that will be restored afterwards."""
    buffer = bytearray(8)
    _ptrace(GETSIGMASK, tid, 8, buffer, "GETSIGMASK")
    return int.from_bytes(buffer, "little")


def set_sigmask(tid: int, mask: int) -> None:
    _ptrace(SETSIGMASK, tid, 8, bytearray(mask.to_bytes(8, "little")), "SETSIGMASK")


def get_regset(tid: int, regset: int, max_bytes: int = 1 << 16) -> bytes:
    """A register set (NT_X86_XSTATE, ...) in the kernel's format."""
    buffer = bytearray(max_bytes)
    iov = bytearray(struct.pack("=QQ", address_of(buffer), max_bytes))
    _ptrace(GETREGSET, tid, regset, iov, "GETREGSET")
    return bytes(buffer[: struct.unpack("=QQ", iov)[1]])


def set_regset(tid: int, regset: int, data: bytes) -> None:
    """Set a register set.

    Raises:
        OSError: EINVAL or EFAULT for an image that does not fit this CPU or thread.
    """
    buffer = bytearray(data)
    iov = bytearray(struct.pack("=QQ", address_of(buffer), len(buffer)))
    _ptrace(SETREGSET, tid, regset, iov, "SETREGSET")


def get_siginfo(tid: int) -> bytes:
    """The siginfo of a signal-delivery-stop.

    Raises:
        OSError: EINVAL when the thread is in a group-stop.
    """
    buffer = bytearray(_SIGINFO_SIZE)
    _ptrace(GETSIGINFO, tid, 0, buffer, "GETSIGINFO")
    return bytes(buffer)


def peek_siginfo(tid: int, *, shared: bool) -> list[bytes]:
    """Pending signals, in order, without taking them: of the thread, or of the process."""
    found: list[bytes] = []
    batch = 32
    while True:
        buffer = bytearray(_SIGINFO_SIZE * batch)
        args = bytearray(struct.pack("=QIi", len(found), 1 if shared else 0, batch))
        nr = _ptrace(PEEKSIGINFO, tid, args, buffer, "PEEKSIGINFO")
        found += [bytes(buffer[n * _SIGINFO_SIZE : (n + 1) * _SIGINFO_SIZE]) for n in range(nr)]
        if nr < batch:
            return found


def get_rseq(tid: int) -> RseqConfig | None:
    """The thread's rseq registration; None when it has none or the kernel cannot tell (before 5.13)."""
    buffer = bytearray(24)
    try:
        _ptrace(GET_RSEQ_CONFIGURATION, tid, 24, buffer, "GET_RSEQ_CONFIGURATION")
    except OSError as error:
        if error.errno in (5, 22, 38):  # EIO, EINVAL, ENOSYS: unknown request
            return None
        raise
    pointer, size, signature, flags, _ = struct.unpack("=QIIII", buffer)
    return RseqConfig(pointer, size, signature, flags) if pointer else None


def get_syscall_dispatch_mode(tid: int) -> int:
    """PR_SYS_DISPATCH_* mode of the thread; 0 (off) also where the kernel cannot tell (before 6.4)."""
    buffer = bytearray(32)
    try:
        _ptrace(GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32, buffer, "GET_SYSCALL_USER_DISPATCH_CONFIG")
    except OSError as error:
        if error.errno in (5, 22, 38):
            return 0
        raise
    return int.from_bytes(buffer[:8], "little")


def get_seccomp_filter(tid: int, index: int) -> bytes:
    """The `index`-th seccomp filter as an array of struct sock_filter (8 bytes each).

    Raises:
        OSError: ENOENT (no such filter), EACCES or EPERM (needs CAP_SYS_ADMIN), EMEDIUMTYPE (not classic BPF).
    """
    nr = _ptrace(SECCOMP_GET_FILTER, tid, index, 0, "SECCOMP_GET_FILTER")
    buffer = bytearray(8 * nr)
    _ptrace(SECCOMP_GET_FILTER, tid, index, buffer, "SECCOMP_GET_FILTER")
    return bytes(buffer)


def peek_wait(tid: int, *, block: bool) -> WaitStatus | None:
    """What a wait for the thread would report, left in place; None when there is nothing yet.

    Signal-delivery-stops must only be looked at this way: taking the report forgets the signal, and if the tracer
    then dies the signal is lost.

    Raises:
        ChildProcessError: the thread is not ours (any more).
    """
    options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | _WALL | (0 if block else os.WNOHANG)
    info = os.waitid(os.P_PID, tid, options)
    if info is None:
        return None
    return WaitStatus(info.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED), info.si_status)


def take_stop(tid: int) -> None:
    """Take the report of a stop (EVENT_STOP and other event stops only)."""
    os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | _WALL)


def reap(tid: int, *, block: bool = False) -> bool:
    """Take the report of a death; False when there is none (yet).

    A wait with WEXITED alone would also take a *stop* of a tracee (the kernel shows those whatever was asked for),
    so it is looked at first.

    Args:
        block: wait for the death, taking stops on the way: only for a thread that has been killed.
    """
    try:
        while True:
            status = peek_wait(tid, block=block)
            if status is None:
                return False
            if status.exited:
                return os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | _WALL) is not None
            if not block:
                return False
            take_stop(tid)
    except ChildProcessError:
        return False


def poke(tid: int, address: int, data: bytes) -> None:
    """Write to the thread's memory, 8 bytes a call, past page protection; `data` a multiple of 8 bytes."""
    for at in range(0, len(data), 8):
        _ptrace(POKETEXT, tid, address + at, int.from_bytes(data[at : at + 8], "little"), "POKETEXT")
