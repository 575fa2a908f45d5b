# SPDX-License-Identifier: Apache-2.0
"""System calls inside live programs: results, undo tables, scratch memory, threads, filters, forked copies."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from checkpointd import tracepoint
from checkpointd.errors import Busy, FrozenTooLong, TargetGone, Unsupported
from checkpointd.linux.process_vm import read_mem
from checkpointd.target import attachable, blobs, fork, rendezvous
from checkpointd.target.freeze import freeze
from checkpointd.target.remote import Call, Result
from checkpointd.target.seccomp_filter import Filters
from tests.soak import lab, sessions

pytestmark = pytest.mark.needs("ptrace", "gcc")

NR_READ, NR_OPEN, NR_CLOSE, NR_MMAP, NR_MUNMAP, NR_GETPID, NR_GETTID = 0, 2, 3, 9, 11, 39, 186
NR_DUP, NR_EVENTFD2, NR_USERFAULTFD, NR_PRCTL, NR_CLONE, NR_WAIT4 = 32, 290, 323, 157, 56, 61


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("programs")
    built = lab.build(where)
    built["guarded"] = where / "guarded"
    subprocess.run(["gcc", "-O1", lab.PROGRAMS / "inject_guarded.c", "-o", built["guarded"]], check=True)
    return built


@pytest.fixture
def start(programs, tmp_path):
    running = []

    def run(mode: str, program: str = "dynamic", extra: tuple[str, ...] = ()) -> lab.Target:
        target = lab.Target(programs, program, mode, tmp_path, tolerant=False, extra=extra)
        running.append(target)
        return target

    yield run
    for target in running:
        target.kill()


@pytest.mark.parametrize("name", ["slot", "runner"])
def test_machine_code_is_what_its_source_says(tmp_path, name):
    source = Path(blobs.__file__).with_name(f"{name}.S")
    subprocess.run(["gcc", "-c", source, "-o", tmp_path / "a.o"], check=True)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", tmp_path / "a.o", tmp_path / "a.bin"], check=True
    )
    assert (tmp_path / "a.bin").read_bytes() == getattr(blobs, name.upper())
    symbols = subprocess.run(["nm", tmp_path / "a.o"], check=True, capture_output=True, text=True).stdout
    for line in symbols.splitlines():
        value, _, symbol = line.split()
        constant = getattr(blobs, f"{name}_{symbol}".upper(), None)
        if constant is not None:
            assert constant == int(value, 16), symbol


@pytest.mark.parametrize("program", ["dynamic", "static", "nolibc", "go"])
def test_calls_and_results(programs, start, program):
    if program not in programs:
        pytest.skip(f"no {program} compiler here")
    target = start("nanosleep" if program in ("dynamic", "static") else "", program)
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        assert remote.pid == target.pid
        assert remote.call(NR_GETPID) == target.pid
        assert remote.batch([Call(NR_GETPID)] * 1000) == [target.pid] * 1000
        path, room = remote.put(b"/proc/self/comm\0"), remote.alloc(64)
        fd, nr_read, closed = remote.batch(
            [Call(NR_OPEN, (path, 0)), Call(NR_READ, (Result(0), room, 64)), Call(NR_CLOSE, (Result(0),))]
        )
        assert fd >= 0
        assert closed == 0
        comm = Path(f"/proc/{target.pid}/comm").read_bytes()
        assert remote.read(room, nr_read) == comm
        assert remote.batch([Call(NR_CLOSE, (-1,))]) == [-errno.EBADF]
        with pytest.raises(OSError, match="system call 3") as caught:
            remote.call(NR_CLOSE, 9999)
        assert caught.value.errno == errno.EBADF
        assert remote.batch([]) == []
    target.judge()


def test_stops_are_heard_where_their_signal_is_blocked(start, monkeypatch):
    """As in an agent; whoever has not blocked it looks again and again."""
    target = start("nanosleep")
    heard = []
    sigtimedwait = signal.sigtimedwait

    def counted(*args):
        heard.append(sigtimedwait(*args))
        return heard[-1]

    monkeypatch.setattr(signal, "sigtimedwait", counted)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    try:
        with freeze(target.pid) as frozen, frozen.inject() as remote:
            for _ in range(20):
                assert remote.call(NR_GETPID) == target.pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert any(found is not None for found in heard)
    heard.clear()
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        assert remote.call(NR_GETPID) == target.pid
    assert heard == []
    target.judge()


def test_results_across_a_split_batch(start):
    """More calls than a table holds: a result of the first part is used in a later one, and undone."""
    target = start("nanosleep")
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        calls = [Call(NR_EVENTFD2, (0, 0)), *[Call(NR_GETPID)] * 400, Call(NR_DUP, (Result(0),))]
        results = remote.batch(calls, undo=[Call(NR_CLOSE, (Result(0),)), Call(NR_CLOSE, (Result(401),))])
        first, last = results[0], results[-1]
        assert last >= 0
        assert first != last
        assert remote.batch([Call(NR_CLOSE, (first,)), Call(NR_CLOSE, (last,))]) == [0, 0]
    target.judge()


def test_an_exception_runs_the_undo_table_of_the_last_batch(start):
    target = start("nanosleep")
    with pytest.raises(KeyError), freeze(target.pid) as frozen, frozen.inject() as remote:
        first, area = remote.batch(
            [Call(NR_EVENTFD2, (0, 0)), Call(NR_MMAP, (0, 4096, 3, 0x22, -1, 0))],
            undo=[Call(NR_CLOSE, (Result(0),)), Call(NR_MUNMAP, (Result(1), 4096))],
        )
        assert first > 0
        assert area > 0
        remote.put(bytes(100_000))  # a batch of its own that must not forget it
        raise KeyError
    target.judge()


def test_success_runs_no_undo_table(start):
    target = start("nanosleep")
    with freeze(target.pid) as frozen:
        with frozen.inject() as remote:
            fd = remote.batch([Call(NR_EVENTFD2, (0, 0))], undo=[Call(NR_CLOSE, (Result(0),))])[0]
        assert os.readlink(f"/proc/{target.pid}/fd/{fd}") == "anon_inode:[eventfd]"
        with frozen.inject() as remote:
            assert remote.call(NR_CLOSE, fd) == 0
    target.judge()


def test_scratch(start):
    target = start("nanosleep")
    with freeze(target.pid) as frozen, frozen.inject(scratch_bytes=5000) as remote:
        blocks = [(remote.put(bytes([n]) * (n * 700 + 1)), n) for n in range(60)]
        assert all(address % 16 == 0 for address, _ in blocks)
        for address, n in blocks:
            assert remote.read(address, n * 700 + 1) == bytes([n]) * (n * 700 + 1)
        remote.reset()
        assert remote.read(remote.alloc(3000), 3000) == bytes(3000)
        assert remote.read(remote.put(b"x" * 3_000_000), 3_000_000) == b"x" * 3_000_000
    target.judge()


def test_calls_in_every_thread(start):
    target = start("threads64")
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        for tid in frozen.threads:
            assert remote.batch([Call(NR_GETTID), Call(NR_GETPID)], tid=tid) == [tid, target.pid]
            assert remote.batch([], tid=tid) == []
        with pytest.raises(ValueError, match="no thread"):
            remote.batch([Call(NR_GETTID)], tid=1)
        with pytest.raises(ValueError, match="undo"):
            remote.batch([Call(NR_GETTID)], undo=[Call(NR_GETTID)], tid=max(frozen.threads))
    target.judge()


def test_one_at_a_time(start):
    target = start("nanosleep")
    with freeze(target.pid) as frozen, frozen.inject(), pytest.raises(RuntimeError, match="one at a time"):
        frozen.inject().__enter__()
    target.judge()


def test_after_an_interrupted_entry_only_a_thaw_helps(start):
    target = start("nanosleep")
    with freeze(target.pid) as frozen:
        tracepoint.register("inject.runner_written", _interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                frozen.inject().__enter__()
        finally:
            tracepoint.clear()
        with pytest.raises(RuntimeError, match="thaw"):
            frozen.inject().__enter__()
    target.judge()


def _interrupt(name: str) -> None:
    raise KeyboardInterrupt(name)


@pytest.mark.parametrize("index", [1, 7])
def test_a_result_may_only_name_an_earlier_call_and_stand_first(start, index):
    target = start("nanosleep")
    with freeze(target.pid) as frozen, frozen.inject() as remote, pytest.raises(ValueError, match="Result"):
        remote.batch([Call(NR_GETPID), Call(NR_CLOSE, (Result(index),))])
    target.judge()


# ---- calls that do not return

NR_PAUSE, NR_NANOSLEEP = 34, 35


def _late_call(frozen, *, tid=None):
    """A call that would sleep for ever, between others."""
    undo = [] if tid else [Call(NR_CLOSE, (Result(0),))]
    with frozen.inject() as remote:
        remote.batch(
            [Call(NR_EVENTFD2 if tid is None else NR_GETPID, (0, 0)), Call(NR_PAUSE)], undo=undo, tid=tid
        )


@pytest.mark.parametrize("sig0", [False, True])
def test_a_call_that_does_not_return_is_ended(start, monkeypatch, sig0):
    """In good order: what the batch did is undone, and the same freeze can inject again."""
    if sig0:
        monkeypatch.setattr(rendezvous, "choose_signal", lambda *args, **kwargs: 0)
    target = start("nanosleep")
    with freeze(target.pid) as frozen:
        frozen.call_timeout_s = 0.1
        with pytest.raises(FrozenTooLong, match="did not return"):
            _late_call(frozen)
        frozen.call_timeout_s = 10
        with frozen.inject() as remote:
            assert remote.call(NR_GETPID) == target.pid
    target.judge()
    assert not target.leftover_slots()


@pytest.mark.parametrize("sig0", [False, True])
def test_a_call_in_another_thread_that_does_not_return_is_ended(start, monkeypatch, sig0):
    if sig0:
        monkeypatch.setattr(rendezvous, "choose_signal", lambda *args, **kwargs: 0)
    target = start("threads9")
    with freeze(target.pid) as frozen:
        frozen.call_timeout_s = 0.1
        with pytest.raises(FrozenTooLong, match="did not return"):
            _late_call(frozen, tid=max(frozen.threads))
        frozen.call_timeout_s = 10
        with frozen.inject() as remote:
            assert remote.batch([Call(NR_GETTID)], tid=max(frozen.threads)) == [max(frozen.threads)]
    target.judge()
    assert not target.leftover_slots()


def test_a_thread_that_cannot_be_woken_goes_home_by_itself(start, monkeypatch):
    """Deep in the kernel, as far as we see: the thaw leaves it to its own way, and what the batch did is undone."""
    target = start("nanosleep")
    monkeypatch.setattr(rendezvous, "_end_call", lambda pid, tid: False)
    with pytest.raises(FrozenTooLong), freeze(target.pid) as frozen:
        frozen.call_timeout_s = 0.1
        with frozen.inject() as remote:
            sleep = Call(NR_NANOSLEEP, (remote.put(struct.pack("=qq", 4, 0)), 0))
            remote.batch([Call(NR_EVENTFD2, (0, 0)), sleep], undo=[Call(NR_CLOSE, (Result(0),))])
    target.judge()


def test_an_interruption_in_another_thread_needs_a_thaw(start):
    """Ctrl-C while a call runs in it: its slot may not be used again before it is home."""
    target = start("threads9")
    with freeze(target.pid) as frozen:
        with pytest.raises(KeyboardInterrupt), frozen.inject() as remote:
            remote.batch([])
            tracepoint.register("inject.slot_entered", _interrupt)
            try:
                remote.batch([Call(NR_GETTID)], tid=max(frozen.threads))
            finally:
                tracepoint.clear()
        with pytest.raises(RuntimeError, match="thaw"):
            frozen.inject().__enter__()
    target.judge()


@pytest.fixture
def cgroup():
    """A cgroup of version 2, of our own."""
    for base in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (base / "cgroup.procs").exists() and (base / "cgroup.controllers").exists():
            made = base / f"checkpointd-test-{os.getpid()}"
            break
    else:
        pytest.skip("no cgroup of version 2 here")
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error.strerror}")
    yield made
    _wait(lambda: "populated 0" in (made / "cgroup.events").read_text())
    made.rmdir()


def _wait(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_target_in_a_frozen_cgroup_is_refused_and_unharmed(start, cgroup, monkeypatch, noticed):
    """It stops for us, but would never run a call; where the cgroup cannot be seen, the call's time runs out."""
    if not noticed:
        monkeypatch.setattr(attachable, "is_in_frozen_cgroup", lambda pid: False)
    target = start("nanosleep")
    (cgroup / "cgroup.procs").write_text(str(target.pid))
    (cgroup / "cgroup.freeze").write_text("1")
    try:
        _wait(lambda: "frozen 1" in (cgroup / "cgroup.events").read_text())
        with pytest.raises(Busy if noticed else FrozenTooLong), freeze(target.pid) as frozen:
            frozen.call_timeout_s = 0.2
            with frozen.inject() as remote:
                remote.call(NR_GETPID)
    finally:
        (cgroup / "cgroup.freeze").write_text("0")
    target.judge()
    target.kill()


# ---- filters


def test_a_filter_that_kills_our_calls_is_seen_before_it_kills(start):
    target = start("", "guarded", ("kill", str(NR_MMAP)))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="KILL_PROCESS to mmap"):
        frozen.inject().__enter__()
    target.judge()


@pytest.mark.parametrize("action", ["kill", "trap"])
def test_calls_that_a_filter_forbids_are_refused_one_by_one(start, action):
    target = start("", "guarded", (action, str(NR_USERFAULTFD), str(NR_PRCTL)))
    with pytest.raises(Unsupported, match="system call 323"), freeze(target.pid) as frozen:
        with frozen.inject() as remote:
            assert not remote.seccomp_ok([Call(NR_GETPID), Call(NR_USERFAULTFD, (0,))])
            assert remote.seccomp_ok([Call(NR_GETPID)])
            assert remote.call(NR_GETPID) == target.pid
            remote.call(NR_USERFAULTFD, 0)
    target.judge()


def test_a_filter_that_answers_an_error_is_harmless(start):
    target = start("", "guarded", ("errno", str(NR_USERFAULTFD)))
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        assert remote.seccomp_ok([Call(NR_USERFAULTFD, (0,))])
        assert remote.batch([Call(NR_USERFAULTFD, (0,)), Call(NR_GETPID)]) == [-errno.EPERM, target.pid]
    target.judge()


def test_a_filter_that_only_fails_our_own_calls_is_refused(start):
    """tgkill failing would make the thread run past us."""
    target = start("", "guarded", ("errno", "234"))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="ERRNO to tgkill"):
        frozen.inject().__enter__()
    target.judge()


def test_the_kernels_filters_are_read_as_they_are(start):
    target = start("", "guarded", ("errno", "323", "41", "56"))
    with freeze(target.pid):
        filters = Filters.of_thread(target.pid)
    assert len(filters) == 1
    assert [nr for nr in range(400) if not filters.allows(nr)] == [41, 56, 323]


def test_no_kill_harms_a_filtered_target(start):
    target = start("", "guarded", ("kill", str(NR_USERFAULTFD)))
    with lab.Zygote() as zygote:
        tally = lab.Tally()
        for at, name in enumerate(lab.dry_run(zygote, target, "inject"), 1):
            lab.kill_at(zygote, target, "inject", at, tally, name)
        lab.finish(zygote, target)
    assert tally.kills > 30


def test_strict_seccomp_is_never_injected_into(start):
    target = start("", "guarded", ("strict",))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="strict seccomp"):
        frozen.inject().__enter__()
    target.judge()


def test_a_program_that_dispatches_its_own_system_calls_is_refused(start):
    target = start("", "guarded", ("dispatch",))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="DISPATCH"):
        frozen.inject().__enter__()
    target.judge()


def test_memory_that_may_never_become_executable(start):
    """PR_SET_MDWE: what is executable is so from the start, and never writable."""
    target = start("", "guarded", ("mdwe",))
    sessions.inject(target.pid)
    target.judge()


def test_limits_that_forbid_our_mapping_are_refused(start):
    target = start("nanosleep")
    import resource

    before = resource.prlimit(target.pid, resource.RLIMIT_AS)
    resource.prlimit(target.pid, resource.RLIMIT_AS, (4096, before[1]))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="ENOMEM"):
        frozen.inject().__enter__()
    resource.prlimit(target.pid, resource.RLIMIT_AS, before)
    target.judge()


# ---- forked copies


def test_a_forked_copy_keeps_the_old_memory_while_the_target_runs(start):
    target = start("forks")
    for _ in range(10):
        with freeze(target.pid) as frozen:
            page = frozen.leader.regs.rsp & ~0xFFF
            truth = frozen.mem.read(page, 4096)
            copy = frozen.child_fork()
        start_progress = target.progress
        while target.progress < start_progress + 2:
            time.sleep(0.001)
        with copy:
            assert read_mem(copy.pid, page, 4096) == truth
            assert Path(f"/proc/{copy.pid}/oom_score_adj").read_text().strip() == "1000"
        with freeze(target.pid) as frozen:
            assert frozen.reap_copy(copy)
            assert not frozen.reap_copy(copy)
    target.judge()  # it checks that wait() shows it no child of ours


def test_a_copy_dies_with_its_maker_and_is_reaped_by_the_next(start):
    target = start("nanosleep")
    with lab.Zygote() as zygote:
        names = lab.dry_run(zygote, target, "copy")
        for at, name in enumerate(names, 1):
            if name.startswith("fork.") or name == "inject.batch_entered":
                lab.kill_at(zygote, target, "copy", at, lab.Tally(), name)
    assert target.nr_zombies() > 0
    with freeze(target.pid) as frozen, frozen.inject() as remote:
        fork.reap_strays(remote, surely=False)
    assert target.nr_zombies() == 0


def test_no_copy_where_the_target_may_not_fork(start):
    target = start("", "guarded", ("errno", str(NR_CLONE)))
    with freeze(target.pid) as frozen, pytest.raises(Unsupported, match="EPERM"):
        frozen.child_fork()
    target.judge()


def test_a_child_of_the_programs_own_is_no_stray(tmp_path):
    """A zombie without exit signal that ran code of its own stays for the program to find."""
    source = tmp_path / "wclone.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <sched.h>\n#include <sys/syscall.h>\n#include <sys/wait.h>\n"
        "#include <unistd.h>\n#include <stdio.h>\n"
        "int main(void) {\n"
        "  long child = syscall(SYS_clone, 0, 0, 0, 0, 0);\n"
        "  if (!child) { volatile char area[65536]; for (int n = 0; n < 65536; n += 64) area[n] = 1; _exit(3); }\n"
        '  puts("+"); fflush(stdout); getchar();\n'
        "  int status; return waitpid(child, &status, __WALL) == child && WEXITSTATUS(status) == 3 ? 0 : 1;\n}\n"
    )
    subprocess.run(["gcc", "-O0", source, "-o", tmp_path / "wclone"], check=True)
    child = subprocess.Popen([tmp_path / "wclone"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(1)
    try:
        time.sleep(0.1)
        with freeze(child.pid) as frozen, frozen.inject() as remote:
            assert fork.reap_strays(remote, surely=False) == 0
        child.communicate(b"\n", timeout=10)
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()


def test_target_killed_between_batches(start):
    target = start("nanosleep")
    with pytest.raises(TargetGone), freeze(target.pid) as frozen, frozen.inject() as remote:
        os.kill(target.pid, signal.SIGKILL)
        remote.call(NR_GETPID)
    assert target.process.wait(5) == -signal.SIGKILL
