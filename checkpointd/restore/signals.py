# SPDX-License-Identifier: Apache-2.0
"""The calls that bring back dispositions, pending signals and timers.  Pure: no I/O but scratch.

All signals stay blocked until the very end, so what is queued here waits.  SIGTRAP's disposition is left out: the
runner's int3 would undo it (`restorer` sets it last, without one).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from checkpointd.linux import prctl, timer
from checkpointd.linux import signal as sig
from checkpointd.linux.arch import Nr
from checkpointd.restore.plan import Step
from checkpointd.state.signals import PosixTimer, SignalAction, SignalsState
from checkpointd.target.remote import Call, Remote

_DEFAULT = (sig.SIG_DFL, 0, 0, 0)


def action_steps(remote: Remote, state: SignalsState) -> list[Step]:
    """All 62 settable dispositions but SIGTRAP's; SIG_DFL too, since SIG_IGN survives an exec."""
    known = {action.signal: action for action in state.actions}
    table = b"".join(_pack(known.get(signum)) for signum in range(1, sig.NR_SIGNALS + 1))
    at = remote.put(table)
    return [
        Step(
            Call(Nr.RT_SIGACTION, (signum, at + (signum - 1) * sig.SIGACTION_BYTES, 0, sig.SIGSET_BYTES)),
            f"setting the action of signal {signum}",
        )
        for signum in range(1, sig.NR_SIGNALS + 1)
        if signum not in (sig.SIGKILL, sig.SIGSTOP, sig.SIGTRAP)
    ]


def trap_action(state: SignalsState) -> bytes:
    """SIGTRAP's own disposition, packed."""
    return _pack(next((one for one in state.actions if one.signal == sig.SIGTRAP), None))


def _pack(action: SignalAction | None) -> bytes:
    if action is None:
        return sig.pack_sigaction(*_DEFAULT)
    return sig.pack_sigaction(action.handler, action.flags, action.restorer, action.mask)


def shared_pending_steps(remote: Remote, state: SignalsState, pid: int) -> list[Step]:
    """Signals pending for the process, in order, each with its siginfo."""
    return [
        Step(
            Call(Nr.RT_SIGQUEUEINFO, (pid, sig.signal_of(info), remote.put(info))),
            f"queueing signal {sig.signal_of(info)}",
        )
        for info in state.pending
        if sig.signal_of(info) not in (sig.SIGKILL, sig.SIGSTOP)
    ]


def own_pending_steps(remote: Remote, pending: tuple[bytes, ...], pid: int, tid: int) -> list[Step]:
    """Signals pending for one thread, which must queue them to itself (others may not use every si_code)."""
    return [
        Step(
            Call(Nr.RT_TGSIGQUEUEINFO, (pid, tid, sig.signal_of(info), remote.put(info))),
            f"queueing signal {sig.signal_of(info)} to thread {tid}",
        )
        for info in pending
        if sig.signal_of(info) not in (sig.SIGKILL, sig.SIGSTOP)
    ]


def timer_steps(
    remote: Remote, state: SignalsState, tids: Mapping[int, int], *, exact_ids: bool
) -> list[Step]:
    """Timers with the ids they had.

    Args:
        tids: old to new thread ids.
        exact_ids: the kernel takes wanted ids (PR_TIMER_CREATE_RESTORE_IDS, Linux 6.15).  Others hand out
            ascending ids to a fresh process: gaps are filled and emptied again.
    """
    steps: list[Step] = []
    if state.posix_timers:
        if exact_ids:
            steps.append(_restore_ids(1))
            steps += [_create(remote, one, tids) for one in state.posix_timers]
            steps.append(_restore_ids(0))
        else:
            steps += _create_in_order(remote, state, tids)
    for one in state.posix_timers:
        if one.value_ns or one.interval_ns:
            spec = remote.put(timer.pack_itimerspec(one.value_ns, one.interval_ns))
            steps.append(Step(Call(Nr.TIMER_SETTIME, (one.id, 0, spec, 0)), f"starting timer {one.id}"))
    for interval in state.interval_timers:
        value = remote.put(timer.pack_itimerval(interval.value_ns, interval.interval_ns))
        steps.append(
            Step(Call(Nr.SETITIMER, (interval.which, value, 0)), f"starting itimer {interval.which}")
        )
    return steps


def _restore_ids(on: int) -> Step:
    return Step(Call(Nr.PRCTL, (prctl.PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0)), "choosing timer ids")


def _create(remote: Remote, one: PosixTimer, tids: Mapping[int, int]) -> Step:
    event = timer.pack_sigevent(one.value, one.signal, one.notify, tids.get(one.tid, one.tid))
    args = (one.clock, remote.put(event), remote.put(struct.pack("=i", one.id)))
    return Step(Call(Nr.TIMER_CREATE, args), f"making timer {one.id} of clock {one.clock}")


def _create_in_order(remote: Remote, state: SignalsState, tids: Mapping[int, int]) -> list[Step]:
    steps: list[Step] = []
    wanted = {one.id: one for one in state.posix_timers}
    dummy = PosixTimer(0, 1, timer.SIGEV_NONE, 0, 0, 0, 0, 0)
    for number in range(max(wanted) + 1):
        if number in wanted:
            steps.append(_create(remote, wanted[number], tids))
        else:
            steps.append(_create(remote, dummy, tids))
            steps.append(Step(Call(Nr.TIMER_DELETE, (number,)), f"deleting timer {number}"))
    return steps
