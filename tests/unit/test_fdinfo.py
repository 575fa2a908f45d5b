# SPDX-License-Identifier: Apache-2.0
"""Parsers of fdinfo and mountinfo, with bytes recorded on Linux 6.18, and with noise."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as some

from checkpointd.procfs import fdinfo

HEAD = b"pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1039\n"


def test_epoll():
    info = fdinfo.parse(
        HEAD + b"tfd:        7 events: 40000019 data:     7f4500000007  pos:0 ino:4a546 sdev:9\n"
        b"tfd:       12 events:       19 data: ffffffffffffffff  pos:0 ino:40f sdev:10\n"
    )
    assert info.cloexec
    assert info.flags & ~os.O_CLOEXEC == os.O_RDWR
    assert info.mount_id == 17
    assert info.epoll == (
        fdinfo.EpollEntry(7, 0x40000019, 0x7F4500000007, 0x4A546, 9),
        fdinfo.EpollEntry(12, 0x19, 2**64 - 1, 0x40F, 0x10),
    )


def test_inotify():
    info = fdinfo.parse(
        b"pos:\t0\nflags:\t00\nmnt_id:\t17\nino:\t1039\n"
        b"inotify wd:2b ino:510001 sdev:fe00000 mask:80000fff ignored_mask:0 "
        b"fhandle-bytes:8 fhandle-type:1 f_handle:01005100d0c222c6\n"
        b"inotify wd:1 ino:2 sdev:3 mask:2 ignored_mask:0 \n"
    )
    assert info.inotify == (
        fdinfo.InotifyEntry(0x2B, 0x510001, 0xFE00000, 0x80000FFF, 1, bytes.fromhex("01005100d0c222c6")),
        fdinfo.InotifyEntry(1, 2, 3, 2, 0, b""),
    )
    assert not info.cloexec


def test_locks():
    info = fdinfo.parse(
        HEAD + b"lock:\t1: FLOCK  ADVISORY  WRITE 19805 fe:00:2181516 0 EOF\n"
        b"lock:\t2: POSIX  ADVISORY  READ  19805 fe:00:2181516 10 14\n"
        b"lock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:2181516 0 0\n"
        b"lock:\t4: LEASE  ACTIVE    WRITE 19805 fe:00:2181516 0 EOF\n"
    )
    assert info.locks == (
        fdinfo.LockEntry("FLOCK", True, 0, -1),
        fdinfo.LockEntry("POSIX", False, 10, 14),
        fdinfo.LockEntry("OFDLCK", True, 0, 0),
        fdinfo.LockEntry("LEASE", True, 0, -1),
    )


def test_timerfd_and_eventfd_fields():
    info = fdinfo.parse(
        HEAD
        + b"clockid: 1\nticks: 7\nsettime flags: 00\nit_value: (0, 999941403)\nit_interval: (12, 10000000)\n"
    )
    assert info.fields["ticks"] == "7"
    assert fdinfo.nanoseconds(info.fields["it_value"]) == 999941403
    assert fdinfo.nanoseconds(info.fields["it_interval"]) == 12_010_000_000
    info = fdinfo.parse(HEAD + b"eventfd-count:                5\neventfd-id: 1\neventfd-semaphore: 1\n")
    assert info.fields["eventfd-count"] == "5"


@pytest.mark.parametrize(
    "text",
    [b"", b"pos:\t0\n", b"flags:\t02\n", HEAD + b"tfd: x", HEAD + b"inotify wd:", HEAD + b"lock:\t1: FLOCK\n",
     b"pos:\tx\nflags:\t02\n", b"pos:\t0\nflags:\t09\n"],
)  # fmt: skip
def test_what_is_no_fdinfo_is_refused(text):
    with pytest.raises(ValueError):
        fdinfo.parse(text)


@given(some.binary(max_size=400))
def test_noise_is_parsed_or_refused(noise):
    try:
        fdinfo.parse(HEAD + noise)
    except ValueError:
        pass


@given(
    some.integers(0, 2**31 - 1), some.integers(0, 2**32 - 1), some.integers(0, 2**64 - 1),
    some.integers(0, 2**64 - 1), some.integers(0, 2**32 - 1),
)  # fmt: skip
def test_epoll_lines_as_the_kernel_prints_them(fd, events, data, inode, device):
    line = f"tfd: {fd:8d} events: {events:8x} data: {data:16x}  pos:0 ino:{inode:x} sdev:{device:x}\n"
    assert fdinfo.parse(HEAD + line.encode()).epoll == (fdinfo.EpollEntry(fd, events, data, inode, device),)


def test_multicast_tables():
    text = (
        b"Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n"
        b"1\tlo        :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n"
        b"\t\t\t\t010000E0     1 0:00000000\t\t0\n"
        b"2\teth0      :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n"
    )
    everybody = bytes([224, 0, 0, 1])
    assert fdinfo.parse_igmp(text) == [(1, bytes([239, 1, 2, 3])), (1, everybody), (2, everybody)]
    line = b"1    lo              ff020000000000000000000000000001     1 0000000C 0\n"
    assert fdinfo.parse_igmp6(line) == [(1, bytes.fromhex("ff020000000000000000000000000001"))]


def test_mounts():
    text = (
        b"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        b"31 22 0:27 /sub /mnt/with\\040space rw master:1 - tmpfs tmpfs rw\n"
    )
    mounts = fdinfo.parse_mounts(text)
    assert mounts[22] == fdinfo.Mount(22, (254, 0), "/", "ext4")
    assert mounts[31].mount_point == "/mnt/with space"
    with pytest.raises(ValueError):
        fdinfo.parse_mounts(b"nonsense\n")


def test_own_descriptors_are_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(b"12345")
        file.flush()
        info = fdinfo.parse(fdinfo.read(os.getpid(), file.fileno()))
        assert info.position == 5
        assert info.cloexec
        assert file.fileno() in fdinfo.list_fds(os.getpid())
