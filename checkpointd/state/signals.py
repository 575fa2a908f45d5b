# SPDX-License-Identifier: Apache-2.0
"""Signals and timers that belong to the whole process.  Times are nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignalAction:
    """The kernel's own sigaction of `signal`; those at SIG_DFL without flags and mask are left out."""

    signal: int
    handler: int
    flags: int
    restorer: int
    mask: int


@dataclass(frozen=True, slots=True)
class IntervalTimer:
    """setitimer(2): `value_ns` is left until it fires, 0 when it is off."""

    which: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class PosixTimer:
    """timer_create(2).

    Attributes:
        clock: the kernel's clock id; -6 is the process's and -2 a thread's CPU time.
        notify: SIGEV_*; `tid` is of SIGEV_THREAD_ID.
        value: the sigval.
        value_ns: left until it fires, 0 when it is off.
    """

    id: int
    clock: int
    notify: int
    signal: int
    tid: int
    value: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class SignalsState:
    """Dispositions, signals pending for the process as a whole, timers."""

    actions: tuple[SignalAction, ...]
    pending: tuple[bytes, ...] = ()
    interval_timers: tuple[IntervalTimer, ...] = ()
    posix_timers: tuple[PosixTimer, ...] = ()
