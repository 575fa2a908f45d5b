# SPDX-License-Identifier: Apache-2.0
"""Freeze and thaw of real processes: all threads, nothing disturbed, every refusal with its reason."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.agent.check import refuse_impossible
from checkpointd.errors import Busy, TargetExeced, TargetGone, Unsupported, UsageError
from checkpointd.procfs import process
from checkpointd.target import attachable
from checkpointd.target.freeze import freeze
from tests.soak import lab, sessions

pytestmark = pytest.mark.needs("ptrace", "gcc")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return lab.build(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def start(programs, tmp_path):
    """Starts targets that bear nothing, not even the EINTR that any stop may cause."""
    running = []

    def run(mode: str, program: str = "dynamic") -> lab.Target:
        target = lab.Target(programs, program, mode, tmp_path, tolerant=False)
        running.append(target)
        return target

    yield run
    for target in running:
        target.kill()


def _states(pid: int) -> dict[int, str]:
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
            found[int(tid)] = text.rsplit(")", 1)[1].split()[0]
    return found


def test_all_threads_stop_and_go_on(start):
    target = start("threads64")
    with freeze(target.pid) as frozen:
        assert len(frozen.threads) == 64
        assert set(_states(target.pid)) == set(frozen.threads)
        assert set(_states(target.pid).values()) == {"t"}
        progress = target.progress
        assert frozen.leader is frozen.threads[target.pid]
        assert frozen.freezing_time_us > 0
        assert all(thread.regs.cs == 0x33 for thread in frozen.threads.values())
        assert all(thread.rseq is not None for thread in frozen.threads.values())
        assert target.progress == progress
    target.judge()


def test_thaw_twice_is_once(start):
    target = start("nanosleep")
    frozen = freeze(target.pid)
    frozen.thaw()
    frozen.thaw()
    target.judge()


# every kind of blocked call, signals, rseq and the vdso: no short sleep, no EINTR, nothing lost
@pytest.mark.parametrize(
    "mode",
    [
        *("regs", "nanosleep", "clock-nanosleep", "poll", "ppoll", "futex", "epoll-timeout", "read", "epoll"),
        *("semop", "sigwait", "signals", "altstack", "clock", "rseq", "threads9", "births", "forks"),
        *("nanosleep-long", "clock-nanosleep-long", "poll-long", "futex-long", "select-long", "epoll-long"),
    ],
)
def test_freezes_and_injections_are_not_noticed(start, mode):
    target = start(mode)
    for number in range(60):
        sessions.plain(target.pid)
        (sessions.inject if number % 3 else sessions.copy)(target.pid)
    target.judge()
    assert target.nr_zombies() == 0
    target.stop()


def test_go_does_not_notice(programs, start):
    if "go" not in programs:
        pytest.skip("no Go here")
    target = start("", "go")
    for _ in range(60):
        sessions.inject(target.pid)
    target.judge()


def test_threads_being_born_and_dying(start):
    target = start("births")
    for _ in range(100):
        with freeze(target.pid) as frozen:
            states = _states(target.pid)
            # one that has exited may be listed for a moment more: nobody can trace it, and it runs nothing
            alive = {tid for tid, state in states.items() if state not in "XZ"}
            assert alive == set(frozen.threads), states
    target.judge()


def test_a_list_of_threads_that_was_cut_short_leaves_none_running(start, monkeypatch):
    """The kernel ends the list when a thread dies just as it is listed: those born after it seem not to be there."""
    target = start("threads9")
    whole, cuts = process.thread_ids, [6, 6, 7, 6, 6]

    def cut_short(pid: int) -> list[int]:
        return whole(pid)[: cuts.pop()] if cuts else whole(pid)

    monkeypatch.setattr(process, "thread_ids", cut_short)
    with freeze(target.pid) as frozen:
        assert not cuts
        assert set(frozen.threads) == set(whole(target.pid))
        assert set(_states(target.pid).values()) == {"t"}
    target.judge()


def test_workers_of_the_kernel_that_come_and_go_hold_up_no_freeze(start, monkeypatch):
    target = start("threads9")
    whole, is_worker = process.thread_ids, attachable.is_kernel_worker
    nr_lists = itertools.count()
    monkeypatch.setattr(process, "thread_ids", lambda pid: [*whole(pid), 1 << 30 | next(nr_lists) % 3])
    monkeypatch.setattr(
        attachable, "is_kernel_worker", lambda pid, tid: tid >= 1 << 30 or is_worker(pid, tid)
    )
    with freeze(target.pid, timeout_s=60) as frozen:
        assert frozen.has_kernel_workers
        assert set(frozen.threads) == set(whole(target.pid))
    target.judge()


def test_a_list_that_is_never_whole_is_no_freeze(start, monkeypatch):
    target = start("threads9")
    whole = process.thread_ids
    monkeypatch.setattr(process, "thread_ids", lambda pid: whole(pid)[:6])
    with pytest.raises(Busy, match="faster than they can be listed"):
        freeze(target.pid, timeout_s=0.2)
    target.judge()


def test_a_stopped_target_stays_stopped(start):
    target = start("threads9")
    os.kill(target.pid, signal.SIGSTOP)
    _wait(lambda: set(_states(target.pid).values()) == {"T"})
    for session in (sessions.plain, sessions.inject):
        session(target.pid)
        _wait(lambda: set(_states(target.pid).values()) == {"T"})
    with freeze(target.pid) as frozen:
        assert all(thread.group_stopped for thread in frozen.threads.values())
    os.kill(target.pid, signal.SIGCONT)
    target.judge()


def test_a_target_stopped_while_frozen_is_stopped_afterwards(start):
    target = start("threads9")
    with freeze(target.pid) as frozen:
        os.kill(target.pid, signal.SIGSTOP)
        with frozen.inject() as remote:
            assert remote.call(39) == target.pid
    _wait(lambda: set(_states(target.pid).values()) == {"T"})
    os.kill(target.pid, signal.SIGCONT)
    target.judge()


def _wait(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_program_that_replaces_itself(start):
    target = start("execs")
    outcomes = set()
    for _ in range(150):
        try:
            sessions.inject(target.pid)
            outcomes.add("frozen")
        except TargetExeced:
            outcomes.add("execed")
        time.sleep(0.001)
    assert "frozen" in outcomes
    target.judge()


def test_a_program_that_another_thread_than_the_main_one_replaces(start):
    """The kernel refuses every request for it until its new id was waited for, also to let it go."""
    target = start("thread-execs")
    outcomes = set()
    until = time.monotonic() + 8
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            sessions.plain(target.pid)
            outcomes.add("frozen")
        except (TargetExeced, Busy, Unsupported) as error:  # its main thread is a zombie for a moment
            outcomes.add(type(error))
        assert time.monotonic() - began < 7
    assert outcomes >= {"frozen", TargetExeced}
    target.judge()


def test_a_vfork_parent_is_busy_and_runs_on(start):
    target = start("vfork")
    target.wait_step()
    with pytest.raises(Busy, match="uninterruptible"):
        freeze(target.pid, timeout_s=0.2)
    assert "t" not in _states(target.pid).values()


def test_a_thread_that_hangs_after_the_check_is_let_go(start, monkeypatch):
    """Found in its sleep only after it was seized: we stay until it can be detached from."""
    from checkpointd.target import attachable

    target = start("vfork")
    monkeypatch.setattr(attachable, "wait_until_interruptible", lambda *args: set())
    target.wait_step()
    with pytest.raises(Busy) as caught:
        freeze(target.pid, timeout_s=0.2)
    assert "stragglers" not in caught.value.details
    assert set(_states(target.pid).values()) <= {"S", "D", "R"}
    target.judge()


def test_a_program_without_its_main_thread(start):
    target = start("headless")
    with pytest.raises(Unsupported, match="main thread"):
        freeze(target.pid)
    with pytest.raises(Unsupported, match="main thread"):
        refuse_impossible(target.pid)


def test_refusals():
    with pytest.raises(UsageError, match="this program itself"):
        freeze(os.getpid())
    with pytest.raises(UsageError):
        freeze(0)
    if _is_kthread(2):
        with pytest.raises(Unsupported, match="kernel thread"):
            freeze(2)
    child = subprocess.Popen(["true"])
    _wait(lambda: Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z")
    with pytest.raises(TargetGone, match="has exited"):
        freeze(child.pid)
    child.wait()
    with pytest.raises(TargetGone):
        freeze(child.pid)


def _is_kthread(pid: int) -> bool:
    try:
        return bool(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[6]) & 0x200000)
    except OSError:
        return False


def test_a_thread_id_is_not_a_process(start):
    target = start("threads9")
    tid = max(_states(target.pid))
    with pytest.raises(UsageError, match=str(target.pid)):
        freeze(tid)


_OTHER_TRACER = """
import sys, time
from checkpointd.target.freeze import freeze
with freeze(int(sys.argv[1])):
    print("+", flush=True)
    sys.stdin.read(1)
"""


def test_already_traced(start):
    target = start("nanosleep")
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER_TRACER, str(target.pid)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=lab.ROOT,
    )  # fmt: skip
    assert other.stdout is not None
    other.stdout.read(1)
    with pytest.raises(Busy) as caught:
        freeze(target.pid)
    assert caught.value.details["tracer_pid"] == other.pid
    other.communicate(b"x")
    target.judge()


def test_32_bit_code_is_refused(tmp_path):
    source = tmp_path / "far.S"
    # 64-bit program that jumps to a 32-bit code segment and spins there
    source.write_text(
        ".globl _start\n_start: mov $0x400000, %rax\n pushq $0x23\n lea 1f(%rip), %rax\n push %rax\n lretq\n"
        ".code32\n1: pause\n jmp 1b\n"
    )
    program = tmp_path / "far"
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x500000"]
    subprocess.run(["gcc", *flags, source, "-o", program], check=True)
    child = subprocess.Popen([program])
    try:
        time.sleep(0.05)
        if child.poll() is not None:
            pytest.skip("no 32-bit code on this kernel")
        with pytest.raises(Unsupported, match="32-bit"):
            freeze(child.pid)
        assert set(_states(child.pid).values()) == {"R"}
    finally:
        child.kill()
        child.wait()


def test_killed_while_frozen(start):
    """The tracer must notice, and reap what is its to reap: nothing hangs."""
    target = start("threads9")
    frozen = freeze(target.pid)
    os.kill(target.pid, signal.SIGKILL)
    with pytest.raises(TargetGone), frozen.inject() as remote:
        remote.call(39)
    frozen.thaw()
    assert target.process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    "when", ["inject.slot_entered", "inject.batch_written", "inject.run", "inject.leaving"]
)
def test_killed_while_injected(start, when):
    target = start("threads9")
    tracepoint.register(when, lambda name: os.kill(target.pid, signal.SIGKILL), at=1)
    try:
        with pytest.raises(TargetGone):
            sessions.inject(target.pid)
    finally:
        tracepoint.clear()
    assert target.process.wait(5) == -signal.SIGKILL


def test_every_error_thaws(start):
    """An exception at each point of the session (as Ctrl-C would be): no thread stays stopped, nothing is left."""
    target = start("threads9")
    names: list[str] = []
    tracepoint.register("*", names.append)
    sessions.inject(target.pid)
    tracepoint.clear()
    # how many threads are found at the edge of a sleep is another number each time
    steady = [name for name in names if name != "freeze.registers_fixed"]
    for at in range(len(steady)):
        tracepoint.register("*", _raise_at(at))
        try:
            with pytest.raises(KeyboardInterrupt):
                sessions.inject(target.pid)
        finally:
            tracepoint.clear()
        target.judge()
    for _ in range(20):
        tracepoint.register("freeze.registers_fixed", _raise, at=1)
        try:
            sessions.inject(target.pid)
        except KeyboardInterrupt:
            break
        finally:
            tracepoint.clear()
    target.judge()


def _raise_at(at: int) -> Callable[[str], None]:
    hits = itertools.count()

    def hit(name: str) -> None:
        if name != "freeze.registers_fixed" and next(hits) == at:
            raise KeyboardInterrupt(name)

    return hit


def _raise(name: str) -> None:
    raise KeyboardInterrupt(name)


@pytest.mark.parametrize("mode", ["nanosleep-long", "epoll-long"])
def test_the_time_slept_is_known_even_after_injection(start, mode):
    """400 ms sleeps: what was sampled before the freeze agrees with the clock between two freezes of one sleep."""
    from checkpointd.target.restartable import same_sleep

    target = start(mode)
    seen: list[int] = []
    told: list[int] = []
    for _ in range(40):
        with freeze(target.pid) as frozen:
            with frozen.inject() as remote:
                remote.call(39)
            blocked = frozen.leader.blocked
            if blocked is not None and blocked.asleep_us is not None:
                told.append(blocked.asleep_us)
                # on a busy machine it may sleep a moment for a lock between sample and stop: then nothing is believed
                if same_sleep(target.pid, target.pid, blocked):
                    seen.append(blocked.asleep_us)
        time.sleep(0.01)
    if not told:
        pytest.skip("this kernel does not tell how long a thread has slept")
    assert seen
    # a freeze restarts the call, so no sample can be older than the last one
    assert 0 < max(seen) < 400_000
    target.judge()


_GIVES_UP = """
import sys
from checkpointd.errors import CheckpointError
from checkpointd.target import attachable, freeze, stopping
attachable.wait_until_interruptible = lambda *args: set()
stopping.LINGER_S = 0.1
print("ready", flush=True)
sys.stdin.readline()
try:
    freeze.freeze(int(sys.argv[1]), timeout_s=0.1)
except CheckpointError as error:
    assert error.details["stragglers"], error
    assert freeze.left_attached() == set(error.details["stragglers"])
    print("attached", flush=True)
else:
    sys.exit("it was stopped after all")
sys.stdin.read()
"""


def test_a_thread_that_could_not_be_let_go_is_known_and_free_when_we_end(start):
    target = start("vfork")
    child = subprocess.Popen(
        [sys.executable, "-c", _GIVES_UP, str(target.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    target.wait_step()
    child.stdin.write(b"now\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"attached\n"
    child.communicate()
    assert child.returncode == 0
    assert "t" not in _states(target.pid).values()
    target.judge()
