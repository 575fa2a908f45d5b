# SPDX-License-Identifier: Apache-2.0
"""The structures of openat2(2) and fstatfs(2), and what the kernel says to them."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from checkpointd.linux import statfs
from checkpointd.linux.openat2 import AT_FDCWD, OPEN_HOW, RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS, openat2


def test_sizes_are_the_kernels():
    assert OPEN_HOW.size == 24  # OPEN_HOW_SIZE_VER0
    assert statfs.STATFS.size == 120


def test_a_link_is_refused_wherever_it_is_on_the_way(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "last").symlink_to("file")
    os.close(openat2(AT_FDCWD, str(tmp_path / "real" / "file"), os.O_RDONLY, RESOLVE_NO_SYMLINKS))
    for path in ("link/file", "real/last"):
        with pytest.raises(OSError) as refused:
            openat2(AT_FDCWD, str(tmp_path / path), os.O_RDONLY, RESOLVE_NO_SYMLINKS)
        assert refused.value.errno == errno.ELOOP


def test_a_root_is_not_left(tmp_path):
    (tmp_path / "file").write_text("inside")
    root = os.open(tmp_path, os.O_PATH)
    try:
        fd = openat2(root, "/../../file", os.O_RDONLY, RESOLVE_IN_ROOT)
        assert os.read(fd, 10) == b"inside"
        os.close(fd)
    finally:
        os.close(root)


def test_the_flags_that_the_kernel_gives_are_taken(tmp_path):
    (tmp_path / "file").write_text("x")
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    again = openat2(AT_FDCWD, str(tmp_path / "file"), fcntl.fcntl(fd, fcntl.F_GETFL), RESOLVE_NO_SYMLINKS)
    assert fcntl.fcntl(again, fcntl.F_GETFL) == fcntl.fcntl(fd, fcntl.F_GETFL)
    os.close(fd)
    os.close(again)


def test_kinds_of_file_systems():
    for path, magic in (("/proc", statfs.PROC_SUPER_MAGIC), ("/dev/shm", statfs.TMPFS_MAGIC)):
        fd = os.open(path, os.O_RDONLY)
        try:
            found = statfs.file_system_magic(fd)
        finally:
            os.close(fd)
        if path == "/proc" or "tmpfs /dev/shm " in Path("/proc/mounts").read_text():
            assert found == magic
