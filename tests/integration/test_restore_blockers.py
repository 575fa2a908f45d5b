# SPDX-License-Identifier: Apache-2.0
"""What makes a process impossible to save, said before it stands still wherever that can be seen from outside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointd.errors import Unsupported
from checkpointd.procfs import process
from checkpointd.procfs.process import read_stat
from checkpointd.target.process import process_blockers
from tests.programs.restore_harness import capture

pytestmark = pytest.mark.needs("root", "ptrace")


@contextlib.contextmanager
def child_that_ran(code: str) -> Iterator[int]:
    """A Python child that has run `code`, and sleeps."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nimport time\nprint('ready', flush=True)\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
    finally:
        child.kill()
        child.communicate()


def blockers_of(code: str) -> list[str]:
    with child_that_ran(code) as pid:
        return process_blockers(pid)


def test_an_ordinary_program_has_no_blockers() -> None:
    assert blockers_of("") == []


def test_namespaces_and_seccomp_are_blockers_named_together() -> None:
    code = (
        "import ctypes, struct, os\nlibc = ctypes.CDLL(None)\n"
        "libc.unshare(0x04000000)\n"  # CLONE_NEWUTS
        "prog = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n"
        "fprog = struct.pack('HxxxxxxQ', 1, ctypes.addressof(prog))\n"
        "libc.prctl(38, 1, 0, 0, 0)\nassert libc.prctl(22, 2, fprog, 0, 0) == 0"
    )
    text = " ".join(blockers_of(code))
    assert "uts namespace" in text
    assert "seccomp" in text


def test_a_thread_in_a_namespace_of_its_own_is_a_blocker() -> None:
    code = (
        "import ctypes, threading, time\nlibc = ctypes.CDLL(None)\nmade = threading.Event()\n"
        "def work():\n    assert libc.unshare(0x04000000) == 0\n    made.set()\n    time.sleep(60)\n"
        "threading.Thread(target=work, daemon=True).start()\nmade.wait()"
    )
    assert any("different uts namespaces" in one for one in blockers_of(code))


NO_NEW_PRIVS = "libc.prctl(38, 1, 0, 0, 0)"
NOBODY = "libc.setresuid(65534, 65534, 65534)"


def landlock_warnings_of(*calls: str) -> list[str]:
    with child_that_ran("\n".join(["import ctypes, struct", "libc = ctypes.CDLL(None)", *calls])) as pid:
        has_it = process.read_status(pid)["NoNewPrivs"] == "1"
        warnings = capture(pid, with_files=False).state.process.warnings
    assert has_it or NO_NEW_PRIVS not in calls
    return [warning for warning in warnings if "Landlock" in warning]


@pytest.mark.parametrize("calls", [(), (NO_NEW_PRIVS,), (NOBODY,)])
def test_who_may_examine_others_is_in_no_landlock_domain(calls: tuple[str, ...]) -> None:
    if process.read_status(os.getpid())["NoNewPrivs"] == "1" and NOBODY in calls:
        pytest.skip("it would inherit no_new_privs, and then nobody can tell")
    assert landlock_warnings_of(*calls) == []


def test_where_nothing_shows_a_landlock_domain_it_is_warned_of_in_doubt() -> None:
    """Who lacks CAP_SYS_ADMIN needs no_new_privs to enter one."""
    (warning,) = landlock_warnings_of(NO_NEW_PRIVS, NOBODY)
    assert "no_new_privs" in warning


@pytest.mark.needs("landlock")
@pytest.mark.parametrize("before", [(), (NO_NEW_PRIVS,)])
def test_landlock_domain_is_told_by_what_it_forbids(before: tuple[str, ...]) -> None:
    (warning,) = landlock_warnings_of(
        *before,
        "rules = libc.syscall(444, struct.pack('=Q', 1 << 11), 8, 0)",  # LANDLOCK_ACCESS_FS_MAKE_BLOCK
        "assert libc.syscall(446, rules, 0) == 0",
        "import os; os.close(rules)",
    )
    assert "is in a Landlock domain" in warning


@pytest.mark.needs("memfd_secret")
def test_secret_memory_is_a_blocker() -> None:
    code = (
        "import ctypes, mmap, os\nfd = ctypes.CDLL(None).syscall(447, 0)\n"
        "os.ftruncate(fd, 4096)\nm = mmap.mmap(fd, 4096)"
    )
    assert any("secret" in one for one in blockers_of(code))


@pytest.mark.parametrize("call,word", [("65, 1", "MDWE"), ("26, 2", "PR_SET_TSC")])
def test_what_only_the_process_can_be_asked_is_refused_in_the_freeze(call: str, word: str) -> None:
    # a program that runs on: the clock of a Python without time stamp counter would kill it
    code = f"import ctypes; libc = ctypes.CDLL(None); assert libc.prctl({call}, 0, 0, 0) == 0; print('r', flush=True)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code + "while True: libc.usleep(1000)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"r\n"
        with pytest.raises(Unsupported, match=word):
            capture(child.pid)
        assert read_stat(child.pid).state in "SR"
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def test_a_32_bit_program_is_a_blocker(tmp_path: Path) -> None:
    source = tmp_path / "t.c"
    source.write_text('void _start(void) { for (;;) __asm__ volatile("int $0x80" :: "a"(29)); }')
    built = subprocess.run(
        ["gcc", "-m32", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-o", tmp_path / "t", source],
        capture_output=True,
    )
    if built.returncode:
        pytest.skip("no 32-bit compiler")
    child = subprocess.Popen([tmp_path / "t"])
    try:
        assert any("32-bit" in one for one in process_blockers(child.pid))
    finally:
        child.kill()
        child.wait()
