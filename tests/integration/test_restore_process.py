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
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.linux import capability as cap
from checkpointd.linux.arch import Nr
from checkpointd.memory import VmaKind
from checkpointd.procfs import maps
from checkpointd.procfs.process import read_stat, read_status
from checkpointd.restore.restorer import RestoreOptions
from checkpointd.restore.stub import Stub
from checkpointd.state.files import FilesOptions
from checkpointd.state.memory import VmaState
from checkpointd.target.process import prepare_process
from checkpointd.target.remote import Call
from tests.programs.python_program import PROGRAM, Program
from tests.programs.restore_harness import Captured, capture, kill_and_reap, restore

pytestmark = pytest.mark.skipif(
    not cap.has(cap.effective(), cap.CAP_CHECKPOINT_RESTORE) or os.geteuid() != 0,
    reason="choosing process ids needs root",
)


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
