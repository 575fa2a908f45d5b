# SPDX-License-Identifier: Apache-2.0
"""General registers of a thread (x86-64 `struct user_regs_struct`) and what a stop did to its system call.

Source: sys/user.h, Linux arch/x86/kernel/signal.c (restart of system calls).
"""

from __future__ import annotations

import dataclasses
import operator
import struct
from dataclasses import dataclass

_LAYOUT = struct.Struct("=27Q")
_SIGN = 1 << 63
_WORD = 1 << 64

CS_64BIT = 0x33
"""Code segment of 64-bit user code; 32-bit code has 0x23."""

ERESTARTSYS = 512
ERESTARTNOINTR = 513
ERESTARTNOHAND = 514
ERESTART_RESTARTBLOCK = 516
NR_RESTART_SYSCALL = 219


@dataclass(slots=True)
class UserRegs:
    """All 27 words, unsigned, in the kernel's order."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    @staticmethod
    def from_bytes(data: bytes) -> UserRegs:
        return UserRegs(*_LAYOUT.unpack(data))

    def to_bytes(self) -> bytes:
        return _LAYOUT.pack(*_words(self))

    def copy(self) -> UserRegs:
        return UserRegs(*_words(self))

    @property
    def result(self) -> int:
        """rax as a signed number: the result of a system call."""
        return self.rax - _WORD if self.rax & _SIGN else self.rax

    @property
    def syscall_nr(self) -> int:
        """The system call the thread is in; -1 when it was stopped in its own code."""
        return self.orig_rax - _WORD if self.orig_rax & _SIGN else self.orig_rax

    @property
    def will_restart(self) -> bool:
        """Will the kernel make the interrupted system call go on?"""
        return self.syscall_nr >= 0 and -self.result in (
            ERESTARTSYS,
            ERESTARTNOINTR,
            ERESTARTNOHAND,
            ERESTART_RESTARTBLOCK,
        )

    def leave_syscall(self) -> None:
        """Make the kernel believe that no system call is to be restarted."""
        self.orig_rax = _WORD - 1


NAMES = tuple(field.name for field in dataclasses.fields(UserRegs))
_words = operator.attrgetter(*NAMES)


def word(value: int) -> int:
    """A signed number as a 64-bit word."""
    return value & (_WORD - 1)


def signed(value: int) -> int:
    """A 64-bit word as a signed number."""
    return value - _WORD if value & _SIGN else value


def home_context(regs: UserRegs) -> UserRegs:
    """Registers from which user code goes on as if the kernel had restarted the interrupted call.

    Used where a thread is put back in user mode, out of the kernel's sight: the restart is done by hand.
    """
    home = regs.copy()
    if not regs.will_restart:
        return home
    restart_block = regs.result == -ERESTART_RESTARTBLOCK
    home.rax = NR_RESTART_SYSCALL if restart_block else regs.orig_rax
    home.rip -= 2  # back onto the system call instruction
    return home
