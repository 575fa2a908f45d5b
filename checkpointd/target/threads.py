# SPDX-License-Identifier: Apache-2.0
"""State out: every thread of a frozen process.

Nearly all of it is read from outside; alternate stack, clear_child_tid, parent-death signal and securebits can only
be asked by the thread itself, by injected calls.

A sleep whose rest the kernel keeps in a restart block is described as a call with the time that is left of it
(`Sleep`).  The kernel forgets the number of such a call at its first interruption (it shows restart_syscall from
then on), so `SleepMemory` carries what one freeze has seen to the next.

Raises OSError (ESRCH: the process died) besides what the injection raises.

Source: ptrace(2), restart_syscall(2), Linux kernel/time/hrtimer.c, fs/select.c, kernel/futex/waitwake.c.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpointd.linux import mempolicy, prctl, ptrace, sched, timer
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import Nr, get_robust_list
from checkpointd.procfs import process
from checkpointd.state.memory import MemoryPolicy
from checkpointd.state.threads import AltStack, Credentials, Rseq, Scheduling, Sleep, ThreadState
from checkpointd.target.freeze import Frozen, FrozenThread
from checkpointd.target.questions import Questions
from checkpointd.target.registers import ERESTART_RESTARTBLOCK
from checkpointd.target.remote import Call, Remote
from checkpointd.target.restartable import Switches, same_sleep

_FUTEX_CMD_MASK = 0x7F
_FUTEX_WAIT = 0
_NS_PER_MS = 1_000_000
_NO_TIMEOUT = 1 << 31
_CLEAR_AT, _DEATH_AT, _MODE_AT, _NODES_AT = 24, 32, 36, 40  # behind a stack_t
THREAD_ROOM_BYTES = -(-(_NODES_AT + mempolicy.MASK_BYTES) // 16) * 16
"""The room that `ask_leader` takes."""
_LATE_NS = 50 * _NS_PER_MS
_CLOCK_PROCESS_CPUTIME_ID = 2
_MAX_CLOCK = 16

Args = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class RememberedSleep:
    """A sleep as first seen.

    Attributes:
        nr, args: the call.
        rip: where the thread goes on behind it.
        deadline_ns: when it ends (CLOCK_MONOTONIC); None: its timeout is absolute, or of a CPU clock, or not known.
        switches: of the freeze that saw it last.
    """

    nr: int
    args: Args
    rip: int
    deadline_ns: int | None
    switches: Switches | None = None

    def left_ns(self, now_ns: int, switches: Switches | None) -> int | None:
        """What is left of it; None: this may be a later sleep in the same place.

        A first stop by us shows the call itself, so a later sleep was stopped by somebody else before; then the thread
        slept twice at least since we let it go.  So it did in the old one if somebody else stopped that: nobody can
        tell the two apart.

        Args:
            switches: of the freeze that asks.
        """
        nr_switches = switches.since(self.switches) if switches is not None else None
        if self.deadline_ns is None or nr_switches is None or nr_switches > 2:
            return None
        # it slept, and is in the call still, long after its end: no old sleep does that
        if nr_switches == 2 and self.deadline_ns < now_ns - _LATE_NS:
            return None
        return max(0, self.deadline_ns - now_ns)


@dataclass
class SleepMemory:
    """What the sleeping threads of one target were seen to call; kept from freeze to freeze."""

    sleeps: dict[int, RememberedSleep] = field(default_factory=dict)

    def recall(self, tid: int, args: Args, rip: int) -> RememberedSleep | None:
        """The thread's sleep, when it is in the same call still, or again."""
        found = self.sleeps.get(tid)
        return found if found is not None and (found.args, found.rip) == (args, rip) else None

    def keep_only(self, tids: Mapping[int, object]) -> None:
        self.sleeps = {tid: sleep for tid, sleep in self.sleeps.items() if tid in tids}


def prepare_sleeps(pid: int) -> dict[int, int]:
    """Before the freeze: which call a thread in restart_syscall really is in, by its kernel stack (root only)."""
    found: dict[int, int] = {}
    for tid in process.thread_ids(pid):
        where = Path(f"/proc/{pid}/task/{tid}")
        try:
            if not (where / "syscall").read_text(encoding="ascii").startswith(f"{int(Nr.RESTART_SYSCALL)} "):
                continue
            stack = (where / "stack").read_text(encoding="ascii")
        except OSError:
            continue
        for word, nr in (("nanosleep", Nr.NANOSLEEP), ("poll", Nr.POLL), ("futex", Nr.FUTEX)):
            if word in stack:
                found[tid] = int(nr)
                break
    return found


@dataclass(frozen=True, slots=True)
class ThreadAnswers:
    """What a thread told about itself, and what its status shows."""

    status: Mapping[str, str]
    credentials: Credentials
    alt_stack: AltStack
    clear_child_tid: int
    pdeath_signal: int
    policy: MemoryPolicy | None
    speculation: tuple[int, ...]


def ask_leader(questions: Questions, pid: int) -> Callable[[], ThreadAnswers]:
    """Add the questions for the main thread; its answers once they have been asked."""
    return _ask_thread(questions, pid, pid, None, {}, asks_policy=True)


def capture_threads(
    frozen: Frozen,
    remote: Remote,
    *,
    told: ThreadAnswers | None = None,
    memory: SleepMemory | None = None,
    sleep_calls: Mapping[int, int] | None = None,
    with_policies: bool = False,
    task_flags: Mapping[int, int] | None = None,
) -> tuple[tuple[ThreadState, ...], list[str]]:
    """All threads, the leader first, and warnings.

    Args:
        told: by the leader, when it has been asked already.
        memory: of this target; read and brought up to date.
        sleep_calls: from `prepare_sleeps`.
        with_policies: ask every thread for its memory policy, even if the leader has none.
        task_flags: of stat, by thread; of just before the freeze, since reading them all in it takes long.
    """
    memory = memory if memory is not None else SleepMemory()
    memory.keep_only(frozen.threads)
    pid, warnings = frozen.pid, list[str]()
    questions: Questions | None = None
    if told is None:
        questions = Questions(remote, THREAD_ROOM_BYTES)
        answer = ask_leader(questions, pid)
        questions.ask()
        told = answer()
    leader, controls = told, {_shown(told.status): told.speculation}
    states: list[ThreadState] = []
    for tid in sorted(frozen.threads, key=lambda tid: (tid != pid, tid)):
        if tid != pid:
            if questions is None:
                questions = Questions(remote, THREAD_ROOM_BYTES)
            questions.begin_anew(tid)
            asks_policy = with_policies or leader.policy is not None
            answer = _ask_thread(questions, pid, tid, leader, controls, asks_policy=asks_policy)
            questions.ask()
            told = answer()
            controls[_shown(told.status)] = told.speculation
        flags = (task_flags or {}).get(tid)
        if flags is None:  # it was born after the look
            flags = process.read_stat(pid, tid).flags
        sleep = _sleep_of(frozen, frozen.threads[tid], memory, (sleep_calls or {}).get(tid), warnings)
        states.append(_state(frozen.threads[tid], told, sleep, flags))
    return tuple(states), warnings


def note_sleeps(frozen: Frozen, memory: SleepMemory) -> None:
    """For a freeze that captures nothing: remember what its threads sleep in, which no later one will be told.

    Otherwise a sleep of this freeze could be taken for an earlier one in the same place, and end too early.
    """
    memory.keep_only(frozen.threads)
    for thread in frozen.threads.values():
        _sleep_of(frozen, thread, memory, None, [])


def _ask_thread(
    questions: Questions,
    pid: int,
    tid: int,
    leader: ThreadAnswers | None,
    controls: Mapping[tuple[str | None, ...], tuple[int, ...]],
    *,
    asks_policy: bool,
) -> Callable[[], ThreadAnswers]:
    """Add the questions for one thread.

    Args:
        leader: None for the leader itself.
        controls: speculation controls by what status shows of them.
    """
    status = _read_status(pid, tid)
    at = questions.room(THREAD_ROOM_BYTES)
    calls = [
        Call(Nr.SIGALTSTACK, (0, at)),
        Call(Nr.PRCTL, (prctl.PR_GET_TID_ADDRESS, at + _CLEAR_AT)),
        Call(Nr.PRCTL, (prctl.PR_GET_PDEATHSIG, at + _DEATH_AT)),
    ]
    # a call in another thread costs the freeze 0.1 ms: securebits are asked where anything else differs
    credentials = read_credentials(status, 0 if leader is None else leader.credentials.securebits)
    asks_bits = leader is None or credentials != leader.credentials
    if asks_bits:
        calls.append(Call(Nr.PRCTL, (prctl.PR_GET_SECUREBITS,)))
    if asks_policy:
        where = (at + _MODE_AT, at + _NODES_AT, mempolicy.NR_MASK_BITS, 0, 0)
        calls.append(Call(Nr.GET_MEMPOLICY, where))
    known = controls.get(_shown(status))
    nr_before = len(calls)
    if known is None:
        calls += [
            Call(Nr.PRCTL, (prctl.PR_GET_SPECULATION_CTRL, which, 0, 0, 0))
            for which in range(len(prctl.SPECULATION))
        ]
    which_calls = questions.add(calls)

    def answer() -> ThreadAnswers:
        results, written = questions.results(which_calls), questions.written(at, THREAD_ROOM_BYTES)
        own = credentials
        if asks_bits:
            own = dataclasses.replace(own, securebits=max(0, results[3]))
        policy = None
        if asks_policy and results[nr_before - 1] == 0:
            policy = mempolicy.unpack_policy(_word(written, _MODE_AT, 4), written[_NODES_AT:])
        address, flags, size_bytes = sig.unpack_stack(written)
        return ThreadAnswers(
            status=status,
            credentials=own,
            alt_stack=AltStack(address, flags & ~sig.SS_ONSTACK, size_bytes),
            clear_child_tid=_word(written, _CLEAR_AT, 8) if results[1] == 0 else 0,
            pdeath_signal=_word(written, _DEATH_AT, 4),
            policy=policy,
            speculation=tuple(max(0, one) for one in results[nr_before:]) if known is None else known,
        )

    return answer


def _shown(status: Mapping[str, str]) -> tuple[str | None, ...]:
    """What status shows of a thread's speculation controls."""
    return status.get("Speculation_Store_Bypass"), status.get("SpeculationIndirectBranch")


def _state(thread: FrozenThread, told: ThreadAnswers, sleep: Sleep | None, task_flags: int) -> ThreadState:
    tid, status = thread.tid, told.status
    xstate = ptrace.get_regset(tid, ptrace.NT_X86_XSTATE)
    robust = get_robust_list(tid)
    return ThreadState(
        tid=tid,
        name=_unescape(status["Name"]),
        regs=thread.regs.to_bytes(),
        xstate=xstate.rstrip(b"\0"),
        xstate_size_bytes=len(xstate),
        sigmask=thread.sigmask,
        alt_stack=told.alt_stack,
        robust_list=robust if robust[0] else None,
        rseq=Rseq(thread.rseq.pointer, thread.rseq.size, thread.rseq.signature) if thread.rseq else None,
        clear_child_tid=told.clear_child_tid,
        pdeath_signal=told.pdeath_signal,
        credentials=told.credentials,
        scheduling=read_scheduling(tid),
        pending=tuple(ptrace.peek_siginfo(tid, shared=False)) if int(status["SigPnd"], 16) else (),
        sleep=sleep,
        memory_policy=told.policy,
        speculation=told.speculation,
        mce_kill=process.machine_check_policy(task_flags),
        io_flusher=process.is_io_flusher(task_flags),
    )


def _word(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


_WANTED = re.compile(
    rb"^(Name|Uid|Gid|Groups|SigPnd|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs"
    rb"|Speculation_Store_Bypass|SpeculationIndirectBranch):[ \t]*(.*)$",
    re.MULTILINE,
)


def _read_status(pid: int, tid: int) -> dict[str, str]:
    """The fields of status that are wanted of a thread: a third of the time that all of them take."""
    fd = os.open(f"/proc/{pid}/task/{tid}/status", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, 1 << 16)  # one read gives all: seq_file enlarges its buffer
    finally:
        os.close(fd)
    return {
        key.decode("ascii"): value.decode("utf-8", "surrogateescape") for key, value in _WANTED.findall(text)
    }


def _unescape(name: str) -> str:
    """A name as printed in status, where newline and backslash are escaped."""
    return name.replace("\\n", "\n").replace("\\\\", "\\") if "\\" in name else name


def read_credentials(status: Mapping[str, str], securebits: int) -> Credentials:
    """Credentials by /proc/PID/task/TID/status."""
    ruid, euid, suid, fsuid = (int(word) for word in status["Uid"].split())
    rgid, egid, sgid, fsgid = (int(word) for word in status["Gid"].split())
    return Credentials(
        ruid, euid, suid, fsuid, rgid, egid, sgid, fsgid,
        groups=tuple(int(word) for word in status["Groups"].split()),
        inheritable=int(status["CapInh"], 16),
        permitted=int(status["CapPrm"], 16),
        effective=int(status["CapEff"], 16),
        bounding=int(status["CapBnd"], 16),
        ambient=int(status.get("CapAmb", "0"), 16),
        securebits=securebits,
        no_new_privs=status.get("NoNewPrivs", "0") == "1",
    )  # fmt: skip


@functools.cache
def _nr_cpus() -> int:
    return os.cpu_count() or 1


def read_scheduling(tid: int) -> Scheduling:
    attr = sched.get_attr(tid)
    cpus = os.sched_getaffinity(tid)
    try:
        fd = os.open(f"/proc/{tid}/timerslack_ns", os.O_RDONLY | os.O_CLOEXEC)
        try:
            slack = int(os.read(fd, 32))
        finally:
            os.close(fd)
    except (OSError, ValueError):  # needs CAP_SYS_NICE for another user's process
        slack = 0
    return Scheduling(
        *attr[:7],
        cpus=() if len(cpus) >= _nr_cpus() else tuple(sorted(cpus)),
        ioprio=sched.get_ioprio(tid),
        timerslack_ns=slack,
        clamps=(attr.util_min, attr.util_max),
    )


def _sleep_of(
    frozen: Frozen, thread: FrozenThread, memory: SleepMemory, sleep_call: int | None, warnings: list[str]
) -> Sleep | None:
    """The call to be made again at restore; None when the registers alone make the thread go on."""
    regs, tid, now_ns = thread.regs, thread.tid, frozen.frozen_at_ns
    if regs.syscall_nr < 0 or regs.result != -ERESTART_RESTARTBLOCK:
        memory.sleeps.pop(tid, None)
        return None
    nr = regs.syscall_nr
    args: Args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
    if nr == Nr.RESTART_SYSCALL:
        known = memory.recall(tid, args, regs.rip)
        if known is not None and known.deadline_ns is None:
            return Sleep(known.nr, args, None)
        if known is not None and (left := known.left_ns(now_ns, thread.switches)) is not None:
            memory.sleeps[tid] = dataclasses.replace(known, switches=thread.switches)
            return Sleep(known.nr, args, left)
        if known is not None:
            nr = known.nr
        elif sleep_call is not None:
            nr = sleep_call
            if nr == Nr.NANOSLEEP and _is_clock(args[0]):
                nr = int(Nr.CLOCK_NANOSLEEP)
        elif thread.blocked is not None and thread.blocked.nr != nr and thread.blocked.args == args:
            # somebody else stopped it (Ctrl-Z, a cgroup's freezer) since it was sampled
            nr = thread.blocked.nr
        else:
            warnings.append(
                f"thread {tid} sleeps in a call that cannot be told any more: restored, that call would end with "
                "EINTR; if the program does not take that well, dump again once the thread has woken up"
            )
            return Sleep(nr, args, lost=True)
        elapsed_ns = None
    else:
        elapsed_ns = _elapsed(frozen, thread)
    left, is_absolute = _left(frozen, nr, args, elapsed_ns)
    if left is None and not is_absolute:
        warnings.append(f"thread {tid}: how long it has slept is not known, its sleep starts anew at restore")
    deadline_ns = None if left is None or _is_of_cpu_clock(nr, args) else now_ns + left
    memory.sleeps[tid] = RememberedSleep(nr, args, regs.rip, deadline_ns, thread.switches)
    return Sleep(nr, args, left)


def _elapsed(frozen: Frozen, thread: FrozenThread) -> int | None:
    """How long the thread had been in its call at the freeze, by the sample taken just before.

    A call that was not sampled began after the sampling, microseconds to a few milliseconds ago: 0, so that it
    ends late rather than early.  None: the kernel does not tell.
    """
    sample, regs = thread.blocked, thread.regs
    args = (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9)
    if sample is None or sample.nr != regs.syscall_nr or sample.args != args:
        return 0
    if sample.asleep_us is None:
        return None
    if not same_sleep(frozen.pid, thread.tid, sample):
        return 0
    return max(0, sample.asleep_us * 1000 + frozen.frozen_at_ns - sample.sampled_ns)


def _left(frozen: Frozen, nr: int, args: Sequence[int], elapsed_ns: int | None) -> tuple[int | None, bool]:
    """(time left of a call, is its timeout absolute); None: not known."""
    if _is_of_cpu_clock(nr, args):
        elapsed_ns = None  # the time slept says nothing about it
    if nr == Nr.POLL:
        timeout_ms = args[2] & 0xFFFF_FFFF
        if timeout_ms >= _NO_TIMEOUT:
            return None, True
        return _minus(timeout_ms * _NS_PER_MS, elapsed_ns), False
    if nr == Nr.FUTEX:
        if args[1] & _FUTEX_CMD_MASK != _FUTEX_WAIT:
            return None, True
        return _minus(_timespec(frozen, args[3]), elapsed_ns), False
    if nr in (Nr.NANOSLEEP, Nr.CLOCK_NANOSLEEP):
        request, rest = (args[0], args[1]) if nr == Nr.NANOSLEEP else (args[2], args[3])
        if rest:  # the kernel wrote it at the stop
            return _timespec(frozen, rest), False
        return _minus(_timespec(frozen, request), elapsed_ns), False
    return None, False


def _is_of_cpu_clock(nr: int, args: Sequence[int]) -> bool:
    """A sleep until so much CPU time is spent?  Clocks of one process have negative ids (clock_getcpuclockid(3))."""
    clock = args[0] & 0xFFFF_FFFF
    return nr == Nr.CLOCK_NANOSLEEP and (clock == _CLOCK_PROCESS_CPUTIME_ID or bool(clock >> 31))


def _is_clock(argument: int) -> bool:
    """A clock's id rather than a pointer?  Ids are small, or negative as 32 or 64 bits."""
    return argument < _MAX_CLOCK or argument >> 31 in (1, (1 << 33) - 1)


def _timespec(frozen: Frozen, address: int) -> int | None:
    try:
        return timer.unpack_timespec(frozen.mem.read(address, timer.TIMESPEC_BYTES))
    except OSError:
        return None


def _minus(total_ns: int | None, elapsed_ns: int | None) -> int | None:
    if total_ns is None or elapsed_ns is None:
        return None
    return max(0, total_ns - elapsed_ns)
