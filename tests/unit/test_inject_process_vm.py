# SPDX-License-Identifier: Apache-2.0
"""Reading runs of memory, on our own process."""

import errno
import mmap
import os

import numpy as np
import pytest

from checkpointd.linux import _libc
from checkpointd.linux.process_vm import MemFile, read_mem, read_runs, write_mem


def iovecs(base, pieces):
    return np.array([(base + at, size) for at, size in pieces], dtype=np.uint64).reshape(-1, 2)


@pytest.fixture
def source():
    return np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)


@pytest.mark.parametrize("nr", [0, 1, 1023, 1024, 1025, 5000])
def test_runs_are_read_one_behind_the_other(source, nr):
    pieces = [(n * 200 + n % 7, n % 90 + 1) for n in range(nr)]
    wanted = np.concatenate([source[at : at + size] for at, size in pieces]) if nr else source[:0]
    into = np.zeros(len(wanted) + 10, dtype=np.uint8)
    assert read_runs(os.getpid(), iovecs(source.ctypes.data, pieces), into) == len(wanted)
    assert (into[: len(wanted)] == wanted).all()
    assert not into[len(wanted) :].any()


def test_no_more_is_read_than_there_is_room(source):
    into = np.zeros(1500, dtype=np.uint8)
    assert (
        read_runs(os.getpid(), iovecs(source.ctypes.data, [(0, 1000), (5000, 1000), (9000, 5)]), into) == 1500
    )
    assert (into[1000:] == source[5000:5500]).all()


def test_reading_ends_at_the_first_unreadable_run(source):
    area = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _libc.address_of(area)
    _libc.syscall(10, address + 4096, 4096, 0, name="mprotect")
    into = np.zeros(12288, dtype=np.uint8)
    runs = iovecs(0, [(source.ctypes.data, 100), (address + 4096, 4096), (source.ctypes.data, 100)])
    assert read_runs(os.getpid(), runs, into) == 100
    with pytest.raises(OSError, match="process_vm_readv") as caught:
        read_runs(os.getpid(), runs[1:], into)
    assert caught.value.errno == errno.EFAULT


def test_only_a_writable_contiguous_array_is_read_into(source):
    with pytest.raises(ValueError, match="contiguous"):
        read_runs(os.getpid(), iovecs(source.ctypes.data, [(0, 1)]), np.zeros((4, 4), dtype=np.uint8)[:, 1])


def test_single_places_past_protection():
    area = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _libc.address_of(area)
    _libc.syscall(10, address, 4096, 1, name="mprotect")
    try:
        write_mem(os.getpid(), address + 10, b"hello")
    except OSError:
        pytest.skip("this kernel forbids forced writes")
    assert read_mem(os.getpid(), address + 10, 5) == b"hello"
    with MemFile(os.getpid()) as mem, pytest.raises(OSError):
        mem.read(0, 8)


def test_failures_name_the_call():
    with pytest.raises(ProcessLookupError, match="kill"):
        _libc.syscall(62, 2**22 + 5, 0, name="kill")
    assert _libc.syscall(39) == os.getpid()
