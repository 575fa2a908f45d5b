# SPDX-License-Identifier: Apache-2.0
"""What a target's seccomp filters would do to a given system call: classic BPF, evaluated here.

Suspending the filters (PTRACE_O_SUSPEND_SECCOMP) ends with the tracer, so a dying agent would leave the target's
thread making calls that kill it.  Instead each call is evaluated beforehand, with its exact number, arguments and
instruction pointer, and only made when no filter kills, traps, traces or notifies.

Source: seccomp(2), Linux kernel/seccomp.c (seccomp_check_filter lists the allowed instructions), net/core/filter.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from checkpointd.linux import ptrace
from checkpointd.linux.seccomp import (
    ACTION_NAMES,
    AUDIT_ARCH_X86_64,
    RET_ACTION_FULL,
    RET_ALLOW,
    RET_ERRNO,
    RET_KILL_PROCESS,
    RET_LOG,
)

_INSN = struct.Struct("=HBBI")
_DATA = struct.Struct("=iIQ6Q")
_M32 = 0xFFFF_FFFF
_NR_SLOTS = 16

# classes of BPF instructions
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_ABS, _IMM, _MEM, _LEN = 0x20, 0x00, 0x60, 0x80


class FilterError(ValueError):
    """An instruction no seccomp filter may contain: we do not understand this filter."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter: (code, jump if true, jump if false, k) for each instruction."""

    instructions: tuple[tuple[int, int, int, int], ...]

    @staticmethod
    def from_bytes(data: bytes) -> Filter:
        return Filter(tuple(_INSN.iter_unpack(data)))

    def evaluate(self, nr: int, args: Sequence[int], ip: int, arch: int = AUDIT_ARCH_X86_64) -> int:
        """The filter's 32-bit answer.

        Raises:
            FilterError: it does what no seccomp filter may do.
        """
        words = [arg & 0xFFFF_FFFF_FFFF_FFFF for arg in args] + [0] * (6 - len(args))
        data = _DATA.pack(nr, arch, ip & 0xFFFF_FFFF_FFFF_FFFF, *words)
        a = x = pc = 0
        memory = [0] * _NR_SLOTS
        while pc < len(self.instructions):
            code, jt, jf, k = self.instructions[pc]
            pc += 1
            kind = code & 0x07
            if kind == _LD:
                a = _load(code, k, data, memory)
            elif kind == _LDX:
                x = _load(code, k, data, memory)
            elif kind == _ST:
                memory[k] = a
            elif kind == _STX:
                memory[k] = x
            elif kind == _ALU:
                a = _alu(code, a, x if code & 0x08 else k)
            elif kind == _JMP:
                pc += k if code & 0xF0 == 0 else (jt if _test(code, a, x if code & 0x08 else k) else jf)
            elif kind == _RET:
                return a if code & 0x18 == 0x10 else k
            elif code & 0xF8 == 0x00:
                x = a
            elif code & 0xF8 == 0x80:
                a = x
            else:
                raise FilterError(f"unknown instruction {code:#x}")
        raise FilterError("the filter runs past its end")


def _load(code: int, k: int, data: bytes, memory: list[int]) -> int:
    mode = code & 0xE0
    if mode == _ABS:
        if k % 4 or k + 4 > len(data):
            raise FilterError(f"load at {k}")
        return int.from_bytes(data[k : k + 4], "little")
    if mode == _IMM:
        return k
    if mode == _MEM:
        return memory[k]
    if mode == _LEN:
        return len(data)
    raise FilterError(f"unknown load {code:#x}")


def _alu(code: int, a: int, operand: int) -> int:
    match code & 0xF0:
        case 0x00:
            a += operand
        case 0x10:
            a -= operand
        case 0x20:
            a *= operand
        case 0x30:
            # division by a zero X ends a classic filter with 0, which is KILL_THREAD
            if operand == 0:
                raise FilterError("division by zero")
            a //= operand
        case 0x40:
            a |= operand
        case 0x50:
            a &= operand
        case 0x60:
            a <<= operand & 31
        case 0x70:
            a >>= operand & 31
        case 0x80:
            a = -a
        case 0xA0:
            a ^= operand
        case _:
            raise FilterError(f"unknown arithmetic {code:#x}")
    return a & _M32


def _test(code: int, a: int, operand: int) -> bool:
    match code & 0xF0:
        case 0x10:
            return a == operand
        case 0x20:
            return a > operand
        case 0x30:
            return a >= operand
        case 0x40:
            return bool(a & operand)
    raise FilterError(f"unknown jump {code:#x}")


def _severity(answer: int) -> int:
    # the kernel takes the smallest as a signed number: KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, ...
    action = answer & RET_ACTION_FULL
    return action - (1 << 32) if action & 0x8000_0000 else action


class Filters:
    """All filters of one thread."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = tuple(filters)

    def __len__(self) -> int:
        return len(self._filters)

    @staticmethod
    def of_thread(tid: int) -> Filters:
        """Read them from a stopped tracee.

        Raises:
            OSError: EACCES, EPERM: CAP_SYS_ADMIN is needed; EIO: the kernel has no such request.
        """
        filters: list[Filter] = []
        while True:
            try:
                filters.append(Filter.from_bytes(ptrace.get_seccomp_filter(tid, len(filters))))
            except OSError as error:
                if error.errno == errno.ENOENT and filters:
                    return Filters(filters)
                raise

    def action(self, nr: int, args: Sequence[int] = (), ip: int = 0) -> int:
        """SECCOMP_RET_* action (without data) that the kernel would take.

        A filter we do not understand counts as KILL_PROCESS.
        """
        if not self._filters:
            return RET_ALLOW
        try:
            answers = [one.evaluate(nr, args, ip) for one in self._filters]
        except (FilterError, IndexError):
            return RET_KILL_PROCESS
        return min(answers, key=_severity) & RET_ACTION_FULL

    def allows(self, nr: int, args: Sequence[int] = (), ip: int = 0) -> bool:
        """Would the call be made?"""
        return self.action(nr, args, ip) in (RET_ALLOW, RET_LOG)

    def harmless(self, nr: int, args: Sequence[int] = (), ip: int = 0) -> bool:
        """Would the call be made, or just fail?"""
        return self.action(nr, args, ip) in (RET_ALLOW, RET_LOG, RET_ERRNO)


def action_name(action: int) -> str:
    return ACTION_NAMES.get(action, f"{action:#x}")
