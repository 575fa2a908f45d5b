# SPDX-License-Identifier: Apache-2.0
"""Rules of restoring files that need no process: changed files, ports, locks, paths, diagnostics, state."""

import dataclasses
import os
import socket
import struct
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from checkpointd.linux import fcntl as fdcalls
from checkpointd.linux import inet_diag
from checkpointd.linux import socket as sockets
from checkpointd.restore import holders
from checkpointd.restore.files_changes import judge
from checkpointd.restore.files_maker import own_proc_path, rooted, write_all
from checkpointd.state import files as state_of
from checkpointd.state.codec import decode, encode
from checkpointd.state.memory import FileIdentity
from checkpointd.target.files_session import OpenFd, group_by_description

READ, WRITE, BOTH, APPEND = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND


def file(flags, size=100, mtime=5):
    return state_of.RegularFile(flags=flags, file=FileIdentity("/f", (8, 1), 7, size, mtime), offset=50)


def there(size=100, mtime=5, mode=0o100644):
    return SimpleNamespace(st_mode=mode, st_size=size, st_mtime_ns=mtime)


@pytest.mark.parametrize(
    ("flags", "size", "mtime", "conflict", "note"),
    [
        (READ, 100, 5, "", ""),
        (READ, 100, 6, "was rewritten", ""),
        (READ, 120, 6, "", "goes on reading at offset 50"),
        (READ, 80, 6, "shrank from 100 to 80", ""),
        (WRITE, 120, 6, "", "offset 50 and overwrites what came later"),
        (WRITE, 80, 6, "shrank", ""),
        (APPEND, 120, 6, "", "appending at its end"),
        (APPEND, 0, 6, "", "shrank from 100 to 0 bytes since the dump; the program goes on appending"),
        (BOTH, 120, 6, "grew", ""),
        (BOTH, 100, 6, "was rewritten", ""),
    ],
)
def test_changed_files(flags, size, mtime, conflict, note):
    verdict = judge(file(flags), there(size, mtime), allow_changes=False)
    assert conflict in verdict.conflict
    assert bool(conflict) == bool(verdict.conflict)
    assert note in verdict.note
    assert bool(note) == bool(verdict.note)
    allowed = judge(file(flags), there(size, mtime), allow_changes=True)
    assert not allowed.conflict
    assert bool(allowed.note) == bool(conflict or note)


def test_gone_and_replaced_files_are_conflicts_even_if_changes_are_allowed():
    assert "gone" in judge(file(READ), None, allow_changes=True).conflict
    assert "no regular file" in judge(file(READ), there(mode=0o040755), allow_changes=True).conflict


def test_pseudo_files_have_no_size():
    assert (
        judge(dataclasses.replace(file(READ), pseudo=True), there(0, 99), allow_changes=False).conflict == ""
    )


def test_ports_are_found():
    table = (
        b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n"
        b"   1: 0100007F:1F91 00000000:0000 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0 100 0\n"
    )
    assert holders.port_inodes(table, 8080) == [4711]
    assert holders.port_inodes(table, 8081) == []


def test_unix_names_are_found():
    table = (
        b"Num       RefCount Protocol Flags    Type St Inode Path\n"
        b"0: 00000002 00000000 00010000 0001 01 77 @name\n"
        b"0: 00000003 00000000 00000000 0001 03 78 @name\n"
        b"0: 00000003 00000000 00000000 0001 03 79 @other\n"
        b"0: 00000002 00000000 00000000 0002 01 80 /with space\n"
        b"0: 00000003 00000000 00000000 0002 03 81 @datagrams\n"
    )
    assert holders.unix_name_inode(table, b"\0name") == 77
    assert holders.unix_name_inode(table, b"\0other") == 0
    assert holders.unix_name_inode(table, b"/with space") == 80
    assert holders.unix_name_inode(table, b"\0datagrams") == 81


def test_lock_holders_are_found():
    table = (
        b"1: POSIX  ADVISORY  WRITE 4242 fe:00:99 0 EOF\n1: -> POSIX  ADVISORY  WRITE 4243 fe:00:99 0 EOF\n"
    )
    assert holders.lock_holder(table, (0xFE, 0), 99, "POSIX") == 4242
    assert holders.lock_holder(table, (0xFE, 0), 99, "FLOCK") is None


def test_paths():
    assert rooted("/", "/a/b") == "/a/b"
    assert rooted("/mnt", "/a/b") == "/mnt/a/b"
    ids = {12: 99, 13: 100}
    assert own_proc_path("/proc/12/stat", ids) == "/proc/99/stat"
    assert own_proc_path("/proc/12", ids) == "/proc/99"
    assert own_proc_path("/proc/123/stat", ids) == "/proc/123/stat"
    assert own_proc_path("/proc/12/task", ids) == "/proc/99/task"
    assert own_proc_path("/proc/12/task/13/fd", ids) == "/proc/99/task/100/fd"
    assert own_proc_path("/proc/13/task/12", ids) == "/proc/100/task/99"
    assert own_proc_path("/proc/12/task/14", ids) == "/proc/99/task/14"
    assert own_proc_path("/proc/14/task/12", ids) == "/proc/14/task/12"
    assert own_proc_path("/proc/12/net/13", ids) == "/proc/99/net/13"
    assert own_proc_path("/home/12/task/13", ids) == "/home/12/task/13"


@given(some.lists(some.sampled_from([b"", bytes(64), b"x" * 7, bytes(3) + b"y"]), max_size=8))
def test_written_content_equals_its_pieces(pieces):
    fd = os.memfd_create("content")
    try:
        total = write_all(fd, pieces)
        os.ftruncate(fd, total)
        assert os.pread(fd, total + 1, 0) == b"".join(pieces)
    finally:
        os.close(fd)


def test_flock_layout_is_that_of_the_kernel():
    # struct flock on x86-64: l_type 0, l_whence 2, l_start 8, l_len 16, l_pid 24
    raw = fdcalls.pack_lock(True, 10, 14)
    assert len(raw) == 32
    assert struct.unpack_from("=hh4xqqi", raw) == (1, 0, 10, 5, 0)
    assert struct.unpack_from("=q", fdcalls.pack_lock(False, 3, -1), 16) == (0,)


def test_unix_diag_messages():
    # recorded: one end of a socketpair, and a listener with an abstract name
    pair = bytes.fromhex(
        "0101010046a5040001000000000000000800020047a504000c00040000000000000000000500060000000000"
    )
    info = sockets.parse_unix_diag(pair)
    assert (info.inode, info.peer, info.state, info.name) == (0x4A546, 0x4A547, sockets.TCP_ESTABLISHED, b"")
    listener = bytes.fromhex(
        "01010a0048a5040003000000000000000700000000787800040003000c00040000000000110000000500060000000000"
    )
    info = sockets.parse_unix_diag(listener)
    assert (info.state, info.name, info.send_queue) == (sockets.TCP_LISTEN, b"\0xx", 17)


@given(some.binary(max_size=120))
def test_unix_diag_noise(noise):
    try:
        sockets.parse_unix_diag(noise)
    except (ValueError, struct.error):
        pass


def test_own_unix_sockets_are_told():
    first, second = socket.socketpair()
    with first, second, sockets.UnixDiag() as diag:
        inode, peer = (os.fstat(sock.fileno()).st_ino for sock in (first, second))
        assert diag.query(inode).peer == peer
        assert {inode, peer} <= {one.inode for one in diag.dump()}
        with pytest.raises(FileNotFoundError):
            diag.query(2**32 - 7)


@given(some.lists(some.integers(0, 3), min_size=1, max_size=12))
def test_descriptors_of_one_description_are_grouped(descriptions):
    """Against the plain truth, through a comparison that orders as kcmp does."""
    info = SimpleNamespace(flags=0)
    fds = [
        OpenFd(fd, "/f", SimpleNamespace(st_dev=1, st_ino=1), info, b"pos:\t0\nflags:\t00\n")  # type: ignore[arg-type]
        for fd in range(len(descriptions))
    ]
    rank = {0: 2, 1: 0, 2: 3, 3: 1}

    def compare(_pid, one, other):
        a, b = rank[descriptions[one]], rank[descriptions[other]]
        return (a > b) - (a < b)

    groups = [[one.fd for one in group] for group in group_by_description(1, fds, compare)]
    truth = {}
    for fd, description in enumerate(descriptions):
        truth.setdefault(description, []).append(fd)
    assert groups == sorted(truth.values())


def test_state_survives_its_encoding():
    state = state_of.FilesState(
        descriptions=(
            state_of.EventFd(flags=2, count=2**64 - 2, semaphore=True),
            state_of.UnixSocket(flags=2, family=1, type=1, protocol=0, state="idle", abstract=b"\xff\0"),
            dataclasses.replace(
                file(READ), locks=(state_of.FileLock("flock", True, 0, -1),), content=b"\0\xff"
            ),
            state_of.Epoll(flags=2, watches=(state_of.EpollWatch(1, 1 << 31, 2**64 - 1),)),
            state_of.PipeEnd(flags=0, pipe=0, owner=state_of.SignalOwner(1, 5, 12, True)),
        ),
        descriptors=(state_of.Descriptor(0, 0, True),),
        pipes=(state_of.PipeState(1, "", 65536, (b"a", b"b"), external=False, hung_up=True, packets=True),),
        boot_id="b",
        pid=3,
    )
    assert decode(state_of.FilesState, encode(state)) == state


def test_inet_diag_message_with_keys():
    # struct inet_diag_msg up to its inode, then INET_DIAG_SHUTDOWN and INET_DIAG_MD5SIG with two keys
    head = bytes(68) + struct.pack("=I", 4711) + struct.pack("=HHB3x", 5, 8, 3)
    of_four = struct.pack("=BBH16s80s", socket.AF_INET, 8, 3, bytes([10]), b"one")
    of_six = struct.pack("=BBH16s80s", socket.AF_INET6, 16, 3, bytes([0xFD]), b"two")
    message = head + struct.pack("=HH", 204, 18) + of_four + of_six
    info = inet_diag.parse_inet_diag(message)
    assert info.inode == 4711
    four, six = info.md5_keys
    assert four == inet_diag.Md5Key(socket.AF_INET, bytes([10, 0, 0, 0]), 8, b"one")
    assert six == inet_diag.Md5Key(socket.AF_INET6, bytes([0xFD]) + bytes(15), 16, b"two")
    # struct tcp_md5sig: address 0, flags 128, prefix length 129, key length 130, interface 132, key 136
    option = four.option(socket.AF_INET6)
    assert len(option) == 216
    assert struct.unpack_from("=BBHi3s", option, 128) == (1, 8, 3, 0, b"one")
    assert option[8:24] == bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 0])
    with pytest.raises(ValueError, match="cut short"):
        inet_diag.parse_inet_diag(message[:-1])


@given(some.binary(max_size=240))
def test_inet_diag_noise(noise):
    try:
        inet_diag.parse_inet_diag(noise)
    except ValueError:
        pass
