# SPDX-License-Identifier: Apache-2.0
"""State out: signal dispositions, signals pending for the process, interval and POSIX timers.

Source: rt_sigaction(2), ptrace(2) PTRACE_PEEKSIGINFO, proc_pid_timers(5), timer_gettime(2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from checkpointd.linux import ptrace, timer
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import Nr
from checkpointd.procfs import process
from checkpointd.state.signals import IntervalTimer, PosixTimer, SignalAction, SignalsState
from checkpointd.target.questions import Questions
from checkpointd.target.remote import Call

_TIMER = re.compile(
    r"ID: (\d+)\nsignal: (-?\d+)/([0-9a-f]+)\nnotify: (\w+)/(?:tid|pid)\.(-?\d+)\nClockID: (-?\d+)"
)
_NOTIFY = {"signal": timer.SIGEV_SIGNAL, "none": timer.SIGEV_NONE, "thread": timer.SIGEV_THREAD}
_DEFAULT = bytes(sig.SIGACTION_BYTES)
_SETTABLE = tuple(n for n in range(1, sig.NR_SIGNALS + 1) if n not in (sig.SIGKILL, sig.SIGSTOP))


_ACTIONS_BYTES, _ITIMERS_BYTES = sig.SIGACTION_BYTES * len(_SETTABLE), timer.ITIMERSPEC_BYTES * 3


def signals_room_bytes(declared: Sequence[PosixTimer]) -> int:
    """The room that `ask_signals` takes."""
    return _ACTIONS_BYTES + _ITIMERS_BYTES + timer.ITIMERSPEC_BYTES * len(declared)


def read_timers(pid: int) -> list[PosixTimer]:
    """The POSIX timers of a process, without their times."""
    return parse_timers(process.slurp(f"/proc/{pid}/timers").decode("ascii"))


def ask_signals(questions: Questions, pid: int, declared: Sequence[PosixTimer]) -> Callable[[], SignalsState]:
    """Add the questions for dispositions and timers; the answer, and what is pending, once they have been asked.

    Args:
        declared: of `read_timers`, in the freeze.
    """
    action_at = questions.room(_ACTIONS_BYTES)
    itimer_at = questions.room(_ITIMERS_BYTES)
    timer_at = questions.room(timer.ITIMERSPEC_BYTES * len(declared))
    calls = [
        Call(Nr.RT_SIGACTION, (signum, 0, action_at + n * sig.SIGACTION_BYTES, sig.SIGSET_BYTES))
        for n, signum in enumerate(_SETTABLE)
    ]
    calls += [Call(Nr.GETITIMER, (which, itimer_at + which * timer.ITIMERSPEC_BYTES)) for which in range(3)]
    calls += [
        Call(Nr.TIMER_GETTIME, (one.id, timer_at + n * timer.ITIMERSPEC_BYTES))
        for n, one in enumerate(declared)
    ]
    which = questions.add(calls)

    def answer() -> SignalsState:
        return SignalsState(
            actions=_actions(questions.results(which), questions.written(action_at, _ACTIONS_BYTES)),
            pending=tuple(ptrace.peek_siginfo(pid, shared=True)),
            interval_timers=_interval_timers(questions.written(itimer_at, _ITIMERS_BYTES)),
            posix_timers=_with_times(
                declared, questions.written(timer_at, timer.ITIMERSPEC_BYTES * len(declared))
            ),
        )

    return answer


def _actions(results: Sequence[int], written: bytes) -> tuple[SignalAction, ...]:
    found = []
    for n, signum in enumerate(_SETTABLE):
        raw = written[n * sig.SIGACTION_BYTES : (n + 1) * sig.SIGACTION_BYTES]
        if results[n] or raw == _DEFAULT:
            continue
        action = SignalAction(signum, *sig.unpack_sigaction(raw))
        if action.handler or action.flags or action.mask:
            found.append(action)
    return tuple(found)


def _interval_timers(written: bytes) -> tuple[IntervalTimer, ...]:
    found = []
    for which in (timer.ITIMER_REAL, timer.ITIMER_VIRTUAL, timer.ITIMER_PROF):
        at = which * timer.ITIMERSPEC_BYTES
        value, interval = timer.unpack_itimerval(written[at : at + timer.ITIMERSPEC_BYTES])
        if value or interval:
            # off but with an interval: it fired, and starts anew when its pending SIGALRM is delivered
            found.append(IntervalTimer(which, value or interval, interval))
    return tuple(found)


def parse_timers(text: str) -> list[PosixTimer]:
    """/proc/PID/timers; times are filled in by `timer_gettime`."""
    found = []
    for match in _TIMER.finditer(text):
        number, signum, value, notify, target, clock = match.groups()
        # a timer that signals one thread prints "tid." and the kind without SIGEV_THREAD_ID
        by_thread = f"{notify}/tid." in match[0]
        found.append(
            PosixTimer(
                id=int(number),
                clock=int(clock),
                notify=_NOTIFY[notify] | (timer.SIGEV_THREAD_ID if by_thread else 0),
                signal=int(signum),
                tid=int(target) if by_thread else 0,
                value=int(value, 16),
                value_ns=0,
                interval_ns=0,
            )
        )
    return sorted(found, key=lambda one: one.id)


def _with_times(declared: Sequence[PosixTimer], raw: bytes) -> tuple[PosixTimer, ...]:
    found = []
    for n, one in enumerate(declared):
        value, interval = timer.unpack_itimerspec(raw[n * timer.ITIMERSPEC_BYTES :])
        found.append(
            PosixTimer(
                one.id, one.clock, one.notify, one.signal, one.tid, one.value,
                value_ns=value, interval_ns=interval,
            )
        )  # fmt: skip
    return tuple(found)
