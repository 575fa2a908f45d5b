# SPDX-License-Identifier: Apache-2.0
"""Threads: born stopped, told by tables what only they can be told, and at last given their registers.

Source: clone(2), rseq(2), Linux arch/x86/kernel/fpu (XSAVE, AMX), kernel/signal.c (restart of system calls).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from checkpointd.errors import ImageDamaged, RestoreConflict
from checkpointd.linux import capability as cap
from checkpointd.linux import clone, prctl, ptrace, timer
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, XTILE_MASK, Nr
from checkpointd.restore.credentials import after_credential_steps, credential_steps
from checkpointd.restore.plan import Step
from checkpointd.restore.signals import own_pending_steps
from checkpointd.restore.spawn import holder_of, pid_in_use
from checkpointd.restore.stub import StepFailedError, Stub
from checkpointd.state.process import ProcessState
from checkpointd.state.threads import Credentials, Sleep, ThreadState
from checkpointd.target.registers import CS_64BIT, ERESTART_RESTARTBLOCK, UserRegs, word
from checkpointd.target.remote import Call
from checkpointd.target.restartable import as_let_go

THREAD_FLAGS = (
    clone.CLONE_VM
    | clone.CLONE_FS
    | clone.CLONE_FILES
    | clone.CLONE_SIGHAND
    | clone.CLONE_THREAD
    | clone.CLONE_SYSVSEM
    | clone.CLONE_PTRACE
)
_EEXIST, _EINTR = 17, 4
_XSTATE_BV_AT, _XCOMP_BV_AT, _XHEADER_END = 512, 520, 576
_MXCSR_AT, _MXCSR_MASK_AT, _DEFAULT_MXCSR_MASK = 24, 28, 0xFFBF
_MUSL_TID_AT = 0x30
_NAME_BYTES = 16
_NS_PER_MS = 1_000_000
_FUTEX_CMD_MASK, _FUTEX_WAIT = 0x7F, 0


def create_threads(stub: Stub, state: ProcessState, *, new_ids: bool) -> dict[int, int]:
    """All other threads in one table; old to new ids, the leader's too.

    Raises:
        RestoreConflict: an id is in use.
    """
    others = state.threads[1:]
    ids = {state.threads[0].tid: stub.pid}
    if not others:
        return ids
    steps = []
    scratch = stub.alloc(16)
    for thread in others:
        set_tid_at = 0 if new_ids else stub.put(struct.pack("=i", thread.tid))
        # the stack only has to be there: the thread gets its registers before its first instruction
        args = clone.pack_clone_args(THREAD_FLAGS, stack=scratch, stack_bytes=16, set_tid_at=set_tid_at)
        call = Call(Nr.CLONE3, (stub.put(args), clone.CLONE_ARGS_BYTES))
        steps.append(Step(call, f"making thread {thread.tid}", may_fail=True))
    results = stub.run(steps)
    stub.adopt_threads([tid for tid in results if tid > 0])
    for thread, result in zip(others, results, strict=True):
        if result == -_EEXIST:
            raise RestoreConflict(
                f"thread id {thread.tid} is in use{holder_of(thread.tid)}",
                hint=pid_in_use(thread.tid).hint,
                pid=thread.tid,
            )
        if result < 0:
            raise StepFailedError(stub.pid, f"making thread {thread.tid}", -result)
        ids[thread.tid] = result
    stub.reset()
    return ids


def own_steps(stub: Stub, thread: ThreadState, tid: int, ours: Credentials) -> list[Step]:
    """What a thread must be told by itself, in this order."""
    steps = []
    if thread.clear_child_tid:
        call = Call(Nr.SET_TID_ADDRESS, (thread.clear_child_tid,))
        steps.append(Step(call, "set_tid_address"))
    if thread.robust_list is not None:
        steps.append(Step(Call(Nr.SET_ROBUST_LIST, thread.robust_list), "giving back the robust list"))
    if thread.alt_stack.size_bytes and not thread.alt_stack.flags & sig.SS_DISABLE:
        stack = thread.alt_stack
        at = stub.put(sig.pack_stack(stack.address, stack.flags, stack.size_bytes))
        steps.append(Step(Call(Nr.SIGALTSTACK, (at, 0)), "giving back the alternate stack"))
    if thread.rseq is not None:
        args = (thread.rseq.pointer, thread.rseq.size_bytes, 0, thread.rseq.signature)
        steps.append(Step(Call(Nr.RSEQ, args), "registering rseq"))
    name = stub.put(thread.name.encode("utf-8", "surrogateescape")[: _NAME_BYTES - 1] + b"\0")
    steps.append(Step(Call(Nr.PRCTL, (prctl.PR_SET_NAME, name)), "giving back its name"))
    if thread.scheduling.timerslack_ns:
        args_slack = (prctl.PR_SET_TIMERSLACK, thread.scheduling.timerslack_ns)
        steps.append(Step(Call(Nr.PRCTL, args_slack), "giving back its timer slack"))
    args_mce = (prctl.PR_MCE_KILL, prctl.PR_MCE_KILL_SET, thread.mce_kill, 0, 0)
    steps.append(Step(Call(Nr.PRCTL, args_mce), "what memory errors do to it"))
    if thread.io_flusher and cap.has(ours.effective, cap.CAP_SYS_RESOURCE):
        steps.append(Step(Call(Nr.PRCTL, (prctl.PR_SET_IO_FLUSHER, 1, 0, 0, 0)), "IO flusher", True))
    steps += speculation_steps(thread.speculation)
    steps += own_pending_steps(stub, thread.pending, stub.pid, tid)
    steps += credential_steps(stub, thread.credentials, ours)
    steps += after_credential_steps(thread.credentials, thread.pdeath_signal)
    return steps


def speculation_steps(wanted: Sequence[int]) -> list[Step]:
    """From the speculation controls that a stub inherits from us to `wanted`, as far as this machine has them."""
    return [
        Step(
            Call(Nr.PRCTL, (prctl.PR_SET_SPECULATION_CTRL, which, value & ~prctl.PR_SPEC_PRCTL, 0, 0)),
            f"the speculation control of {prctl.SPECULATION[which]}",
            # a kernel may refuse to leave more on than it does by itself
            may_fail=bool(value & prctl.PR_SPEC_ENABLE),
        )
        for which, (value, ours) in enumerate(zip(wanted, prctl.own_speculation(), strict=False))
        if _can_control(value, ours)
    ]


def _can_control(value: int, ours: int) -> bool:
    is_ours_to_set = ours & prctl.PR_SPEC_PRCTL and not ours & prctl.PR_SPEC_FORCE_DISABLE
    return value != ours and bool(value & prctl.PR_SPEC_PRCTL and is_ours_to_set)


def _lost_controls(threads: Iterable[ThreadState]) -> list[str]:
    ours = prctl.own_speculation()
    lost = {
        prctl.SPECULATION[which]
        for thread in threads
        for which, (value, own) in enumerate(zip(thread.speculation, ours, strict=False))
        if value & prctl.PR_SPEC_PRCTL and value != own and not _can_control(value, own)
        # a machine that offers no choice is what it asked for if it left all on
        if own & prctl.PR_SPEC_PRCTL or not value & prctl.PR_SPEC_ENABLE
    }
    return [f"its speculation control of {one} cannot be given back here" for one in sorted(lost)]


def own_warnings(threads: Sequence[ThreadState], ours: Credentials) -> list[str]:
    """What `own_steps` leaves out, for want of rights."""
    found = _lost_controls(threads)
    if any(thread.io_flusher for thread in threads) and not cap.has(ours.effective, cap.CAP_SYS_RESOURCE):
        found.append("it is no IO flusher (PR_SET_IO_FLUSHER) any more: that needs CAP_SYS_RESOURCE")
    return found


def tile_permission_steps(state: ProcessState) -> list[Step]:
    """Ask for AMX as the process had asked: before threads and alternate stacks."""
    if not state.cpu.xcomp_permitted >> XFEATURE_XTILEDATA & 1:
        return []
    return [Step(Call(Nr.ARCH_PRCTL, (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)), "asking for AMX")]


def warm_tiles(stub: Stub, thread: ThreadState, tid: int) -> None:
    """Make room for tile data in a thread that holds some."""
    if xstate_features(thread) & XTILE_MASK:
        config = bytearray(64)
        config[0] = 1  # palette 1; tile 0: 16 rows of 64 bytes
        config[16:18] = (64).to_bytes(2, "little")
        config[48] = 16
        stub.use_tile_registers(tid, stub.put(bytes(config)))


def xstate_features(thread: ThreadState) -> int:
    """XSTATE_BV: the components that are not in their initial state."""
    return int.from_bytes(thread.xstate[_XSTATE_BV_AT : _XSTATE_BV_AT + 8].ljust(8, b"\0"), "little")


def check_components(state: ProcessState) -> None:
    """Before anything is made: registers of components that are not there would be asked for by instructions.

    Raises:
        ImageDamaged: a thread has registers that its CPU did not have.
    """
    for thread in state.threads:
        if beyond := xstate_features(thread) & ~state.cpu.xfeatures:
            raise ImageDamaged(
                f"thread {thread.tid}: its extended registers are of components ({beyond:#x}) that its CPU did not have"
            )


def checked_xstate(thread: ThreadState, local_size_bytes: int) -> bytes:
    """The extended registers as this machine takes them.

    Raises:
        ImageDamaged: values the kernel or the CPU would not take.
    """
    data = thread.xstate.ljust(thread.xstate_size_bytes, b"\0")
    if len(data) < _XHEADER_END or any(data[_XCOMP_BV_AT:_XHEADER_END]):
        raise ImageDamaged(f"thread {thread.tid}: its extended registers are malformed")
    mask = int.from_bytes(data[_MXCSR_MASK_AT : _MXCSR_MASK_AT + 4], "little") or _DEFAULT_MXCSR_MASK
    if int.from_bytes(data[_MXCSR_AT : _MXCSR_AT + 4], "little") & ~mask:
        raise ImageDamaged(f"thread {thread.tid}: its MXCSR has reserved bits set")
    if len(thread.xstate) > local_size_bytes:
        raise ImageDamaged(f"thread {thread.tid}: its extended registers do not fit this CPU")
    return data.ljust(local_size_bytes, b"\0")[:local_size_bytes]


def final_registers(stub: Stub, thread: ThreadState, tid: int) -> UserRegs:
    """The registers to let the thread go with; a sleep gets a restart block on the way.

    Raises:
        ImageDamaged: registers no program can have.
    """
    regs = UserRegs.from_bytes(thread.regs)
    if regs.cs != CS_64BIT:
        raise ImageDamaged(f"thread {thread.tid}: code segment {regs.cs:#x} is not that of 64-bit code")
    sleep = thread.sleep
    if sleep is None:
        return regs
    if sleep.lost:
        regs.rax = word(-_EINTR)
        regs.leave_syscall()
        return regs
    result = stub.interrupted_call(tid, sleep.nr, _sleep_args(stub, sleep))
    if result != -ERESTART_RESTARTBLOCK:  # it is over: its time had come, or the futex changed
        regs.rax = word(-_EINTR if -result >= 512 else result)
        regs.leave_syscall()
    return as_let_go(regs)


def _sleep_args(stub: Stub, sleep: Sleep) -> tuple[int, ...]:
    """The call as it is to be made now: with the time that is left in scratch memory."""
    args = list(sleep.args)
    if sleep.remaining_ns is None:
        return tuple(args)
    if sleep.nr == Nr.POLL:
        args[2] = -(-sleep.remaining_ns // _NS_PER_MS)
        return tuple(args)
    at = stub.put(timer.pack_timespec(sleep.remaining_ns))
    if sleep.nr == Nr.NANOSLEEP:
        args[0] = at
    elif sleep.nr == Nr.CLOCK_NANOSLEEP:
        args[2] = at
    elif sleep.nr == Nr.FUTEX and args[1] & _FUTEX_CMD_MASK == _FUTEX_WAIT:
        args[3] = at
    return tuple(args)


def give_registers(tid: int, regs: UserRegs, xstate: bytes, sigmask: int) -> None:
    """The last thing before the thread is let go."""
    ptrace.set_regset(tid, ptrace.NT_X86_XSTATE, xstate)
    ptrace.set_regs(tid, regs.to_bytes())
    ptrace.set_sigmask(tid, sigmask)


def renumber(stub: Stub, state: ProcessState, ids: Mapping[int, int]) -> list[str]:
    """With new ids: correct the copies of their own id that C libraries keep.

    glibc keeps it where the kernel is to clear it (set_tid_address), musl at a fixed place of its thread control
    block.  What a program keeps by itself (a pid file, owners of recursive or error-checking locks that are held)
    nobody can find.
    """
    for thread in state.threads:
        old, new = struct.pack("=i", thread.tid), struct.pack("=i", ids[thread.tid])
        places = [thread.clear_child_tid]
        fs_base = UserRegs.from_bytes(thread.regs).fs_base
        try:
            if fs_base and stub.read(fs_base, 8) == struct.pack("=Q", fs_base):
                places.append(fs_base + _MUSL_TID_AT)
        except OSError:
            pass
        for at in places:
            try:
                if at and stub.read(at, 4) == old:
                    stub.mem.write(at, new)
            except OSError:
                continue
    return ["it has new ids: what the program itself remembers of its pid or thread ids is the old ones"]
