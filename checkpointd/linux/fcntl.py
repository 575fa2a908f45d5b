# SPDX-License-Identifier: Apache-2.0
"""Calls on file descriptors that Python's os and fcntl modules lack.

All raise OSError with the errno of the call.

Source: fcntl(2), tee(2), open_by_handle_at(2), signalfd(2), timerfd_create(2), linux/fcntl.h.
"""

from __future__ import annotations

import fcntl
import os
import struct

from checkpointd.linux._libc import syscall

F_SETSIG, F_GETSIG = 10, 11
F_SETOWN_EX, F_GETOWN_EX = 15, 16
F_OFD_SETLK = 37
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL = 1

O_PATH = 0o10000000
O_TMPFILE = 0o20000000 | os.O_DIRECTORY
O_LARGEFILE = 0o100000
FASYNC = 0o20000

FIONREAD = 0x541B
TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2

SPLICE_F_NONBLOCK = 2
AT_EMPTY_PATH = 0x1000

NR_SIGNALFD4 = 289
NR_TIMERFD_CREATE, NR_TIMERFD_SETTIME, NR_TIMERFD_GETTIME = 283, 286, 287
NR_DUP3, NR_FCNTL, NR_CLOSE, NR_EPOLL_CTL, NR_LISTEN = 292, 72, 3, 233, 50
_NR_TEE, _NR_OPEN_BY_HANDLE_AT = 276, 304

# _IOW('T', 0, u64), since Linux 3.17 with CONFIG_CHECKPOINT_RESTORE; see fs/timerfd.c
_TFD_IOC_SET_TICKS = 0x4008_5400

# struct itimerspec: it_interval (sec, nsec), it_value (sec, nsec)
_ITIMERSPEC = struct.Struct("=4q")
# struct f_owner_ex: int type, pid_t pid
_OWNER_EX = struct.Struct("=2i")
# struct flock: short l_type, short l_whence, off_t l_start, off_t l_len, pid_t l_pid
FLOCK = struct.Struct("@hhqqi4x")


def tee(source: int, target: int, size_bytes: int) -> int:
    """Copy from one pipe to another without consuming; the number of bytes."""
    return syscall(_NR_TEE, source, target, size_bytes, SPLICE_F_NONBLOCK, name="tee")


def signalfd(mask: int, flags: int) -> int:
    """A new signalfd; `mask` has bit n-1 set for signal n."""
    return syscall(NR_SIGNALFD4, -1, struct.pack("=Q", mask), 8, flags, name="signalfd4")


def timerfd_create(clock: int, flags: int) -> int:
    return syscall(NR_TIMERFD_CREATE, clock, flags, name="timerfd_create")


def timerfd_settime(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    spec = _ITIMERSPEC.pack(*divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
    syscall(NR_TIMERFD_SETTIME, fd, flags, spec, 0, name="timerfd_settime")


def timerfd_gettime(fd: int) -> tuple[int, int]:
    """Time left and interval, ns.

    A periodic timer that expired and was not read is advanced: the pending expirations move into its tick
    count.  What a reader gets is the same.
    """
    spec = bytearray(_ITIMERSPEC.size)
    syscall(NR_TIMERFD_GETTIME, fd, spec, name="timerfd_gettime")
    interval_s, interval_ns, value_s, value_ns = _ITIMERSPEC.unpack(spec)
    return value_s * 10**9 + value_ns, interval_s * 10**9 + interval_ns


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """Set the expirations a read will report (> 0).  ENOTTY where CONFIG_CHECKPOINT_RESTORE is off."""
    fcntl.ioctl(fd, _TFD_IOC_SET_TICKS, struct.pack("=Q", ticks))


def get_owner(fd: int) -> tuple[int, int, int]:
    """Type, id and signal of the description's owner (F_GETOWN_EX, F_GETSIG); id 0 is nobody."""
    kind, number = _OWNER_EX.unpack(fcntl.fcntl(fd, F_GETOWN_EX, bytes(_OWNER_EX.size)))
    return kind, number, fcntl.fcntl(fd, F_GETSIG)


def set_owner(fd: int, kind: int, number: int, signal: int) -> None:
    fcntl.fcntl(fd, F_SETOWN_EX, _OWNER_EX.pack(kind, number))
    if signal:
        fcntl.fcntl(fd, F_SETSIG, signal)


def pack_lock(write: bool, start: int, end: int) -> bytes:
    """struct flock; `end` is the last byte, or -1 for the end of the file."""
    return FLOCK.pack(
        fcntl.F_WRLCK if write else fcntl.F_RDLCK, os.SEEK_SET, start, 0 if end < 0 else end - start + 1, 0
    )


def unread_bytes(fd: int) -> int:
    """FIONREAD."""
    return int(struct.unpack("i", fcntl.ioctl(fd, FIONREAD, bytes(4)))[0])


def open_by_handle_at(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> int:
    """Open a file by its handle.  ESTALE when the file is gone; EPERM without CAP_DAC_READ_SEARCH."""
    # struct file_handle: unsigned int handle_bytes, int handle_type, unsigned char f_handle[]
    data = struct.pack("=Ii", len(handle), handle_type) + handle
    return syscall(_NR_OPEN_BY_HANDLE_AT, mount_fd, data, flags, name="open_by_handle_at")
