# SPDX-License-Identifier: Apache-2.0
"""A target whose dirty set is known: it runs one line of Python at a time, from stdin, and answers "ok".

Between lines it is blocked in read(2).  `AREA` lies at a fixed address, far from everything the interpreter uses.
"""

import ctypes
import mmap
import os
import struct
import sys

PAGE = 4096
AREA = 0x7E00_0000_0000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
PTR, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mmap.argtypes = [PTR, SIZE, INT, INT, INT, ctypes.c_long]
libc.mremap.argtypes = [PTR, SIZE, SIZE, INT, PTR]
libc.madvise.argtypes = [PTR, SIZE, INT]
libc.mprotect.argtypes = [PTR, SIZE, INT]
libc.munmap.argtypes = [PTR, SIZE]
libc.syscall.restype = ctypes.c_long


def at(page):
    return AREA + page * PAGE


def good(result):
    if result in (-1, None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def new(first, nr, flags=0x32, prot=3, fd=-1):  # MAP_FIXED|MAP_ANONYMOUS|MAP_PRIVATE
    good(libc.mmap(at(first), nr * PAGE, prot, flags, fd, 0))


def unmap(first, nr):
    good(libc.munmap(at(first), nr * PAGE))


def move(first, nr, to):
    good(libc.mremap(at(first), nr * PAGE, nr * PAGE, 3, at(to)))


def advise(first, nr, advice):
    good(libc.madvise(at(first), nr * PAGE, advice))


def protect(first, nr, prot):
    good(libc.mprotect(at(first), nr * PAGE, prot))


def write(value, *pages, offset=0, size=8):
    for page in pages:
        ctypes.memset(at(page) + offset, value, size)


def look(*pages):
    return [ctypes.string_at(at(page), 1)[0] for page in pages]


def elsewhere(fd, value, page):
    """Another process writes into the shared object."""
    if os.fork() == 0:
        with mmap.mmap(fd, 0) as room:
            room[page * PAGE] = value
        os._exit(0)
    os.wait()


def direct(path, page):
    """O_DIRECT read of one page of a file into `page`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    got = libc.read(fd, ctypes.c_void_p(at(page)), ctypes.c_size_t(PAGE))
    os.close(fd)
    assert got == PAGE, (got, ctypes.get_errno())


class Ring:
    """The least of io_uring: one registered buffer, one read at a time."""

    def __init__(self, page):
        parameters = ctypes.create_string_buffer(120)
        self.fd = good(libc.syscall(425, 4, parameters))
        values = struct.unpack("30I", parameters.raw)
        self.sq_tail_at, self.sq_mask_at, self.sq_array_at = values[11], values[12], values[16]
        self.cq_head_at, self.cq_tail_at = values[20], values[21]
        self.sq = mmap.mmap(self.fd, 4096, offset=0)
        self.sqes = mmap.mmap(self.fd, 4096, offset=0x1000_0000)
        vector = (ctypes.c_uint64 * 2)(at(page), PAGE)
        good(libc.syscall(427, self.fd, 0, vector, 1))  # IORING_REGISTER_BUFFERS
        self.page = page

    def read(self, fd):
        self.sqes[:64] = struct.pack(
            "<BBHiQQIIQHHiQQ", 4, 0, 0, fd, 0, at(self.page), PAGE, 0, 0, 0, 0, 0, 0, 0
        )  # IORING_OP_READ_FIXED
        tail = struct.unpack_from("I", self.sq, self.sq_tail_at)[0]
        mask = struct.unpack_from("I", self.sq, self.sq_mask_at)[0]
        struct.pack_into("I", self.sq, self.sq_array_at + 4 * (tail & mask), 0)
        struct.pack_into("I", self.sq, self.sq_tail_at, tail + 1)
        assert libc.syscall(426, self.fd, 1, 1, 1, 0, 0) == 1  # IORING_ENTER_GETEVENTS


def main():
    for line in sys.stdin:
        try:
            exec(line, globals())
            print("ok", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
