# SPDX-License-Identifier: Apache-2.0
"""One thread of an image: what its CPU held and what the kernel kept for it.

Addresses are of the process, masks have bit n-1 for signal n, times are nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpointd.state.memory import MemoryPolicy


@dataclass(frozen=True, slots=True)
class Rseq:
    """Registration of rseq(2)."""

    pointer: int
    size_bytes: int
    signature: int


@dataclass(frozen=True, slots=True)
class AltStack:
    """sigaltstack(2); SS_ONSTACK is a fact of the stack pointer, never stored."""

    address: int
    flags: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a thread is (credentials(7), capabilities(7)); capability sets are 64-bit masks."""

    ruid: int
    euid: int
    suid: int
    fsuid: int
    rgid: int
    egid: int
    sgid: int
    fsgid: int
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int = 0
    no_new_privs: bool = False


@dataclass(frozen=True, slots=True)
class Scheduling:
    """sched_setattr(2), affinity, I/O priority and timer slack of a thread.

    `cpus` are those it may run on; empty means all there were.  `clamps` are the least and the most of a CPU that it is
    taken to use (0 to 1024); None where they were not kept, both 0 where the kernel had none.
    """

    policy: int
    flags: int
    nice: int
    priority: int
    runtime_ns: int
    deadline_ns: int
    period_ns: int
    cpus: tuple[int, ...]
    ioprio: int
    timerslack_ns: int
    clamps: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Sleep:
    """A system call that the kernel would go on with from its restart block.

    Attributes:
        nr, args: the call as the program made it.
        remaining_ns: what was left of its timeout; None when that is not known and the call starts anew, or
            when its timeout is absolute and stands in the program's own memory.
        lost: the call is not known at all: it ends with EINTR.
    """

    nr: int
    args: tuple[int, int, int, int, int, int]
    remaining_ns: int | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class ThreadState:
    """One thread.

    Attributes:
        tid: in the process's own pid namespace.
        regs: struct user_regs_struct (216 bytes), the interrupted system call as the stop left it.
        xstate: PTRACE_GETREGSET NT_X86_XSTATE without its trailing zeros.
        xstate_size_bytes: its full size.
        robust_list: (head, length) of set_robust_list(2), or None.
        clear_child_tid: set_tid_address(2).
        pending: siginfo (128 bytes each) of the thread's own pending signals, in order.
        sleep: set when `regs` ask for the kernel's restart block.
        memory_policy: of set_mempolicy(2); None for the default.
        mce_kill: what a memory error does to it (PR_MCE_KILL_LATE 0, _EARLY 1, _DEFAULT 2).
        io_flusher: prctl(PR_SET_IO_FLUSHER).
        speculation: PR_GET_SPECULATION_CTRL of store bypass, indirect branches, L1D flush.
    """

    tid: int
    name: str
    regs: bytes
    xstate: bytes
    xstate_size_bytes: int
    sigmask: int
    alt_stack: AltStack
    robust_list: tuple[int, int] | None
    rseq: Rseq | None
    clear_child_tid: int
    pdeath_signal: int
    credentials: Credentials
    scheduling: Scheduling
    pending: tuple[bytes, ...] = ()
    sleep: Sleep | None = None
    memory_policy: MemoryPolicy | None = None
    mce_kill: int = 2
    io_flusher: bool = False
    speculation: tuple[int, ...] = ()
