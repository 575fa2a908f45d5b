# SPDX-License-Identifier: Apache-2.0
"""Parsers and values of process, thread and signal state."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from typing import cast

import pytest

from checkpointd.errors import ImageDamaged
from checkpointd.linux import capability as cap
from checkpointd.linux import prctl, timer
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import Nr
from checkpointd.memory import TASK_SIZE, Vma, VmaKind
from checkpointd.procfs import maps, process
from checkpointd.restore.credentials import credential_steps, missing_rights
from checkpointd.restore.signals import action_steps, timer_steps
from checkpointd.restore.threads import checked_xstate, own_steps, own_warnings
from checkpointd.state import codec
from checkpointd.state.process import Limit
from checkpointd.state.signals import PosixTimer, SignalAction, SignalsState
from checkpointd.state.threads import AltStack, Credentials, Rseq, Scheduling, Sleep, ThreadState
from checkpointd.target.freeze import Frozen, FrozenThread
from checkpointd.target.process import _feature_blockers, parse_limits, vma_blockers
from checkpointd.target.registers import UserRegs, word
from checkpointd.target.remote import Call
from checkpointd.target.restartable import Switches
from checkpointd.target.signals import parse_timers
from checkpointd.target.threads import RememberedSleep, SleepMemory, _sleep_of, note_sleeps

TIMERS = """ID: 3
signal: 35/00007ffe00001092
notify: thread/tid.4711
ClockID: 1
ID: 1
signal: 0/0000000000000000
notify: none/pid.4700
ClockID: -6
ID: 2
signal: 14/0000000000000007
notify: signal/pid.4700
ClockID: 0
"""
LIMITS = """Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max file size             unlimited            unlimited            bytes     
Max data size             1000                 unlimited            bytes     
Max stack size            8388608              unlimited            bytes     
"""
ROOT = (1 << 41) - 1


class Scratch:
    """The part of a `Remote` that steps are made with."""

    pid = 1

    def __init__(self) -> None:
        self.memory: dict[int, bytes] = {}
        self.at = 0x1000

    def put(self, data: bytes) -> int:
        self.at += 0x100 * (1 + len(data) // 0x100)
        self.memory[self.at] = data
        return self.at

    def alloc(self, size_bytes: int) -> int:
        return self.put(bytes(size_bytes))

    def batch(self, calls: object, *, undo: object = (), tid: int | None = None) -> list[int]:
        raise NotImplementedError

    def call(self, nr: int, *args: int) -> int:
        raise NotImplementedError

    def read(self, address: int, size_bytes: int) -> bytes:
        return self.memory[address][:size_bytes]

    def reset(self) -> None:
        self.memory.clear()


def credentials(**changes: object) -> Credentials:
    fields: dict[str, object] = dict.fromkeys(
        ("ruid", "euid", "suid", "fsuid", "rgid", "egid", "sgid", "fsgid", "inheritable", "ambient"), 0
    )
    fields |= {"groups": (), "permitted": ROOT, "effective": ROOT, "bounding": ROOT}
    return Credentials(**{**fields, **changes})  # type: ignore[arg-type]


def thread(**changes: object) -> ThreadState:
    fields: dict[str, object] = {
        "tid": 7,
        "name": "odd \udcff name\n",
        "regs": bytes(216),
        "xstate": b"",
        "xstate_size_bytes": 832,
        "sigmask": 1 << 63,
        "alt_stack": AltStack(0x1000, 0, 8192),
        "robust_list": (0x2000, 24),
        "rseq": Rseq(0x3000, 32, 0x53053053),
        "clear_child_tid": 0x4000,
        "pdeath_signal": 9,
        "credentials": credentials(),
        "scheduling": Scheduling(0, 0, -5, 0, 0, 0, 0, (0, 3), 4, 50000),
        "pending": (bytes(128),),
        "sleep": Sleep(35, (1, 2, 3, 4, 5, 6), 17),
    }
    return ThreadState(**{**fields, **changes})  # type: ignore[arg-type]


def test_state_survives_json() -> None:
    state = thread()
    assert codec.decode(ThreadState, codec.encode(state)) == state


def test_timers_are_parsed_in_order_of_id() -> None:
    one, two, three = parse_timers(TIMERS)
    assert (one.id, one.clock, one.notify) == (1, -6, timer.SIGEV_NONE)
    assert (two.id, two.signal, two.value, two.notify) == (2, 14, 7, timer.SIGEV_SIGNAL)
    assert three.tid == 4711
    assert three.value == 0x7FFE00001092
    assert three.notify & timer.SIGEV_THREAD_ID


def test_limits_are_parsed() -> None:
    unlimited = (1 << 64) - 1
    assert parse_limits(LIMITS)[2:] == (Limit(2, 1000, unlimited), Limit(3, 8388608, unlimited))


def test_cgroups_below_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"9:name=systemd:/\n4:memory:/a:b\n2:cpu,cpuacct:/x\n0::/user.slice/\xff\n"
    monkeypatch.setattr(process, "slurp", lambda path: text)
    assert process.cgroups(7) == (":/user.slice/\\xff", "cpu,cpuacct:/x", "memory:/a:b")


def test_a_kernel_without_cgroups_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def slurp(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(process, "slurp", slurp)
    assert process.cgroups(os.getpid()) == ()
    with pytest.raises(FileNotFoundError):
        process.cgroups(1 << 30)


def test_itimerval_of_a_running_timer_is_never_zero() -> None:
    assert timer.unpack_itimerval(timer.pack_itimerval(1, 0)) == (1000, 0)
    assert timer.unpack_itimerval(timer.pack_itimerval(1_500_000_000, 2_000)) == (1_500_000_000, 2_000)
    assert timer.unpack_itimerspec(timer.pack_itimerspec(5_000_000_001, 3)) == (5_000_000_001, 3)


def test_stack_and_action_layouts() -> None:
    assert len(sig.pack_stack(1, 2, 3)) == sig.STACK_BYTES
    assert sig.unpack_stack(sig.pack_stack(1, 2, 3)) == (1, 2, 3)
    assert sig.unpack_sigaction(sig.pack_sigaction(1, 2, 3, 4)) == (1, 2, 3, 4)
    assert len(timer.pack_sigevent(1, 2, 3, 4)) == timer.SIGEVENT_BYTES
    assert len(cap.pack_data(1, 2, 3)) == 24


def test_every_action_is_set_but_the_runner_s_own() -> None:
    state = SignalsState((SignalAction(1, 0x1234, 4, 5, 6), SignalAction(sig.SIGTRAP, 1, 0, 0, 0)))
    signals = [step.call.args[0] for step in action_steps(Scratch(), state)]
    assert signals == [n for n in range(1, 65) if n not in (5, 9, 19)]


def test_timer_ids_with_gaps_on_a_kernel_that_only_counts_up() -> None:
    timers = (PosixTimer(1, 1, 0, 14, 0, 0, 5, 0), PosixTimer(3, 1, 0, 14, 0, 0, 0, 0))
    steps = timer_steps(Scratch(), SignalsState((), posix_timers=timers), {}, exact_ids=False)
    names = [Nr(int(step.call.nr)).name for step in steps]
    create = "TIMER_CREATE"
    assert names == [create, "TIMER_DELETE", create, create, "TIMER_DELETE", create, "TIMER_SETTIME"]


def test_equal_credentials_need_no_call() -> None:
    assert credential_steps(Scratch(), credentials(), credentials()) == []


def test_a_user_s_credentials_end_with_the_exact_sets() -> None:
    ids = dict.fromkeys(("ruid", "euid", "suid", "fsuid", "rgid", "egid", "sgid", "fsgid"), 1000)
    wanted = credentials(**ids, groups=(5, 6), permitted=1 << 10, effective=0, inheritable=0)
    scratch = Scratch()
    steps = credential_steps(scratch, wanted, credentials())
    assert steps[0].call.nr == Nr.SETGROUPS
    last: Call = steps[-1].call
    assert last.nr == Nr.CAPSET
    assert scratch.memory[int(last.args[1])] == cap.pack_data(0, 1 << 10, 0)  # type: ignore[arg-type]
    ids_at = [n for n, step in enumerate(steps) if step.call.nr in (Nr.SETRESUID, Nr.SETRESGID)]
    assert max(ids_at) < len(steps) - 2


def test_rights_that_are_missing_are_named() -> None:
    user = credentials(ruid=1000, euid=1000, permitted=0, effective=0, bounding=ROOT)
    assert missing_rights(credentials(), credentials()) == []
    found = missing_rights(credentials(), user)
    assert any("uid 0" in reason for reason in found)
    assert any("permitted" in reason for reason in found)


def test_sleep_is_recalled_only_in_the_same_place_of_the_program() -> None:
    args = (1, 2, 3, 4, 5, 6)
    memory = SleepMemory({7: RememberedSleep(35, args, 0x1000, 10_000_000_000)})
    assert memory.recall(7, args, 0x1000) is not None
    assert memory.recall(7, (0, 2, 3, 4, 5, 6), 0x1000) is None
    assert memory.recall(7, args, 0x1002) is None
    assert memory.recall(8, args, 0x1000) is None
    memory.keep_only({8: None})
    assert not memory.sleeps


@pytest.mark.parametrize(
    ("nr_switches", "now_s", "left_ns"),
    [
        (2, 9, 1_000_000_000),  # it slept on
        (2, 10.01, 0),
        (2, 11, None),  # a sleep that was over, and another one
        (1, 11, 0),  # it got no CPU since it was let go
        (3, 9, None),  # somebody else stopped it: in this sleep or in a later one
        (None, 9, None),
    ],
)
def test_what_is_left_of_a_sleep_is_not_guessed(
    nr_switches: int | None, now_s: float, left_ns: int | None
) -> None:
    before = Switches(at_stop=90, at_release=None if nr_switches is None else 100)
    sleep = RememberedSleep(35, (1, 2, 3, 4, 5, 6), 0x1000, 10_000_000_000, before)
    now = Switches(at_stop=100 + (nr_switches or 0))
    assert sleep.left_ns(int(now_s * 1e9), now) == left_ns


@dataclass
class StarvedThread:
    """What the capture of a sleep looks at: a thread that stands in restart_syscall since the last freeze."""

    regs: UserRegs
    pid: int = 7
    tid: int = 7
    frozen_at_ns: int = 11_000_000_000
    blocked: None = None
    switches: Switches | None = None
    threads: dict[int, StarvedThread] = field(default_factory=dict)

    @property
    def mem(self) -> StarvedThread:
        return self

    def read(self, address: int, size_bytes: int) -> bytes:
        assert address == 0x5000
        return struct.pack("=qq", 3, 0)[:size_bytes]


def test_freeze_without_capture_tells_a_new_sleep_in_the_same_place_from_the_one_before() -> None:
    regs = UserRegs.from_bytes(bytes(27 * 8))
    regs.orig_rax, regs.rax, regs.rip, regs.rdx = int(Nr.POLL), word(-516), 0x1000, 20_000
    args = (0, 0, 20_000, 0, 0, 0)
    memory = SleepMemory({7: RememberedSleep(int(Nr.POLL), args, 0x1000, 12_000_000_000)})
    frozen = StarvedThread(regs)
    frozen.threads = {7: frozen}
    note_sleeps(cast(Frozen, frozen), memory)  # a second poll, just begun
    assert memory.sleeps[7].deadline_ns == frozen.frozen_at_ns + 20 * 10**9


def test_thread_that_got_no_cpu_since_the_last_freeze_still_sleeps_in_its_call() -> None:
    """Its sleep is long over on paper: forgetting the call would end it with EINTR."""
    args = (0, 0, 0x5000, 0, 0, 0)
    regs = UserRegs.from_bytes(bytes(27 * 8))
    regs.orig_rax, regs.rax, regs.rip = int(Nr.RESTART_SYSCALL), word(-516), 0x1000
    regs.rdx = 0x5000
    call = int(Nr.CLOCK_NANOSLEEP)
    memory = SleepMemory({7: RememberedSleep(call, args, 0x1000, 10_000_000_000, Switches(90, 100))})
    starved, warnings = StarvedThread(regs, switches=Switches(101)), list[str]()
    sleep = _sleep_of(cast(Frozen, starved), cast(FrozenThread, starved), memory, None, warnings)
    assert sleep is not None
    assert (sleep.nr, sleep.args, sleep.lost, sleep.remaining_ns) == (call, args, False, 0)
    assert warnings == []
    assert memory.sleeps[7].switches == starved.switches


def test_sleep_that_may_be_a_later_one_starts_anew() -> None:
    args = (0, 0, 0x5000, 0, 0, 0)
    regs = UserRegs.from_bytes(bytes(27 * 8))
    regs.orig_rax, regs.rax, regs.rip = int(Nr.RESTART_SYSCALL), word(-516), 0x1000
    regs.rdx = 0x5000
    call = int(Nr.CLOCK_NANOSLEEP)
    memory = SleepMemory({7: RememberedSleep(call, args, 0x1000, 20_000_000_000, Switches(90, 100))})
    stopped, warnings = StarvedThread(regs, switches=Switches(104)), list[str]()
    for _ in range(2):
        sleep = _sleep_of(cast(Frozen, stopped), cast(FrozenThread, stopped), memory, None, warnings)
        assert sleep is not None
        assert (sleep.nr, sleep.args, sleep.lost, sleep.remaining_ns) == (call, args, False, None)
        assert "starts anew" in warnings[0]
        stopped.switches = Switches(106)


@pytest.mark.parametrize(
    "change",
    [
        {"xstate": bytes(520) + b"\1", "xstate_size_bytes": 832},  # compacted format
        {"xstate": bytes(24) + b"\xff\xff\xff\xff", "xstate_size_bytes": 832},  # reserved bits of MXCSR
        {"xstate": bytes(899) + b"\1", "xstate_size_bytes": 900},  # larger than this CPU's
        {"xstate": b"", "xstate_size_bytes": 10},
    ],
)
def test_impossible_registers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ImageDamaged):
        checked_xstate(thread(**change), 832)


def test_registers_of_a_smaller_cpu_fit_a_larger_one() -> None:
    assert len(checked_xstate(thread(xstate=bytes(600), xstate_size_bytes=832), 11008)) == 11008


@pytest.mark.parametrize(
    "status,words",
    [
        ({"x86_Thread_features": "shstk wrss", "untag_mask": "0xffffffffffffffff"}, ["shadow stacks"]),
        ({"x86_Thread_features": "", "untag_mask": "0x81ffffffffffffff"}, ["tagged addresses"]),
        ({"x86_Thread_features": "", "untag_mask": "0xffffffffffffffff"}, []),
        ({}, []),
    ],
)
def test_features_of_the_cpu_that_are_not_restored(status: dict[str, str], words: list[str]) -> None:
    found = _feature_blockers(status)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_protection_keys_and_huge_pages_are_read_from_smaps_and_keys_refused() -> None:
    head = (
        "{:x}-{:x} rw-p 00000000 00:00 0 \nSize: 8 kB\nAnonHugePages:      {} kB\nProtectionKey:         {}\n"
    )
    text = "".join(
        head.format(at, at + 0x2000, huge, key) + "VmFlags: rd wr mr mw me ac \n"
        for at, huge, key in ((0x10000, 0, 0), (0x20000, 4096, 3), (0x30000, 2048, 0))
    ).encode()
    vmas = list(maps.parse_smaps(text))
    assert [vma.protection_key for vma in vmas] == [0, 3, 0]
    assert [vma.huge_bytes for vma in vmas] == [0, 4 << 20, 2 << 20]
    (reason,) = vma_blockers(vmas)
    assert "20000" in reason
    assert "protection key 3" in reason


@pytest.mark.parametrize(
    "kind,path,flags,word",
    [
        (VmaKind.SECRETMEM, "/secretmem", (), "secret"),
        (VmaKind.DEVICE, "/dev/mem", ("pf",), "device"),
        (VmaKind.ANON, "", ("ss",), "shadow stack"),
        (VmaKind.FILE_SHARED, "/[aio]", (), "AIO"),
        (VmaKind.SHMEM, "anon_inode:[io_uring]", (), "io_uring"),
    ],
)
def test_mappings_that_cannot_be_saved(kind: VmaKind, path: str, flags: tuple[str, ...], word: str) -> None:
    bad = Vma(0x1000, 0x2000, 3, False, 0, (0, 1), 1, path, False, kind, frozenset(flags))
    good = Vma(0x3000, 0x4000, 3, False, 0, (0, 0), 0, "", False, VmaKind.ANON, frozenset())
    vsyscall = Vma(
        TASK_SIZE + 0x1000, TASK_SIZE + 0x2000, 4, False, 0, (0, 0), 0, "[vsyscall]", False, VmaKind.VSYSCALL
    )
    (reason,) = vma_blockers([bad, good, vsyscall])
    assert word in reason


@pytest.mark.parametrize(
    ("flags", "policy", "flusher"),
    [
        (0x40_0140, 2, False),
        (0x40_01C0, 0, False),
        (0x840_01C0, 1, False),
        (0x0800_0000, 2, False),
        (0x08_0000, 2, False),
        (0x18_0000, 2, True),
    ],
)
def test_switches_of_a_thread_by_its_flags(flags: int, policy: int, flusher: bool) -> None:
    assert process.machine_check_policy(flags) == policy
    assert process.is_io_flusher(flags) == flusher


@pytest.mark.parametrize("may", [True, False])
def test_io_flusher_is_restored_or_told(may: bool) -> None:
    ours = credentials(effective=ROOT if may else ROOT & ~(1 << cap.CAP_SYS_RESOURCE))
    one = thread(io_flusher=True, pending=())
    calls = [step.call for step in own_steps(Scratch(), one, 7, ours)]  # type: ignore[arg-type]
    given = [call for call in calls if call.nr == Nr.PRCTL and call.args[0] == prctl.PR_SET_IO_FLUSHER]
    assert bool(given) == may
    warnings = own_warnings([one], ours)
    assert [("CAP_SYS_RESOURCE" in warning) for warning in warnings] == ([] if may else [True])
