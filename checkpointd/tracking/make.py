# SPDX-License-Identifier: Apache-2.0
"""Making a tracker for a frozen target, through an injection.

What a backend needs inside the target (a userfaultfd of its address space, the switch of the patched kernel) is
made here and nowhere else.  The descriptor is held by us alone and not left behind.  The switch belongs to the
target: whether it is still on is asked at each dump (`switch_is_on`), and it is turned off again by `switch_off` where
`make_tracker` turned it on.  Left on, it costs a process that nobody clears nothing.

Raises: UsageError and KernelLacks of `select_backend`; TargetGone when the target died.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kernel_shim import switch
from kernel_shim.emulation import Mode

from checkpointd import tracepoint
from checkpointd.features import Features
from checkpointd.linux import pidfd
from checkpointd.linux import userfaultfd as uffd
from checkpointd.target.remote import Call, Remote, Result
from checkpointd.tracking.base import Tracker
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.presence import Sight
from checkpointd.tracking.select import Choice, select_backend
from checkpointd.tracking.soft_dirty import SoftDirtyTracker
from checkpointd.tracking.uffd_wp import FEATURES, UffdWpTracker

NR_CLOSE = 3
_USERFAULTFD = Call(uffd.NR_USERFAULTFD, (os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY,))


def sight_of(features: Features) -> Sight:
    """How pages are looked at on this kernel."""
    return Sight(has_scan=features.pagemap_scan, has_guard_category=features.guard_category)


def make_tracker(
    backend: str, pid: int, remote: Remote, features: Features, *, precise: bool = False
) -> tuple[Tracker, Choice]:
    """The tracker asked for, or the best one with "auto", and why it was taken.

    Its first epoch begins at its first `collect`.

    Args:
        precise: soft-dirty, and exact: patched or emulated.
    """
    sight, kinds = sight_of(features), features.soft_dirty_kinds
    no_uffd = no_switch = ""
    if backend != "content":
        no_uffd = _forbidden(pid, remote, [_USERFAULTFD], "userfaultfd")
        no_switch = _forbidden(pid, remote, [Call(*switch.query_call())], "prctl")
    while True:
        choice = select_backend(
            backend, features, injection_refused=no_uffd, switch_refused=no_switch, precise=precise
        )
        keeps_writes, marks_moves = kinds.keeps_writes.works, kinds.marks_moves.works
        try:
            if choice.backend == "uffd-wp":
                uffd_wp = UffdWpTracker(
                    make_userfaultfd(pid, remote, FEATURES),
                    has_guard_category=features.guard_category,
                    holes_are_written=features.holes_are_written,
                )
                return uffd_wp, choice
            if choice.backend == "barrier-soft-dirty":
                fd = make_userfaultfd(pid, remote, 0)
                return SoftDirtyTracker(pid, Mode.BARRIER, sight, fd=fd, keeps_writes=keeps_writes), choice
        except OSError as error:
            no_uffd = f"userfaultfd failed in the target: {error.strerror}"
            continue
        if choice.backend == "precise-soft-dirty":
            try:
                turned_on = _switch_on(remote)
            except OSError as error:
                no_switch = f"precise tracking cannot be switched on in the target: {error.strerror}"
                continue
            tracker = SoftDirtyTracker(
                pid, Mode.PATCHED, sight, keeps_writes=keeps_writes, marks_moves=marks_moves
            )
            tracker.turned_on = turned_on
            return tracker, choice
        if choice.backend == "soft-dirty":
            # what marks_moves says holds with the switch on
            moves = marks_moves and not kinds.switch.works
            return SoftDirtyTracker(
                pid, Mode.PLAIN, sight, keeps_writes=keeps_writes, marks_moves=moves
            ), choice
        return ContentTracker(sight), choice


def switch_is_on(tracker: Tracker, remote: Remote) -> bool:
    """Is what `tracker` relies on in the target still so?  True for trackers that rely on no switch."""
    if not isinstance(tracker, SoftDirtyTracker) or tracker.mode is not Mode.PATCHED:
        return True
    return bool(switch.check_result(remote.batch([Call(*switch.query_call())])[0]))


def needs_switch_off(tracker: Tracker) -> bool:
    """Did `make_tracker` turn on something in the target that outlives the tracker?"""
    return isinstance(tracker, SoftDirtyTracker) and tracker.turned_on


def switch_off(remote: Remote) -> None:
    """Turn precise tracking off in the target; a target that has died or refuses is left alone."""
    remote.batch([Call(*switch.set_call(False))])


def _switch_on(remote: Remote) -> bool:
    """Turn precise tracking on; was it off?  (prctl's argument checks make the query fail where there is none.)"""
    was_on = switch.check_result(remote.batch([Call(*switch.query_call())])[0])
    if not was_on:
        undo = [Call(*switch.set_call(False))]
        switch.check_result(remote.batch([Call(*switch.set_call(True))], undo=undo)[0])
    return not was_on


def _forbidden(pid: int, remote: Remote, calls: Sequence[Call], name: str) -> str:
    """Why a call must not even be tried: a seccomp filter may kill for it.  "" when it may."""
    allows = getattr(
        remote, "seccomp_ok", None
    )  # an injection has it; a process that we made has no such filter
    if allows is not None and not allows(calls):
        return f"a seccomp filter of process {pid} forbids {name}"
    return ""


def make_userfaultfd(pid: int, remote: Remote, wanted: int) -> int:
    """A userfaultfd of the target's address space with these features, held by us alone.

    Raises:
        OSError: there is none to be had, or not with all of `wanted`.
    """
    number = remote.batch([_USERFAULTFD], undo=[Call(NR_CLOSE, (Result(0),))])[0]
    if number < 0:
        raise OSError(-number, os.strerror(-number), "userfaultfd")
    tracepoint.hit("track.made")
    fd = -1
    try:
        try:
            process_fd = pidfd.pidfd_open(pid)
            try:
                fd = pidfd.pidfd_getfd(process_fd, number)
            finally:
                os.close(process_fd)
        finally:
            remote.call(NR_CLOSE, number)
        tracepoint.hit("track.taken")
        uffd.handshake(fd, wanted)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    return fd
