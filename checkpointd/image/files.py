# SPDX-License-Identifier: Apache-2.0
"""Files of a store: whole writes, exact reads, durable renames, locks.  Everything goes through directory fds.

Errors: `NoSpace` when the disk, a quota or a size limit is full, `NotPermitted` when the kernel refuses,
`Busy` when a lock is not free in time, `ImageDamaged` when a file is shorter than it says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from checkpointd.errors import Busy, CheckpointError, ImageDamaged, NoSpace, NotPermitted

FILE_MODE = 0o600
DIR_MODE = 0o700
LOCK_TIMEOUT_S = 30.0  # the lock is held for milliseconds, but perhaps by a process that is stopped
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP}


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn an OSError of the block into the error a user can act on."""
    try:
        yield
    except OSError as error:
        raise as_checkpoint_error(error, path) from error


def as_checkpoint_error(error: OSError, path: str) -> CheckpointError:
    """The error class for an errno of file I/O."""
    text = os.strerror(error.errno or 0)
    if error.errno in _FULL:
        why = "" if error.errno == errno.ENOSPC else f" ({text})"
        return NoSpace(f"no space left for {path}{why}", path=path)
    if error.errno in _REFUSED:
        return NotPermitted(f"{path}: {text}", path=path)
    if error.errno == errno.EIO:
        return ImageDamaged(f"{path}: the disk cannot read or write it: {text}", path=path)
    return CheckpointError(f"{path}: {text}", path=path, errno=error.errno)


def create_file(name: str, dir_fd: int) -> int:
    """A new file for reading and writing, owner only; it must not exist."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(name, flags, FILE_MODE, dir_fd=dir_fd)
    os.fchmod(fd, FILE_MODE)  # whatever the umask
    return fd


def open_file(name: str, dir_fd: int) -> int:
    """An existing file, read only, never through a symbolic link."""
    return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)


def open_dir(name: str, dir_fd: int | None = None) -> int:
    """A directory as a descriptor."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; returns the offset after it."""
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
    return offset


def read_into(fd: int, into: memoryview, offset: int, path: str) -> None:
    """Fill `into` from `offset`.

    Raises:
        ImageDamaged: the file ends before, or the disk cannot read it.
    """
    try:
        while len(into):
            got = os.preadv(fd, [into], offset)
            if got == 0:
                raise ImageDamaged(f"{path}: the file is truncated", path=path)
            offset += got
            into = into[got:]
    except OSError as error:
        raise as_checkpoint_error(error, path) from error


def read_at(fd: int, size_bytes: int, offset: int, path: str) -> bytes:
    """Exactly `size_bytes` from `offset` (the caller has capped the size by that of the file).

    Raises:
        ImageDamaged: the file ends before, or the disk cannot read it.
    """
    try:
        data = os.pread(fd, size_bytes, offset)
    except OSError as error:
        raise as_checkpoint_error(error, path) from error
    if len(data) == size_bytes:
        return data
    buffer = bytearray(size_bytes)
    read_into(fd, memoryview(buffer), offset, path)
    return bytes(buffer)


@contextlib.contextmanager
def locked(name: str, dir_fd: int, path: str, *, exclusive: bool) -> Iterator[None]:
    """Hold flock(2) on a file.  Each use opens the file anew, so threads of one process exclude each other too.

    Raises:
        Busy: not free within `LOCK_TIMEOUT_S`.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    with translated(path):
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | flags, FILE_MODE, dir_fd=dir_fd)
        except OSError as error:
            if exclusive or error.errno != errno.EROFS:
                raise
            fd = os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd)  # a store on a medium that is only read
    try:
        operation = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not try_lock(fd, operation):
            if time.monotonic() > deadline:
                raise Busy(f"{path}: the store is locked by another process", path=path)
            time.sleep(0.002)
        yield
    finally:
        os.close(fd)


def try_lock(fd: int, operation: int = fcntl.LOCK_EX) -> bool:
    """flock(2) without waiting: did we get it?"""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_tree(name: str, dir_fd: int) -> None:
    """Remove a flat directory and its files; what is already gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        fd = open_dir(name, dir_fd)
        try:
            for entry in os.listdir(fd):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry, dir_fd=fd)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)
