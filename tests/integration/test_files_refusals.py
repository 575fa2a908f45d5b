# SPDX-License-Identifier: Apache-2.0
"""What cannot be saved or restored is refused, each with one sentence that names the descriptor and what to do."""

import os
import subprocess

import pytest

from checkpointd.errors import RestoreConflict, TargetGone, Unsupported
from checkpointd.restore.files import check_files
from checkpointd.state.files import FilesOptions
from checkpointd.target.files import capture_files, file_blockers, shared_memory_fds
from tests.files_lab import driven, restored, save

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

AT_DUMP = [
    ("libc.syscall(425, 4, ctypes.create_string_buffer(120))", "fd 3 is an io_uring"),
    ("libc.syscall(323, 0x80001)", "fd 3 is a userfaultfd"),
    ("libc.syscall(447, 0)", "fd 3 is memfd_secret"),
    ("import pty; pty.openpty()", "fd 3 is the master of a pseudo-terminal"),
    (
        "libc.syscall(298, ctypes.create_string_buffer(struct.pack('IIQ', 1, 128, 0) + bytes(112)), 0, -1, -1, 0)",
        "perf event",
    ),
    ("libc.fanotify_init(0, 0)", "fd 3 is an fanotify group"),
    ("os.pidfd_open(os.getppid())", "fd 3 is a pidfd of process"),
    ("a = os.open('x', os.O_CREAT); os.link('x', 'y'); os.unlink('x')", "name .*x is gone while it has other names"),
    ("os.mkdir('d'); a = os.open('d', 0); os.rmdir('d')", "deleted directory .*/d; make the program close it"),
    ("a = os.open('x', os.O_CREAT); fcntl.fcntl(a, 1024, 0)", "holds a lease"),
    ("os.mkfifo('p'); a = os.open('p', os.O_RDWR); os.unlink('p')", "the FIFO .*/p, which was deleted"),
    (
        "r, w = os.pipe(); e = select.epoll(); e.register(r); os.dup2(r, 30); os.close(r)",
        r"fd 5 \(epoll\) still watches what was fd 3",
    ),
    (
        "r, w = os.pipe(); e = select.epoll(); e.register(r); os.dup2(r, 30); os.dup2(os.eventfd(0), r)",
        r"fd 5 \(epoll\) still watches what was fd 3",
    ),
    ("os.open('/proc/self/ns/net', 0)", "fd 3 .*net:.*cannot be saved"),
    (
        "import threading; t = threading.Thread(target=lambda: os.open('/proc/thread-self', 0)); t.start(); t.join(); "
        "time.sleep(0.1)",
        "fd 3 is /proc/[0-9]*/task/[0-9]*, which is gone .its process or thread has ended",
    ),
    (
        "(p := os.fork()) or os._exit(0); a = os.open(f'/proc/{p}/stat', 0); os.waitpid(p, 0)",
        "fd 3 is /proc/[0-9]*/stat, which is gone",
    ),
    ("a = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)", "master of a pseudo-terminal"),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "words"), AT_DUMP)
def test_at_dump_before_and_in_the_freeze(setup, words, tmp_path):
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do(f"result = {setup}" if ";" not in setup and "import" not in setup else setup)
        if target.get("globals().get('result')") == -1:
            pytest.skip("this kernel or user cannot make such a descriptor")
        blockers = file_blockers(target.pid)
        with pytest.raises(Unsupported, match=words) as error:
            save(target)
        target.go()
        assert error.value.details["blockers"] == blockers
        assert target.get("1 + 1") == 2


@pytest.mark.parametrize(
    ("flag", "words"), [(0x400, "open files of its own"), (0x200, "working directory of its own")]
)
def test_a_thread_with_a_table_of_its_own(flag, words):
    setup = f"""
import threading
ready, stay = threading.Event(), threading.Event()
def alone():
    assert libc.unshare({flag}) == 0
    ready.set(); stay.wait()
threading.Thread(target=alone, daemon=True).start(); ready.wait()
"""
    with driven(**QUIET) as target:
        target.do(setup)
        (blocker,) = file_blockers(target.pid)
        assert words in blocker


def test_all_reasons_at_once(tmp_path):
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do("a = os.pidfd_open(os.getppid()); b = os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY)")
        blockers = file_blockers(target.pid)
        assert [text.split(" ")[1] for text in blockers] == ["3", "4"]


def test_external_pipes_are_refused_when_asked():
    with driven(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as target:
        blocker, _ = file_blockers(
            target.pid, FilesOptions(external="refuse")
        )  # the other is our control socket
        assert "fd 0 is a pipe whose writing end is held outside" in blocker
        target.process.stdin.close()


def test_a_process_that_is_gone():
    with driven(**QUIET) as target:
        target.kill()
        with pytest.raises(TargetGone):
            file_blockers(target.pid)
        with pytest.raises(TargetGone):
            capture_files(target)


def moved_away(tmp_path):
    os.rename(tmp_path / "x", tmp_path / "elsewhere")


def made_shorter(tmp_path):
    os.truncate(tmp_path / "x", 1)


def made_a_directory(tmp_path):
    os.unlink(tmp_path / "x")
    os.mkdir(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moved_away, "x is gone"),
        (made_shorter, "x shrank from 5 to 1 bytes"),
        (made_a_directory, "no regular file"),
    ],
)
def test_changed_files_at_restore(tmp_path, change, words):
    (tmp_path / "x").write_bytes(b"12345")
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do("a = os.open('x', os.O_RDWR)")
        state, contents, _ = save(target)
    assert check_files(state) == []
    change(tmp_path)
    (conflict,) = check_files(state)
    assert conflict.startswith("fd 3: ")
    assert words in conflict
    with pytest.raises(RestoreConflict), restored(state, contents):
        pass


def test_missing_directory_watch_and_fifo_at_restore(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "w").mkdir()
    setup = """
a = os.open('d', 0); i = libc.inotify_init1(0); libc.inotify_add_watch(i, b'w', 2)
os.mkfifo('p'); f = os.open('p', os.O_RDWR)
"""
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do(setup)
        state, _, _ = save(target)
    for name in "dw":
        (tmp_path / name).rmdir()
    (tmp_path / "p").unlink()
    conflicts = check_files(state)
    assert [text.split(":")[0] for text in conflicts] == ["fd 3", "fd 4", "fd 5"]
    assert "directory" in conflicts[0]
    assert "watched path" in conflicts[1]
    assert "mkfifo" in conflicts[2]


def test_lock_held_by_another_process_at_restore(tmp_path):
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do("a = os.open('x', os.O_RDWR | os.O_CREAT); fcntl.flock(a, fcntl.LOCK_EX)")
        state, contents, _ = save(target)
    with driven(cwd=tmp_path, **QUIET) as other:
        other.do("a = os.open('x', os.O_RDWR | os.O_CREAT); fcntl.flock(a, fcntl.LOCK_EX)")
        (conflict,) = check_files(state)
        assert f"held by process {other.pid}" in conflict
        with pytest.raises(RestoreConflict, match="lock"), restored(state, contents):
            pass


def test_another_root(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    with driven(cwd=tmp_path, **QUIET) as target:
        target.do("a = os.open('x', os.O_RDONLY); os.read(a, 2); os.dup2(a, 20)")
        state, contents, _ = save(target)
    root = tmp_path / "root"
    copy = root / str(tmp_path)[1:] / "x"
    copy.parent.mkdir(parents=True)
    (tmp_path / "x").rename(copy)
    (root / "dev").symlink_to("/dev")
    options = FilesOptions(root=str(root))
    assert "gone" in check_files(state)[0]
    assert check_files(state, options) == []
    with restored(state, contents, options) as (stub, _):
        assert stub.get("os.read(20, 3)") == b"345"


def test_shared_memory_descriptors_are_told_before_the_freeze():
    with driven(**QUIET) as target:
        target.do("m = os.memfd_create('a b'); os.ftruncate(m, 12345)")
        (found,) = shared_memory_fds(target.pid)
        assert (found.fd, found.name, found.size_bytes) == (3, "a b", 12345)
        assert found.inode == os.stat(f"/proc/{target.pid}/fd/3").st_ino
