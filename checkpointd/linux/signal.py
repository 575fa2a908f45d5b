# SPDX-License-Identifier: Apache-2.0
"""The kernel's own layouts of signal things (x86-64): sigaction, stack_t, siginfo, masks.

A mask is a 64-bit word with bit n-1 for signal n.

Source: rt_sigaction(2), sigaltstack(2), Linux include/uapi/asm-generic/siginfo.h, arch/x86/include/uapi/asm/signal.h.
"""

from __future__ import annotations

import struct

NR_SIGNALS = 64
SIGKILL, SIGTRAP, SIGSTOP = 9, 5, 19
SIG_DFL, SIG_IGN = 0, 1
SIG_BLOCK, SIG_SETMASK = 0, 2
SIGSET_BYTES = 8
SIGACTION_BYTES = 32
STACK_BYTES = 24
SIGINFO_BYTES = 128
ALL_SIGNALS = (1 << NR_SIGNALS) - 1

SS_ONSTACK, SS_DISABLE, SS_AUTODISARM = 1, 2, 1 << 31


def bit(signum: int) -> int:
    """The mask of one signal."""
    return 1 << (signum - 1)


def pack_sigaction(handler: int, flags: int, restorer: int, mask: int) -> bytes:
    """struct kernel_sigaction { handler; unsigned long flags; restorer; sigset_t mask; }"""
    return struct.pack("=4Q", handler, flags, restorer, mask)


def unpack_sigaction(data: bytes) -> tuple[int, int, int, int]:
    """(handler, flags, restorer, mask)"""
    handler, flags, restorer, mask = struct.unpack("=4Q", data[:SIGACTION_BYTES])
    return handler, flags, restorer, mask


def pack_stack(address: int, flags: int, size_bytes: int) -> bytes:
    """stack_t { void *ss_sp; int ss_flags; size_t ss_size; }"""
    return struct.pack("=QIxxxxQ", address, flags, size_bytes)


def unpack_stack(data: bytes) -> tuple[int, int, int]:
    """(address, flags, size)"""
    address, flags, size_bytes = struct.unpack("=QIxxxxQ", data[:STACK_BYTES])
    return address, flags, size_bytes


def signal_of(siginfo: bytes) -> int:
    """si_signo."""
    number: int = struct.unpack_from("=i", siginfo)[0]
    return number
