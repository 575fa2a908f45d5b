# SPDX-License-Identifier: Apache-2.0
"""Layouts for timers: timespec, itimerspec, itimerval, sigevent, and the clocks' present values.

Times are nanoseconds outside, the kernel's pairs inside.

Source: timer_create(2), setitimer(2), clock_gettime(2), Linux include/uapi/asm-generic/siginfo.h.
"""

from __future__ import annotations

import struct
import time

ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF = 0, 1, 2
TIMER_ABSTIME = 1
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
ITIMERSPEC_BYTES = 32
TIMESPEC_BYTES = 16
SIGEVENT_BYTES = 64
THREAD_CLOCK = -2
"""it_clock of a timer on the CPU time of the thread that made it (CLOCK_THREAD_CPUTIME_ID)."""

_NS = 1_000_000_000


def pack_timespec(ns: int) -> bytes:
    return struct.pack("=qq", ns // _NS, ns % _NS)


def unpack_timespec(data: bytes) -> int:
    seconds, ns = struct.unpack("=qq", data[:16])
    return int(seconds) * _NS + int(ns)


def pack_itimerspec(value_ns: int, interval_ns: int) -> bytes:
    """struct itimerspec {it_interval, it_value}"""
    return pack_timespec(interval_ns) + pack_timespec(value_ns)


def unpack_itimerspec(data: bytes) -> tuple[int, int]:
    """(value, interval)"""
    return unpack_timespec(data[16:32]), unpack_timespec(data[:16])


def pack_itimerval(value_ns: int, interval_ns: int) -> bytes:
    """struct itimerval {it_interval, it_value}; a running timer never becomes 0."""
    value_us = -(-value_ns // 1000)
    interval_us = interval_ns // 1000
    return struct.pack("=4q", *divmod(interval_us, 1_000_000), *divmod(value_us, 1_000_000))


def unpack_itimerval(data: bytes) -> tuple[int, int]:
    """(value, interval)"""
    i_s, i_us, v_s, v_us = struct.unpack("=4q", data[:32])
    return (v_s * 1_000_000 + v_us) * 1000, (i_s * 1_000_000 + i_us) * 1000


def pack_sigevent(value: int, signum: int, notify: int, tid: int) -> bytes:
    """struct sigevent {sigval, int signo, int notify, int tid}, 64 bytes."""
    return struct.pack("=Qiii44x", value, signum, notify, tid)


def monotonic_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
