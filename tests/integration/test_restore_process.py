# SPDX-License-Identifier: Apache-2.0
"""Restore of ordinary programs, what it refuses, and what is left when it fails."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from checkpointd.errors import CheckpointError, ImageDamaged, RestoreConflict, TargetGone, Unsupported
from checkpointd.linux import capability as cap
from checkpointd.linux.arch import Nr
from checkpointd.memory import VmaKind
from checkpointd.procfs import maps
from checkpointd.procfs.process import autogroup, read_stat, read_status
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.restore.stub import Stub
from checkpointd.state.files import FilesOptions
from checkpointd.state.memory import VmaState
from checkpointd.target.process import prepare_process
from checkpointd.target.remote import Call
from checkpointd.tracepoint import clear, register
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore, wait_gone

PROGRAM = Path(__file__).parent.parent / "programs" / "restore_python_program.py"
pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)


class Program:
    """The Python program, whoever is its parent just now."""

    def __init__(self, directory: Path, python: str) -> None:
        self.progress = directory / "progress"
        self.errors = directory / "errors"
        with self.errors.open("wb") as errors:
            self.child = subprocess.Popen(
                [python, PROGRAM, self.progress],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                cwd=directory,
            )
        self.pid = self.child.pid
        self.wait_rounds(3)

    def read(self) -> list[int]:
        try:
            return [int(word) for word in self.progress.read_text().split()]
        except OSError:
            return []

    def wait_rounds(self, nr: int, pid: int | None = None) -> list[int]:
        """Wait until it has made `nr` more rounds."""
        first = self.read()
        deadline = time.monotonic() + 60
        while True:
            now = self.read()
            if now and now[0] == (pid or self.pid) and now[1] >= (first[1] if first else 0) + nr:
                return now
            assert time.monotonic() < deadline, self.errors.read_text() or now
            time.sleep(0.005)

    def kill(self) -> None:
        kill_and_reap(self.child if self.child.poll() is None else self.pid)
        wait_gone(self.pid)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    found = Program(tmp_path, sys.executable)
    yield found
    found.kill()


@pytest.fixture
def killed(program: Program) -> Captured:
    """The capture of a program that is dead."""
    captured = capture(program.pid, kill=True)
    program.kill()
    return captured


def test_python_with_threads_works_on_over_many_cycles(program: Program) -> None:
    last = 0
    sleeps = None
    for _ in range(8):
        captured = capture(program.pid, sleeps, kill=True)
        program.kill()
        restored = restore(captured)
        sleeps = restored.sleeps
        assert restored.pid == program.pid
        _, number, _, nr_threads = program.wait_rounds(12)
        assert number > last
        assert nr_threads == 5
        last = number
    assert program.errors.read_text() == ""


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no system python")
def test_another_python_in_which_numpy_is_not_loaded(tmp_path: Path) -> None:
    program = Program(tmp_path, "/usr/bin/python3")
    try:
        captured = capture(program.pid, kill=True)
        program.kill()
        restore(captured)
        program.wait_rounds(12)
    finally:
        program.kill()


Area = tuple[int, int, int, bool, int, int, str, frozenset[str]]
"""(start, end, prot, shared, offset, inode, path, VmFlags)"""


def _canonical(vmas: Iterable[maps.Vma | VmaState], inodes: dict[int, int]) -> list[Area]:
    """The mappings, those joined that the kernel may join or keep apart as it likes.

    It keeps neighbours apart that are alike in everything one can see when their pages were faulted in by
    different histories (anon_vma), and a restored process has another history.  Joined are only private mappings
    with equal protection, flags and name, of nothing or of the same file at the offset that goes on.

    Args:
        inodes: of the files of a `VmaState`.
    """
    found: list[Area] = []
    for vma in vmas:
        inode = (
            vma.inode if isinstance(vma, maps.Vma) else inodes.get(vma.file or 0, 0) * (vma.file is not None)
        )
        one = (vma.start, vma.end, vma.prot, vma.shared, vma.offset, inode, vma.path, vma.flags - {"sd"})
        last = found[-1] if found else None
        if last is not None and last[1] == one[0] and last[2:4] == one[2:4] and last[5:] == one[5:]:
            goes_on = not inode or last[4] + last[1] - last[0] == one[4]
            if goes_on and not vma.shared and not vma.path.startswith("[v"):
                found[-1] = (last[0], *one[1:4], *last[4:])
                continue
        found.append(one)
    return found


def test_maps_are_the_same_afterwards(program: Program) -> None:
    captured = capture(program.pid, kill=True)
    program.kill()
    space = captured.state.address_space
    inodes = {index: file.inode for index, file in enumerate(space.files)}
    seen: list[list[maps.Vma]] = []
    restore(
        captured,
        options=RestoreOptions(
            wait_for_ids_s=20, before_release=lambda stub: seen.append(maps.read_smaps(stub.pid))
        ),
    )
    known = {(vma.start, vma.end) for vma in space.vmas}
    work = [one for one in seen[0] if (one.start, one.end) not in known and one.prot == 7]
    assert len(work) == 1  # the work area, which goes before the first instruction
    rest = [one for one in seen[0] if one != work[0] and one.path != "[vsyscall]"]
    assert _canonical(rest, {}) == _canonical(space.vmas, inodes)
    assert not [vma for vma in maps.read_maps(program.pid) if vma.start == work[0].start]


def test_canonical_mappings_are_joined_only_where_the_kernel_may() -> None:
    base = maps.Vma(0x1000, 0x2000, 3, False, 0, (0, 0), 0, "", False, VmaKind.ANON, frozenset({"rd", "wr"}))

    def joined(**other: object) -> bool:
        second = dataclasses.replace(base, **{"start": 0x2000, "end": 0x3000, **other})
        return len(_canonical([base, second], {})) == 1

    assert joined()
    for other in (
        {"start": 0x2800},
        {"prot": 1},
        {"shared": True},
        {"inode": 7},
        {"path": "[heap]"},
        {"flags": frozenset({"rd", "wr", "ac"})},
    ):
        assert not joined(**other), other
    of_file = dataclasses.replace(base, inode=7, path="/x", offset=0x5000)
    after = dataclasses.replace(of_file, start=0x2000, end=0x3000, offset=0x6000)
    assert len(_canonical([of_file, after], {})) == 1
    assert len(_canonical([of_file, dataclasses.replace(after, offset=0x7000)], {})) == 2


def test_parent_is_not_the_restorer_and_nothing_is_held(killed: Captured, program: Program) -> None:
    fds = set(os.listdir("/proc/self/fd"))
    restored = restore(killed)
    stat, status = read_stat(restored.pid), read_status(restored.pid)
    assert stat.ppid != os.getpid()
    assert (stat.pgrp, stat.session) == (restored.pid, restored.pid)
    assert status["TracerPid"] == "0"
    with pytest.raises(ChildProcessError):
        os.waitpid(restored.pid, os.WNOHANG)
    assert len(set(os.listdir("/proc/self/fd"))) == len(fds)


def test_exe_cmdline_and_limits_show_the_program(killed: Captured, program: Program) -> None:
    restored = restore(killed)
    where = Path(f"/proc/{restored.pid}")
    state = killed.state.process
    assert os.readlink(where / "exe") == state.exe.path
    assert (where / "cmdline").read_bytes().rstrip(b"\0").split(b"\0") == [
        os.fsencode(one) for one in state.cmdline
    ]
    assert (where / "auxv").read_bytes() == state.layout.auxv
    assert os.readlink(where / "cwd") == state.cwd


def test_stopped_program_comes_back_stopped(program: Program) -> None:
    os.kill(program.pid, signal.SIGSTOP)
    while read_stat(program.pid).state != "T":
        time.sleep(0.001)
    captured = capture(program.pid, kill=True)
    program.kill()
    restored = restore(captured)
    assert captured.state.process.stopped
    deadline = time.monotonic() + 10
    while {read_stat(restored.pid, tid).state for tid in restored.tids.values()} != {"T"}:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(restored.pid, signal.SIGCONT)
    program.wait_rounds(5)


def test_new_ids_beside_the_living_original(program: Program) -> None:
    captured = capture(program.pid)
    options = RestoreOptions(files=FilesOptions(changed="allow"))  # the original writes on
    restored = restore(captured, new_pid=True, options=options)
    try:
        assert restored.pid != program.pid
        assert set(restored.tids.values()).isdisjoint(restored.tids)
        deadline = time.monotonic() + 30
        while program.read()[0] != restored.pid:  # both write the same file
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert any("new ids" in warning for warning in restored.warnings)
        program.child.kill()
        program.child.wait()
        program.wait_rounds(25, restored.pid)  # it makes threads, joins them and forks
    finally:
        kill_and_reap(restored.pid)


def test_hook_can_work_in_the_process_before_its_first_instruction(
    killed: Captured, program: Program
) -> None:
    before = program.read()
    seen: list[object] = []

    def hook(stub: Stub) -> None:
        seen.append(stub.batch([Call(Nr.GETPID), Call(Nr.GETTID)]))
        seen.append(program.read())

    restored = restore(killed, options=RestoreOptions(wait_for_ids_s=20, before_release=hook))
    assert seen == [[restored.pid, restored.pid], before]
    program.wait_rounds(3)


# ---- what it refuses


def test_pid_in_use_names_who_has_it(program: Program) -> None:
    captured = capture(program.pid)
    with pytest.raises(
        RestoreConflict, match=f"pid {program.pid} is in use by process {program.pid}"
    ) as caught:
        restore(captured, options=RestoreOptions(wait_for_ids_s=0.1))
    assert "new-pid" in caught.value.hint
    program.wait_rounds(2)


def test_unreaped_original_is_said_to_be_dead(program: Program) -> None:
    captured = capture(program.pid, kill=True)
    while read_stat(program.pid).state != "Z":
        time.sleep(0.001)
    with pytest.raises(RestoreConflict, match="dead but not yet reaped"):
        restore(captured, options=RestoreOptions(wait_for_ids_s=0.1))


def in_thread(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True).start()


def test_unreaped_original_is_waited_for(program: Program) -> None:
    captured = capture(program.pid, kill=True)

    def reap_later() -> None:
        time.sleep(0.2)
        program.child.wait()

    in_thread(reap_later)
    restore(captured)
    program.wait_rounds(3)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A C program of one's own file, which maps another one."""
    source = tmp_path / "small.c"
    source.write_text(
        "#include <fcntl.h>\n#include <sys/mman.h>\n#include <unistd.h>\n#include <sys/stat.h>\n"
        "int main(int c, char **v) { mkdir(v[2], 0700); if (chdir(v[2])) return 1; int fd = open(v[1], O_RDONLY);\n"
        "  volatile char *p = mmap(0, 4096, PROT_READ, MAP_PRIVATE, fd, 0); close(fd); (void)*p;\n"
        '  if (write(1, "r", 1) != 1) return 2; for (;;) usleep(10000); }\n'
    )
    binary, mapped = tmp_path / "small", tmp_path / "mapped"
    subprocess.run(["gcc", "-O1", "-o", binary, source], check=True)
    mapped.write_bytes(b"x" * 5000)
    child = subprocess.Popen(
        [binary, mapped, tmp_path / "cwd"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.read(1) == b"r"
    child.stdout.close()
    yield child
    child.kill()
    child.wait()
    if Path(f"/proc/{child.pid}").exists():
        kill_and_reap(child.pid)


@pytest.mark.parametrize("how", ["gone", "longer", "newer"])
def test_changed_files_are_named(small: subprocess.Popen[bytes], tmp_path: Path, how: str) -> None:
    captured = capture(small.pid, kill=True, with_files=False)
    kill_and_reap(small)
    mapped = tmp_path / "mapped"
    if how == "gone":
        mapped.unlink()
    elif how == "longer":
        stat = mapped.stat()
        mapped.write_bytes(b"x" * 6000)
        os.utime(mapped, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(mapped)
    with pytest.raises(RestoreConflict, match=str(mapped)) as caught:
        restore(captured)
    assert caught.value.hint
    assert not Path(f"/proc/{small.pid}").exists()


def test_all_conflicts_are_named_at_once(small: subprocess.Popen[bytes], tmp_path: Path) -> None:
    captured = capture(small.pid, kill=True, with_files=False)
    kill_and_reap(small)
    (tmp_path / "cwd").rmdir()
    os.utime(tmp_path / "mapped")
    with pytest.raises(RestoreConflict) as caught:
        restore(captured)
    text = " ".join(caught.value.details["conflicts"])
    assert "cwd" in text
    assert "mapped" in text


def changed(captured: Captured, **process: object) -> Captured:
    state = captured.state
    return dataclasses.replace(
        captured, state=dataclasses.replace(state, process=dataclasses.replace(state.process, **process))
    )


def test_another_kernel_s_vdso_is_refused(killed: Captured) -> None:
    space = dataclasses.replace(killed.state.address_space, vdso=b"\x90" * 8192)
    other = dataclasses.replace(killed, state=dataclasses.replace(killed.state, address_space=space))
    with pytest.raises(Unsupported, match="vdso"):
        restore(other)


def test_a_cpu_with_less_is_refused(killed: Captured) -> None:
    cpu = killed.state.process.cpu
    more = dataclasses.replace(cpu, flags=cpu.flags | {"avx9999"})
    with pytest.raises(Unsupported, match="avx9999"):
        restore(changed(killed, cpu=more))
    more = dataclasses.replace(cpu, xfeatures=cpu.xfeatures | 1 << 40)
    with pytest.raises(Unsupported, match="register components"):
        restore(changed(killed, cpu=more))
    wait_gone(killed.state.process.pid)


def test_damaged_registers_leave_nothing(killed: Captured) -> None:
    leader, *others = killed.state.process.threads
    bad = dataclasses.replace(leader, xstate=leader.xstate[:520] + b"\xff" * 8 + leader.xstate[528:])
    with pytest.raises(ImageDamaged):
        restore(changed(killed, threads=(bad, *others)))
    wait_gone(killed.state.process.pid)


def test_pages_outside_of_mappings_are_refused(killed: Captured) -> None:
    killed.image.content[0][0x10] = b"x" * 4096
    with pytest.raises(ImageDamaged):
        restore(killed)
    wait_gone(killed.state.process.pid)


# ---- what is left when it fails


PHASES = ["check", "spawn", "map", "memory", "finish", "files", "threads", "release"]


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_failure_at_every_phase_leaves_nothing_and_the_next_try_works(
    killed: Captured, program: Program, phase: str
) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(name)

    fds = len(os.listdir("/proc/self/fd"))
    register(f"restore.{phase}", fail)
    try:
        with pytest.raises(RuntimeError):
            restore(killed)
    finally:
        clear()
    wait_gone(killed.state.process.pid)
    assert len(os.listdir("/proc/self/fd")) == fds
    restore(killed)
    program.wait_rounds(3)


@pytest.mark.parametrize("phase", [*PHASES[1:-1], "release"])
def test_restorer_killed_at_every_phase_leaves_nothing_half_made(
    killed: Captured, program: Program, phase: str
) -> None:
    before = program.read()
    child = os.fork()
    if child == 0:
        register(f"restore.{phase}", lambda name: os.kill(os.getpid(), signal.SIGKILL), at=1)
        try:
            restore(killed)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    if phase == "release":  # the last thread had been let go
        program.wait_rounds(3)
        return
    wait_gone(program.pid)
    assert program.read() == before  # it never ran


def test_process_killed_while_it_is_rebuilt(killed: Captured, program: Program) -> None:
    def kill_it(stub: Stub) -> None:
        os.kill(stub.pid, signal.SIGKILL)

    with pytest.raises((TargetGone, CheckpointError)):
        restore(killed, options=RestoreOptions(wait_for_ids_s=20, before_release=kill_it))
    wait_gone(program.pid)


# ---- what cannot be saved


def test_many_pages_are_written_by_several_threads(tmp_path: Path) -> None:
    """The figures are printed with -s."""
    code = (
        "import mmap, sys, time\nm = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "m[:] = bytes(range(256)) * (len(m) // 256)\nopen(sys.argv[1], 'w').close()\n"
        "while m[12345] == 12345 % 256 and m[(64 << 20) - 1] == 255: time.sleep(0.01)"
    )
    with (tmp_path / "out").open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "ready"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    captured = capture(child.pid, kill=True)
    child.wait()
    restored = restore(captured)
    try:
        assert restored.pages_restored >= 16384
        print({name: round(us / 1000, 1) for name, us in restored.phases.items()}, "ms")
        time.sleep(0.1)
        assert read_stat(restored.pid).state in "SR"
    finally:
        kill_and_reap(restored.pid)


def test_state_without_a_leader_is_refused(killed: Captured) -> None:
    with pytest.raises(CheckpointError, match="main thread"):
        restore(changed(killed, threads=()))


# ---- sessions, and users without privileges


def test_session_of_a_dead_leader_is_made_again(tmp_path: Path) -> None:
    progress, pid_file = tmp_path / "progress", tmp_path / "pid"
    script = f'"{sys.executable}" "{PROGRAM}" "{progress}" </dev/null >"{tmp_path}/out" 2>&1 & echo $! >"{pid_file}"'
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    leader.wait()
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 30
    while not progress.exists() or not progress.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    captured = capture(pid, kill=True)
    wait_gone(pid)
    assert captured.state.process.sid == leader.pid
    restored = restore(captured)
    try:
        stat = read_stat(restored.pid)
        assert (restored.pid, stat.session, stat.pgrp) == (pid, leader.pid, leader.pid)
        assert not Path(f"/proc/{leader.pid}").exists()
    finally:
        kill_and_reap(restored.pid)


@pytest.mark.skipif(autogroup(os.getpid())[1] is None, reason="no autogroups in this kernel, or switched off")
def test_nice_value_of_the_session_comes_back(program: Program) -> None:
    ours = autogroup(os.getpid())
    Path(f"/proc/{program.pid}/autogroup").write_text("7")
    captured = capture(program.pid, kill=True)
    program.kill()
    restored = restore(captured)
    assert autogroup(restored.pid)[1] == 7
    assert autogroup(os.getpid()) == ours


SEMAPHORES = """
import ctypes, struct, sys, threading, time
libc = ctypes.CDLL(None)
how = sys.argv[1:]
semid = libc.semget(0, 2, 0o1600)
assert libc.semctl(semid, 1, 16, 1) == 0
if "threads" in how:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if "lock" in how:
    assert libc.semop(semid, struct.pack("=Hhh", 1, -1, 0o10000 if "undo" in how else 0), 1) == 0
print(semid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("", ""),
        ("lock", ""),
        ("lock undo", "SEM_UNDO"),
        ("threads", ""),
        ("threads lock undo", "last to operate"),
    ],
)
def test_what_semaphores_would_undo_is_told(how: str, told: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", SEMAPHORES, *how.split()], stdout=subprocess.PIPE)
    assert child.stdout is not None
    semid = child.stdout.readline().decode().strip()
    try:
        found = [warning for warning in prepare_process(child.pid).warnings if "semaphore" in warning]
        assert [told in warning for warning in found] == ([True] if told else [])
        assert not found or "threads" not in how or f"set {semid}" in found[0]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        ctypes.CDLL(None).semctl(int(semid), 0, 0)  # IPC_RMID


def test_session_of_somebody_else_becomes_its_own(program: Program) -> None:
    # not our own session: in a container that has no id where we are
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        captured = capture(program.pid, kill=True)
        program.kill()
        restored = restore(changed(captured, sid=other.pid, pgid=program.pid))
        assert any(f"session {other.pid}" in warning for warning in restored.warnings)
        assert read_stat(restored.pid).session == restored.pid
    finally:
        other.kill()
        other.wait()


def test_session_outside_of_the_pid_namespace_becomes_its_own(program: Program) -> None:
    captured = capture(program.pid, kill=True)
    program.kill()
    restored = restore(changed(captured, sid=0, pgid=0))
    assert any("session" in warning for warning in restored.warnings)
    assert read_stat(restored.pid).session == restored.pid


UNPRIVILEGED = """
import ctypes, json, os, struct, subprocess, sys, time
from pathlib import Path
from checkpointd.errors import NotPermitted
from checkpointd.restore.restorer import RestoreOptions
from tests.programs.restore_harness import capture, restore
libc = ctypes.CDLL(None)
assert libc.prctl(28, 3, 0, 0, 0) == 0  # SECBIT_NOROOT and its lock
assert libc.syscall(126, struct.pack("=Ii", 0x20080522, 0), bytes(24)) == 0
progress = Path(sys.argv[2])
with open(os.devnull, "r+b") as null:
    child = subprocess.Popen([sys.executable, sys.argv[1], progress], stdin=null, stdout=null, stderr=null,
                             start_new_session=True)
while not (progress.exists() and progress.read_text().strip()):
    time.sleep(0.01)
captured = capture(child.pid, kill=True)
child.wait()
try:
    restore(captured)
    refused = ""
except NotPermitted as error:
    refused = error.message
restored = restore(captured, new_pid=True, options=RestoreOptions())
first = progress.read_text().split()
while progress.read_text().split()[:1] != [str(restored.pid)]:
    time.sleep(0.01)
os.kill(restored.pid, 9)
print(json.dumps({"refused": refused, "warnings": restored.warnings}))
"""


def test_user_without_capabilities_restores_with_new_ids(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, PROGRAM, tmp_path / "progress"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "CAP_CHECKPOINT_RESTORE" in answer["refused"]
    assert any("/proc/PID/exe" in warning for warning in answer["warnings"])


def test_core_scheduling_is_told(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [one for one in prepare_process(program.pid).warnings if "PR_SCHED_CORE" in one]
    last = max(int(tid) for tid in os.listdir(f"/proc/{program.pid}/task"))
    monkeypatch.setattr("checkpointd.linux.sched.core_cookie", lambda tid: 7 * (tid == last))
    assert [one for one in prepare_process(program.pid).warnings if "PR_SCHED_CORE" in one]
