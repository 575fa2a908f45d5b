# SPDX-License-Identifier: Apache-2.0
"""Open files saved from one process and brought back in another, each kind tried out afterwards."""

import fcntl
import os
import subprocess
import time

import pytest

from checkpointd.errors import RestoreConflict
from checkpointd.linux import fcntl as fdcalls
from checkpointd.restore.files_check import check_files
from checkpointd.state.files import FilesOptions
from checkpointd.target.files import capture_files, prepare_files
from checkpointd.target.shared_objects import ObjectKey
from tests.files_lab import driven, moved, restored, save


def test_descriptor_numbers_and_flags(tmp_path):
    with moved(
        "a = os.open('/dev/zero', os.O_RDONLY); os.dup2(a, 40); os.dup2(a, 41, inheritable=False); os.close(a)"
    ) as (
        stub,
        warnings,
    ):
        assert stub.get("[fcntl.fcntl(n, fcntl.F_GETFD) for n in (0, 1, 2, 40, 41)]") == [0, 0, 0, 0, 1]
        assert stub.get("[n for n in range(99) if os.path.exists(f'/proc/self/fd/{n}')]") == [0, 1, 2, 40, 41]
        assert stub.get("os.read(40, 3)") == b"\0\0\0"
        assert warnings == []


def test_offset_is_kept_and_shared_by_duplicates(tmp_path):
    (tmp_path / "data").write_bytes(b"0123456789")
    setup = """
a = os.open('data', os.O_RDWR); os.dup2(a, 30); os.read(a, 3)
b = os.open('data', os.O_RDWR); os.dup2(b, 31); os.read(b, 3)
"""
    with moved(setup, cwd=tmp_path) as (stub, _):
        # 30 and 31 looked alike in every respect but are two descriptions
        assert stub.get("os.read(30, 2)") == b"34"
        assert stub.get("os.read(3, 2)") == b"56"
        assert stub.get("os.read(31, 2)") == b"34"


def test_append_goes_on_at_the_end_of_a_grown_file(tmp_path):
    log = tmp_path / "log"
    with driven(cwd=tmp_path) as target:
        target.do(
            "a = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND); os.dup2(a, 20); os.write(a, b'one\\n')"
        )
        state, contents, _ = save(target, FilesOptions(external="null"))
        target.go()
        target.do("os.write(20, b'two\\n')")
    with restored(state, contents, FilesOptions(external="null", tty="null")) as (stub, warnings):
        assert any("grew from 4 to 8 bytes" in text for text in warnings)
        stub.do("os.write(20, b'three\\n')")
    assert log.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_deleted_file_keeps_content_and_stays_one_file(tmp_path, size):
    setup = f"""
a = os.open('gone', os.O_RDWR | os.O_CREAT, 0o640)
os.dup2(a, 20)
os.dup2(os.open('gone', os.O_RDONLY), 21)
os.write(20, bytes(range(1, 11)) + bytes({size} - 10))
os.lseek(20, 5, 0)
os.unlink('gone')
"""
    with moved(setup, cwd=tmp_path) as (stub, _):
        assert stub.get("os.fstat(20).st_nlink") == 0
        assert stub.get("os.fstat(20).st_size") == size
        assert stub.get("oct(os.fstat(20).st_mode)") == "0o100640"
        assert stub.get("os.pread(21, 10, 0)") == bytes(range(1, 11))
        stub.do("os.write(20, b'hello')")
        assert stub.get("os.pread(21, 5, 5)") == b"hello"
        assert stub.get("os.fstat(20).st_ino == os.fstat(21).st_ino")
    assert list(tmp_path.iterdir()) == []


def test_tmpfile_can_still_be_given_a_name(tmp_path):
    setup = "os.dup2(os.open('.', os.O_TMPFILE | os.O_RDWR), 20); os.write(20, b'abc')"
    with moved(setup, cwd=tmp_path) as (stub, _):
        path = os.fsencode(tmp_path / "named")
        stub.do(f"assert libc.linkat(-100, b'/proc/self/fd/20', -100, {path!r}, 0x400) == 0")
    assert (tmp_path / "named").read_bytes() == b"abc"


def test_directory_position(tmp_path):
    for name in "abcdef":
        (tmp_path / name).touch()
    setup = "d = os.open('.', os.O_RDONLY); os.dup2(d, 20)"
    with moved(setup, cwd=tmp_path) as (stub, _):
        assert stub.get("sorted(os.listdir(20))") == list("abcdef")
        assert stub.get("os.readlink('/proc/self/fd/20')") == str(tmp_path)


def test_pipe_with_content_size_and_both_ends():
    setup = """
r, w = os.pipe2(os.O_NONBLOCK); os.dup2(r, 20); os.dup2(w, 21)
fcntl.fcntl(w, 1031, 1 << 18)
os.write(w, b'x' * 100000)
"""
    with moved(setup) as (stub, _):
        assert stub.get("fcntl.fcntl(21, 1032)") == 1 << 18
        stub.do("os.write(21, b'tail')")
        assert (
            stub.get("b''.join(iter(lambda: os.read(20, 65536), b'')) if 0 else os.read(20, 200000)")
            == b"x" * 100000 + b"tail"
        )
        assert stub.get("fcntl.fcntl(20, fcntl.F_GETFL)") & os.O_NONBLOCK
        assert stub.get("select.select([20], [], [], 0)[0]") == []
        # 3 and 4 are the same descriptions: close them all and the reader sees the end
        stub.do("os.close(21); os.close(4)")
        assert stub.get("os.read(20, 10)") == b""


def test_saving_a_pipe_consumes_nothing():
    with driven() as target:
        target.do("r, w = os.pipe(); os.write(w, b'abc')")
        save(target, FilesOptions(external="null"))
        target.go()
        assert target.get("os.read(r, 10)") == b"abc"


def test_packets_stay_apart():
    setup = """
r, w = os.pipe2(os.O_DIRECT); os.dup2(r, 20); os.dup2(w, 21)
[os.write(w, p) for p in (b'a', b'bcd', b'ef')]
"""
    with moved(setup) as (stub, _):
        stub.do("os.write(21, b'g')")
        assert stub.get("[os.read(20, 100) for _ in range(4)]") == [b"a", b"bcd", b"ef", b"g"]


def test_closed_ends_stay_closed():
    setup = """
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
r, w = os.pipe(); os.dup2(r, 20); os.close(r); os.write(w, b'last'); os.close(w)
r, w = os.pipe(); os.dup2(w, 21); os.close(r); os.close(w)
"""
    with moved(setup) as (stub, _):
        assert stub.get("os.read(20, 10), os.read(20, 10)") == (b"last", b"")
        with pytest.raises(AssertionError, match="BrokenPipeError"):
            stub.do("signal.signal(signal.SIGPIPE, signal.SIG_IGN); os.write(21, b'x')")


def test_fifo_content(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    setup = """
os.dup2(os.open('fifo', os.O_RDWR), 20); os.dup2(os.open('fifo', os.O_WRONLY), 21)
os.write(20, b'queued')
"""
    with moved(setup, cwd=tmp_path) as (stub, _):
        stub.do("os.write(21, b'+')")
        assert stub.get("os.read(20, 20)") == b"queued+"


def test_directories_of_the_process_itself_in_proc():
    setup = """
os.dup2(os.open('/proc/self', os.O_RDONLY | os.O_DIRECTORY), 20)
os.dup2(os.open('/proc/self/fd', os.O_RDONLY | os.O_DIRECTORY), 21)
"""
    with driven() as target:
        target.do(setup)
        state, contents, _ = save(target)
        target.kill()
    assert check_files(state) == []  # there is no such process before the restore
    with restored(state, contents) as (stub, _):
        assert stub.get("os.readlink('exe', dir_fd=20) == os.readlink('/proc/self/exe')")
        assert stub.get("str(os.getpid()) in os.readlink('/proc/self/fd/20')")
        assert stub.get("'21' in os.listdir(21)")


def test_an_empty_fifo_keeps_its_size(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    setup = "import fcntl\nos.dup2(os.open('fifo', os.O_RDWR), 20); fcntl.fcntl(20, fcntl.F_SETPIPE_SZ, 1 << 18)\n"
    with moved(setup, cwd=tmp_path) as (stub, _):
        assert stub.get("__import__('fcntl').fcntl(20, 1032)") == 1 << 18


def test_external_pipe_is_joined_again_or_replaced():
    ours, theirs = os.pipe()
    try:
        with driven(stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL) as target:
            target.do("pass")
            state, contents, _ = save(target)
            target.kill()
        # the pipe still has an end in this process; holders are looked for elsewhere, so lend it to a child
        holder = subprocess.Popen(["sleep", "60"], stdin=ours)
        try:
            with restored(state, contents) as (stub, warnings):
                assert any("joined again" in text for text in warnings)
                stub.do("os.write(1, b'back')")
                assert os.read(ours, 10) == b"back"
        finally:
            holder.kill()
            holder.wait()
        os.close(ours)
        os.close(theirs)
        ours = theirs = -1
        with pytest.raises(RestoreConflict, match="pipe to another process"), restored(state, contents):
            pass
        with restored(state, contents, FilesOptions(external="null")) as (stub, _):
            assert stub.get("os.readlink('/proc/self/fd/1')") == "/dev/null"
            stub.do("os.write(1, b'x')")
    finally:
        for fd in (ours, theirs):
            if fd >= 0:
                os.close(fd)


def test_external_input_pipe_becomes_its_content_and_an_end():
    ours, theirs = os.pipe()
    os.write(theirs, b"typed ahead")
    with driven(stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as target:
        state, contents, _ = save(target)
    os.close(ours)
    os.close(theirs)
    with restored(state, contents, FilesOptions(external="null")) as (stub, _):
        assert stub.get("os.read(0, 100), os.read(0, 100)") == (b"typed ahead", b"")


def test_eventfd():
    setup = """
os.dup2(os.eventfd(5, os.EFD_SEMAPHORE | os.EFD_NONBLOCK), 20)
os.dup2(os.eventfd(0), 21); os.eventfd_write(21, 2**64 - 2)
"""
    with moved(setup) as (stub, _):
        assert stub.get("[os.eventfd_read(20) for _ in range(5)]") == [1] * 5
        with pytest.raises(AssertionError, match="BlockingIOError"):
            stub.get("os.eventfd_read(20)")
        assert stub.get("os.eventfd_read(21)") == 2**64 - 2


def test_epoll_still_delivers():
    setup = """
r, w = os.pipe(); e = os.eventfd(0)
ep = select.epoll(); os.dup2(ep.fileno(), 20)
ep.register(r, select.EPOLLIN); ep.register(e, select.EPOLLIN | select.EPOLLET)
outer = select.epoll(); outer.register(20, select.EPOLLIN); os.dup2(outer.fileno(), 21)
fds = r, w, e
libc.epoll_ctl(20, 3, e, (ctypes.c_uint32 * 3)(0x80000001, 0xdead, 0xbeef))
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        stub.do("ep = select.epoll.fromfd(20); outer = select.epoll.fromfd(21)")
        assert stub.get("outer.poll(0)") == []
        stub.do("os.write(4, b'x')")
        assert stub.get("outer.poll(0)") == [(20, 1)]
        assert stub.get("ep.poll(0)") == [(3, 1)]
        stub.do("os.eventfd_write(5, 1)")
        stub.do("events = (ctypes.c_uint32 * 30)()")
        assert stub.get("libc.epoll_wait(20, events, 10, 0)") == 2
        got = stub.get("list(events)[:6]")
        assert [1, 0xDEAD, 0xBEEF] in (got[:3], got[3:])
        # edge-triggered: told once
        assert stub.get("libc.epoll_wait(20, events, 10, 0)") == 1


def test_timerfd_remaining_time_interval_and_ticks():
    setup = """
def settime(fd, flags, value, interval):
    spec = (ctypes.c_int64 * 4)(*divmod(interval, 10**9), *divmod(value, 10**9))
    assert libc.timerfd_settime(fd, flags, spec, None) == 0
for number in range(20, 25):
    os.dup2(libc.timerfd_create(0 if number == 24 else 1, 0), number)
for clock in (8, 9):  # those that wake the machine
    os.dup2(libc.timerfd_create(clock, 0), 20 + clock)
    settime(20 + clock, 0, 1000 * 10**9, 0)
settime(20, 0, 1000 * 10**9, 0)
settime(21, 0, 1, 0)
settime(22, 0, 1, 10**7)
settime(24, 1, 4 * 10**18, 7)
time.sleep(0.3)
"""
    with moved(setup) as (stub, _):
        stub.do("""
def gettime(fd):
    spec = (ctypes.c_int64 * 4)()
    assert libc.timerfd_gettime(fd, spec) == 0
    return spec[2] * 10**9 + spec[3], spec[0] * 10**9 + spec[1]
""")
        left, interval = stub.get("gettime(20)")
        assert interval == 0
        assert 900 * 10**9 < left < 1000 * 10**9
        for number in (28, 29):
            assert 900 * 10**9 < stub.get(f"gettime({number})[0]") < 1000 * 10**9
        assert stub.get("os.read(21, 8)") == (1).to_bytes(8, "little")
        # expired about 30 times before the freeze, though nobody read it
        assert int.from_bytes(stub.get("os.read(22, 8)"), "little") >= 30
        assert stub.get("gettime(22)[1]") == 10**7
        assert stub.get("gettime(23)") == (0, 0)
        left = stub.get("gettime(24)[0]")
        assert abs(4 * 10**18 - time.time_ns() - left) < 10**10


def test_signalfd():
    setup = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
mask = ctypes.c_uint64(1 << signal.SIGUSR1 - 1)
os.dup2(libc.signalfd(-1, ctypes.byref(mask), 0), 20)
"""
    with moved(setup) as (stub, _):
        stub.do(
            "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); os.kill(os.getpid(), signal.SIGUSR1)"
        )
        assert stub.get("os.read(20, 128)")[:4] == (10).to_bytes(4, "little")


def test_inotify_watches_keep_their_numbers(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "file").write_text("x")
    setup = """
i = libc.inotify_init1(0); os.dup2(i, 20)
for name, mask in ((b'a', 0x100), (b'b', 0xfff), (b'c', 0x100), (b'c/file', 0x2)):
    assert libc.inotify_add_watch(i, name, mask) > 0
libc.inotify_rm_watch(i, 2)
os.read(i, 1000)
os.rename('c', 'moved')
"""
    with moved(setup, cwd=tmp_path) as (stub, warnings):
        assert warnings == []
        (tmp_path / "moved" / "new").touch()
        event = stub.get("os.read(20, 1000)")
        assert event[:4] == (3).to_bytes(4, "little")
        assert event[16:].rstrip(b"\0") == b"new"
        (tmp_path / "moved" / "file").write_text("y")
        assert stub.get("os.read(20, 1000)")[:4] == (4).to_bytes(4, "little")


def test_memfd_with_seals():
    setup = """
m = os.memfd_create('box', os.MFD_ALLOW_SEALING); os.dup2(m, 20)
os.write(m, b'sealed'); os.lseek(m, 2, 0)
fcntl.fcntl(m, 1033, 2 | 4 | 8)
os.dup2(os.memfd_create('plain'), 21); os.write(21, b'p' * (2 << 20))
os.dup2(os.open('/proc/self/fd/20', os.O_RDONLY), 22)
"""
    with moved(setup) as (stub, _):
        assert stub.get("os.read(20, 10)") == b"aled"
        assert stub.get("fcntl.fcntl(20, 1034)") == 2 | 4 | 8
        assert stub.get("fcntl.fcntl(21, 1034)") == 1
        assert stub.get("os.readlink('/proc/self/fd/20')") == "/memfd:box (deleted)"
        assert stub.get("os.fstat(21).st_size") == 2 << 20
        assert stub.get("os.pread(21, 5, (2 << 20) - 5)") == b"ppppp"
        assert stub.get("os.pread(22, 10, 0)") == b"sealed"
        with pytest.raises(AssertionError, match="PermissionError"):
            stub.do("os.write(20, b'x')")


def test_shared_memory_object_is_reopened():
    with driven(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as target:
        target.do("m = os.memfd_create('obj'); os.dup2(m, 20); os.write(20, b'12345')")
        st = os.stat(f"/proc/{target.pid}/fd/20")
        key = ObjectKey((os.major(st.st_dev), os.minor(st.st_dev)), st.st_ino)
        state, contents, _ = save(target, objects={key: 7})
    base = os.memfd_create("again")
    os.write(base, b"12345")
    try:
        with restored(state, contents, object_fds={7: base}) as (stub, _):
            stub.do("os.write(20, b'6')")
            assert os.pread(base, 10, 0) == b"123456"
    finally:
        os.close(base)


def test_pidfd_of_itself():
    with moved("os.dup2(os.pidfd_open(os.getpid()), 20)") as (stub, _):
        assert f"Pid:\t{stub.pid}\n" in stub.get("open('/proc/self/fdinfo/20').read()")


def test_locks_are_taken_again(tmp_path):
    setup = """
a = os.open('flock', os.O_RDWR | os.O_CREAT); os.dup2(a, 20); fcntl.flock(20, fcntl.LOCK_EX)
b = os.open('posix', os.O_RDWR | os.O_CREAT); os.dup2(b, 21); fcntl.lockf(b, fcntl.LOCK_EX, 10, 5)
"""
    with moved(setup, cwd=tmp_path) as (_stub, _):
        with open(tmp_path / "flock", "r+") as ours, pytest.raises(BlockingIOError):
            fcntl.flock(ours, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with open(tmp_path / "posix", "r+") as ours:
            with pytest.raises(BlockingIOError):
                fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 14)
            fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)


def test_terminal(tmp_path):
    leader, follower = os.openpty()
    path = os.ttyname(follower)
    with driven(stdin=follower, stdout=follower, stderr=follower) as target:
        target.do("pass")
        state, contents, _ = save(target)
    with restored(state, contents) as (stub, _):
        assert stub.get("os.ttyname(1)") == path
        stub.do("os.write(1, b'hi')")
        assert os.read(leader, 10) == b"hi"
    os.close(leader)
    os.close(follower)
    with pytest.raises(RestoreConflict, match="terminal"), restored(state, contents):
        pass
    with restored(state, contents, FilesOptions(tty="null")) as (stub, _):
        assert stub.get("os.readlink('/proc/self/fd/1')") == "/dev/null"


def test_own_files_in_proc_follow_the_process():
    with moved("os.dup2(os.open('/proc/self/status', os.O_RDONLY), 20)") as (stub, _):
        assert f"\nPid:\t{stub.pid}\n" in stub.get("os.pread(20, 4096, 0).decode()")


def test_signal_owner_and_async(tmp_path):
    setup = """
r, w = os.pipe(); os.dup2(r, 20)
fcntl.fcntl(20, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(20, 10, signal.SIGUSR2)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
fcntl.fcntl(20, fcntl.F_SETFL, os.O_ASYNC)
"""
    with moved(setup) as (stub, _):
        stub.do("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); os.write(4, b'x')")
        assert stub.get("fcntl.fcntl(20, fcntl.F_GETOWN)") == stub.pid
        assert stub.get("signal.sigtimedwait([signal.SIGUSR2], 10).si_signo") == 12


def test_signal_and_owner_of_what_raises_no_signal_yet():
    setup = """
r, w = os.pipe(); os.dup2(r, 20); os.dup2(w, 21)
fcntl.fcntl(20, fcntl.F_SETSIG, signal.SIGUSR2)
fcntl.fcntl(21, fcntl.F_SETOWN, os.getpid())
s = socket.socket(); os.dup2(s.fileno(), 22); s.close()
fcntl.fcntl(22, fcntl.F_SETSIG, signal.SIGUSR1)
"""
    with moved(setup) as (stub, warnings):
        assert warnings == []
        for fd, signal, owner in ((20, 12, 0), (21, 0, stub.pid), (22, 10, 0)):
            assert stub.get(f"fcntl.fcntl({fd}, fcntl.F_GETSIG)") == signal
            assert stub.get(f"fcntl.fcntl({fd}, fcntl.F_GETOWN)") == owner
        # the owner comes when the program begins to wait for the signal
        stub.do("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGIO])")
        stub.do("fcntl.fcntl(20, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(20, fcntl.F_SETFL, os.O_ASYNC)")
        stub.do("os.write(21, b'x')")
        assert stub.get("signal.sigtimedwait([signal.SIGUSR2, signal.SIGIO], 10).si_signo") == 12


def test_only_what_had_an_owner_or_is_new_is_asked_in_the_freeze(monkeypatch):
    """A target stands still for each question."""
    asked = []
    real = fdcalls.get_owner
    with driven() as target:
        target.do("pipes = [os.pipe() for _ in range(50)]; fcntl.fcntl(pipes[0][0], fcntl.F_SETSIG, 12)")
        draft = prepare_files(target.pid)
        target.do("new, _ = os.pipe(); fcntl.fcntl(new, fcntl.F_SETSIG, 12)")
        target.stop()
        monkeypatch.setattr(fdcalls, "get_owner", lambda fd: asked.append(fd) or real(fd))
        state = capture_files(target, draft=draft).state
        target.go()
        first, new = target.get("pipes[0][0], new")
    owned = {one.description for one in state.descriptors if one.fd in (first, new)}
    assert [index for index, one in enumerate(state.descriptions) if one.owner] == sorted(owned)
    assert len(asked) == 3  # and the other end of the new pipe


_SPENT = """
ep = select.epoll(); os.dup2(ep.fileno(), 20)
once = select.EPOLLIN | select.EPOLLONESHOT
def spend(fd, events=once):
    ep.register(fd, events)
    assert [one for one, _ in ep.poll(0.5)] == [fd]
"""
_SPENT_KINDS = {
    "a pipe with content": "r, w = os.pipe(); os.write(w, b'x'); spend(r)",
    "an empty pipe": "r, w = os.pipe(); os.write(w, b'x'); spend(r); os.read(r, 1)",
    "an empty pipe in packet mode": (
        "r, w = os.pipe2(os.O_DIRECT | os.O_NONBLOCK); os.write(w, b'x'); spend(r); os.read(r, 1)"
    ),
    "a pipe to write to": "r, w = os.pipe(); spend(w, select.EPOLLOUT | select.EPOLLONESHOT)",
    "an eventfd": "r = os.eventfd(1); spend(r, once | select.EPOLLET); os.eventfd_read(r)",
    "a socket of a pair": (
        "a, b = socket.socketpair(); r = a.detach(); w = b.detach(); os.write(w, b'x'); spend(r); os.read(r, 1)"
    ),
    "a TCP listener": (
        "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); r = s.detach(); "
        "spend(r); s = socket.socket(fileno=r); s.accept()[0].close(); c.close(); s.detach()"
    ),
    "a UNIX listener": (
        "s = socket.socket(socket.AF_UNIX); s.bind(b'\\0spent-%d' % os.getpid()); s.listen(); c = socket.socket("
        "socket.AF_UNIX); c.connect(s.getsockname()); r = s.detach(); spend(r); s = socket.socket(fileno=r); "
        "s.accept()[0].close(); c.close(); s.detach()"
    ),
    "a timer": "r = time_fd(10**6, 10**15); spend(r); os.read(r, 8)",
    "a disarmed timer": "r = time_fd(10**6, 0); spend(r); os.read(r, 8)",
}  # fmt: skip
_TIME_FD = """
def time_fd(value, interval):
    fd = libc.timerfd_create(1, 0)
    spec = (ctypes.c_int64 * 4)(*divmod(interval, 10**9), *divmod(value, 10**9))
    assert libc.timerfd_settime(fd, 0, spec, None) == 0
    return fd
"""
_EVENTS = "[line.split()[3] for line in open('/proc/self/fdinfo/20') if line.startswith('tfd')]"


@pytest.mark.parametrize("what", _SPENT_KINDS)
def test_a_oneshot_watch_that_has_fired_says_nothing_more(what):
    with driven(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as target:
        target.do(f"{_TIME_FD}{_SPENT}r = w = -1\n{_SPENT_KINDS[what]}\nos.dup2(r, 21)")
        (events,) = target.get(_EVENTS)
        assert int(events, 16) & 0x0FFFFFFF == 0  # or the program has not made what this is about
        (watched,) = target.get(
            "[int(line.split()[1]) for line in open('/proc/self/fdinfo/20') if 'tfd' in line]"
        )
        (other,) = {*target.get("(r, w)")} - {watched}
        before = target.get(f"select.select([{watched}], [], [], 0)[0]")
        state, contents, _ = save(target)
        target.kill()
    with restored(state, contents) as (stub, warnings):
        assert warnings == []
        assert stub.get(_EVENTS) == [events]
        assert stub.get(f"select.select([{watched}], [], [], 0)[0]") == before
        stub.do("ep = select.epoll.fromfd(20)")
        if "timer" in what:
            left = stub.get("[line for line in open('/proc/self/fdinfo/21') if 'it_value' in line][0]")
            assert ("(0, 0)" in left) is ("disarmed" in what)
        if other >= 0:
            stub.do(f"os.close({other}); os.close(21)")  # it hangs up, or its reader is gone
        assert stub.get("ep.poll(0)") == []
        if "listener" in what:
            stub.do(f"""
s = socket.socket(fileno={watched})
c = socket.socket(s.family); c.connect(s.getsockname())
""")
            assert stub.get("ep.poll(0)") == []
        stub.do(f"ep.modify({watched}, select.EPOLLIN | select.EPOLLOUT | select.EPOLLONESHOT)")
        assert len(stub.get("ep.poll(0)")) == (0 if "timer" in what else 1)


def test_a_oneshot_watch_of_what_cannot_fire_is_told():
    setup = f"""{_SPENT}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
mask = ctypes.c_uint64(1 << signal.SIGUSR1 - 1)
r = libc.signalfd(-1, ctypes.byref(mask), 0)
os.kill(os.getpid(), signal.SIGUSR1)
spend(r)
os.read(r, 128)
a, b = os.pipe(); ep.register(a, select.EPOLLIN)
"""
    with moved(setup) as (stub, warnings):
        assert [text for text in warnings if "EPOLLONESHOT" in text] == warnings
        assert len(warnings) == 1
        assert sorted(stub.get(_EVENTS)) == ["19", "40000018"]
